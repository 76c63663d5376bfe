"""Storage options, retries, stores, and walking tars."""

import json
import threading

import pytest

from data_tools import storage
from data_tools.errors import UserError
from data_tools.storage import is_url, lock_folder, parse_storage_options, remove_leftovers, retrying, write_atomic
from data_tools.stores import LocalStore, ObjectStore, open_store


def test_storage_options():
    assert parse_storage_options([]) == {}
    assert parse_storage_options(['{"key": "a b", "anon": true}', "client_kwargs.region_name=eu", "n=3"]) == {
        "key": "a b",
        "anon": True,
        "client_kwargs": {"region_name": "eu"},
        "n": 3,
    }
    for texts in (["novalue"], ["=x"], ["{bad"], ["a=1", "a.b=2"]):
        with pytest.raises(UserError, match="storage-options"):
            parse_storage_options(texts)


def test_storage_options_from_the_environment(monkeypatch):
    monkeypatch.setenv(storage.OPTIONS_VARIABLE, json.dumps({"secret": "with spaces, and 'quotes'"}))
    assert parse_storage_options([]) == {"secret": "with spaces, and 'quotes'"}
    assert parse_storage_options(["a=1"]) == {"a": 1}


def test_urls():
    assert is_url("s3://b/k") and is_url("memory://x") and is_url("https://h/x")
    assert not any(map(is_url, ["/a/b", "a:b", "C:x", "rel/s3://x"]))


def test_transient_errors_are_retried_and_others_are_not(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    tries = []

    def flaky() -> str:
        tries.append(1)
        if len(tries) < 4:
            raise ConnectionError("reset")
        return "done"

    assert retrying(flaky, "x") == "done" and len(tries) == 4
    for error in (FileNotFoundError("x"), PermissionError("x"), OSError(28, "full"), ValueError("x")):
        tries.clear()

        def permanent(error=error) -> None:
            tries.append(1)
            raise error

        with pytest.raises(type(error)):
            retrying(permanent, "x")
        assert len(tries) == 1

    def never() -> None:
        raise TimeoutError("slow")

    with pytest.raises(UserError, match="cannot read it: slow"):
        retrying(never, "cannot read it", seconds=0)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_stores(tmp_path, kind):
    store = LocalStore(tmp_path / "set") if kind == "local" else open_store(f"memory://{tmp_path}/set")
    assert store.list() == {} and store.list("plan") == {}
    store.write("plan/a.json", b"12345")
    (tmp_path / "up").write_bytes(b"xyz")
    store.upload(tmp_path / "up", "b.tar")
    assert store.list("plan") == {"a.json": 5} and store.list() == {"b.tar": 3}
    assert store.read("plan/a.json") == b"12345" and store.read_range("plan/a.json", 1, 3) == b"23"
    with store.local("b.tar") as path:
        assert path.read_bytes() == b"xyz"
    with pytest.raises(FileNotFoundError):
        store.read("c")
    with pytest.raises(FileNotFoundError), store.local("c"):
        pass
    store.delete(["b.tar", "c"])
    assert store.list() == {}


def test_a_listing_while_others_commit_misses_nothing(tmp_path):
    """A part of an array lists what is done while its neighbours write into the same folder."""
    (tmp_path / "done").write_bytes(b"123")
    stop = threading.Event()

    def commit() -> None:
        while not stop.is_set():
            write_atomic(tmp_path / "other", b"x")

    writer = threading.Thread(target=commit)
    writer.start()
    try:
        assert all(LocalStore(tmp_path).list().get("done") == 3 for _ in range(3000))
    finally:
        stop.set()
        writer.join()


def test_a_missing_driver_is_named():
    with pytest.raises(UserError, match="nosuch"):
        ObjectStore("nosuch://x")


def test_shared_and_exclusive_locks(tmp_path):
    path = tmp_path / "lock"
    with (
        lock_folder(tmp_path, path, shared=True),
        lock_folder(tmp_path, path, shared=True),
        pytest.raises(UserError, match="another run"),
        lock_folder(tmp_path, path),
    ):
        pass
    with lock_folder(tmp_path, path), pytest.raises(UserError), lock_folder(tmp_path, path, shared=True):
        pass


def test_leftovers_of_named_files_alone(tmp_path):
    for name in (".a.tar.tmp-01234567", ".b.tar.tmp-01234567", "a.tar", ".a.tar.tmp-xyz"):
        (tmp_path / name).write_bytes(b"")
    assert remove_leftovers(tmp_path, ["a.tar"]) == 1
    assert remove_leftovers(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.tar.tmp-xyz", "a.tar"]
