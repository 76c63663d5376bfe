"""Where files lie: what counts as a network file system, how a web server is read, when trying again ends."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import members, shards_of, write_dataset

from data_tools.errors import UserError
from pipeline.data.cache import CacheReader, chunk_name, pack_chunk
from pipeline.data.node_cache import cache_limit
from pipeline.data.source import Access, TarSource
from pipeline.data.store import StoreUnreachable, is_network_mount, open_folder, patiently
from pipeline.sizes import parse_bytes

MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /scratch rw shared:1 - lustre 10.0.0.1@tcp:/fs rw
31 22 0:41 / /home rw - nfs4 server:/home rw
32 31 0:42 / /home/local rw - xfs /dev/sdb1 rw
33 22 0:43 / /with\\040blank rw - fuse.sshfs host: rw
34 22 0:44 / /layers rw - fuse.fuse-overlayfs x rw
"""


def test_network_file_systems_are_told_by_the_mount(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    remote = ["/scratch/set", "/home/me/set", "/with blank/set"]
    local = ["/data", "/scratchy/set", "/home/local/set", "/layers/set"]
    assert all(is_network_mount(Path(p), str(mounts)) for p in remote)
    assert not any(is_network_mount(Path(p), str(mounts)) for p in local)
    assert not is_network_mount(Path("/scratch"), str(tmp_path / "missing"))
    assert not open_folder(tmp_path).remote and open_folder(tmp_path, read="chunk").remote


def test_a_network_file_system_is_not_asked_for_the_sizes_of_very_many_files(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"12345")
    remote, local = (open_folder(tmp_path, read=how) for how in ("chunk", "pread"))
    names = ["a.tar", *(f"{i}.tar" for i in range(10_000))]
    assert remote.sizes(names[:10_000]) == local.sizes(names) == {"a.tar": 5}
    assert remote.sizes(names) == {}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A plain web server, which knows no ranges."""
    write_dataset(tmp_path / "set", {"train": shards_of(members(12), [7, 5])})
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/set"
        server.shutdown()


@pytest.mark.parametrize("sequential", [False, True])
def test_a_web_server(web, tmp_path, sequential):
    remote, local = TarSource(web, "train"), TarSource(tmp_path / "set", "train")
    remote.sequential = sequential
    assert remote.digest == local.digest
    assert [remote.encoded(i) for i in range(12)] == [local.encoded(i) for i in range(12)]
    with pytest.raises(UserError, match=r"no dataset\.json in http"):
        TarSource(web + "/nothing", "train")
    with pytest.raises(UserError, match=r"data\.read=pread is there for local files"):
        TarSource(web, "train", access=Access(read="pread"))


def test_trying_again_has_an_end():
    tries = []

    def fails() -> None:
        tries.append(1)
        raise ConnectionError("away")

    with pytest.raises(StoreUnreachable, match=r"cannot read it: away \(tried for .*data\.read_timeout"):
        patiently(fails, "cannot read it", 0.3)
    assert len(tries) >= 2
    assert StoreUnreachable.exit_code == 75
    with pytest.raises(FileNotFoundError):
        patiently(lambda: (_ for _ in ()).throw(FileNotFoundError()), "cannot read it", 60)


def test_a_chunk_in_the_cache(tmp_path):
    source = TarSource(write_dataset(tmp_path / "set", {"train": [members(10)]}), "train")
    rows, raw = source.rows(0)[4:8], (tmp_path / "set" / "train-000000.tar").read_bytes()
    base = int(rows[0]["offset"])
    name = chunk_name(source.digest, 4, 0, 1)
    content = pack_chunk(rows, base, raw[base : int(rows[-1]["offset"]) + int(rows[-1]["size"])])
    reader = CacheReader(tmp_path)
    assert reader.sample(name, 0) is None
    (tmp_path / name).write_bytes(b"")  # announced, but nobody is at work
    assert reader.sample(name, 0) is None
    (tmp_path / name).write_bytes(content)
    assert [reader.sample(name, i) for i in range(4)] == [tuple(source.encoded(4 + i)) for i in range(4)]
    assert reader.sample(name, 4) is None
    for cut in (5, 100, 150):
        (tmp_path / name).write_bytes(content[:cut])
        assert reader.sample(name, 0) is None
    damaged = bytearray(content)
    damaged[30] ^= 1  # in the rows: their hash tells
    (tmp_path / name).write_bytes(damaged)
    assert reader.sample(name, 0) is None


def test_sizes_and_limits(tmp_path):
    assert [parse_bytes(t) for t in ("0", "5", "1.5GB", "2 KiB", "3m")] == [0, 5, 1_500_000_000, 2048, 3_000_000]
    for wrong in ("", "GiB", "5X", "-1", "4i"):
        with pytest.raises(UserError, match="is not a size"):
            parse_bytes(wrong)
    assert cache_limit(tmp_path, 10 << 20, 5 << 20) == 10 << 20
    with pytest.raises(UserError, match=r"set data\.cache_size=11MiB or more"):
        cache_limit(tmp_path, 10 << 20, (10 << 20) + 1)
