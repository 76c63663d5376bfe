"""Sharding into an object store: a real server on loopback, killed together with the run or behind its back."""

import io
import json
import os
import signal
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from corpora import jpeg, make_corpus, markers, run, set_files, start, wait_until
from PIL import Image
from s3_server import S3Server
from source_helpers import list_rows

from data_tools.engines import ShardOptions, shard_corpus
from data_tools.errors import Unfinished, UserError
from data_tools.manifest import DatasetManifest
from data_tools.stores import open_store
from pipeline.data.source import Access, open_source

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = [pytest.mark.s3, pytest.mark.slow]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 400, side=100)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    shard_corpus(ShardOptions(corpus, out, max_samples=10, workers=1))
    return set_files(out)


@pytest.fixture
def server(tmp_path):
    server = S3Server(tmp_path)
    server.start()
    server.client().create_bucket(Bucket="sets")
    yield server
    server.kill()


def stored(server: S3Server, folder: str = "set/") -> dict[str, bytes]:
    """The objects directly in `folder`."""
    client = server.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="sets", Prefix=folder, Delimiter="/")
    keys = [o["Key"] for page in pages for o in page.get("Contents", [])]
    return {k.removeprefix(folder): client.get_object(Bucket="sets", Key=k)["Body"].read() for k in keys}


def count(server: S3Server, folder: str, suffix: str) -> int:
    found = server.client().list_objects_v2(Bucket="sets", Prefix=folder).get("Contents", [])
    return sum(o["Key"].endswith(suffix) for o in found)


def arguments(corpus: Path, server: S3Server, tmp_path: Path) -> list:
    return ["shard", corpus, "s3://sets/set", "--max-samples", 10, "--workers", 2,
            "--storage-options", json.dumps(server.options), "--work", tmp_path / "work"]  # fmt: skip


def test_a_run_killed_in_the_middle_goes_on_from_the_markers_in_the_store(corpus, undisturbed, server, tmp_path):
    first = start(*arguments(corpus, server, tmp_path), start_new_session=True)
    wait_until(lambda: count(server, "set/plan/", ".done.json") >= 5, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = count(server, "set/plan/", ".done.json")
    assert 5 <= done < 40 and count(server, "set/", "dataset.json") == 0
    # From another machine: nothing but the store is known there.
    said = run(*arguments(corpus, server, tmp_path)[:-1], tmp_path / "elsewhere")
    assert f"going on: {done * 10} of 400" in said
    assert stored(server) == undisturbed
    left = [p.name for p in (tmp_path / "elsewhere").rglob("*") if p.suffix in (".tar", ".npy")]
    assert left == []  # shards do not stay here


def test_an_outage_of_the_server_is_waited_out(corpus, undisturbed, server, tmp_path):
    process = start(*arguments(corpus, server, tmp_path))
    wait_until(lambda: count(server, "set/plan/", ".done.json") >= 5, process)
    server.kill()
    time.sleep(4)
    assert process.poll() is None
    server.start()
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert stored(server) == undisturbed


def test_a_server_that_lost_everything_is_noticed_and_filled_again(corpus, undisturbed, server, tmp_path):
    process = start(*arguments(corpus, server, tmp_path))
    wait_until(lambda: count(server, "set/plan/", ".done.json") >= 5, process)
    server.kill()
    server.start(remember=False)
    server.client().create_bucket(Bucket="sets")
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1 and ("are not packed yet" in error or "no such bucket" in error)
    run(*arguments(corpus, server, tmp_path))
    assert stored(server) == undisturbed


# --- shards that are uploaded in parts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A corpus of one shard above 100 MB, and the set it makes."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "in").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (3000, 3000, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{i}.bmp")
    shard_corpus(ShardOptions(folder / "in", folder / "out", max_samples=10, workers=1))
    assert sum(p.stat().st_size for p in (folder / "out").glob("*.tar")) > 105e6
    return folder / "in", set_files(folder / "out")


def parts_are_coming(server: S3Server) -> bool:
    return bool(server.client().list_multipart_uploads(Bucket="sets").get("Uploads"))


def test_killed_while_a_shard_is_uploaded_in_parts(large, server, tmp_path):
    source, undisturbed = large
    first = start(*arguments(source, server, tmp_path), start_new_session=True)
    wait_until(lambda: parts_are_coming(server), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert count(server, "set/", ".tar") == 0
    run(*arguments(source, server, tmp_path))
    assert stored(server) == undisturbed


def test_a_server_killed_while_a_shard_is_uploaded_in_parts(large, server, tmp_path):
    source, undisturbed = large
    process = start(*arguments(source, server, tmp_path))
    wait_until(lambda: parts_are_coming(server), process)
    server.kill()
    time.sleep(2)
    assert process.poll() is None
    server.start()  # and it knows nothing of the parts that it had
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert stored(server) == undisturbed


# --- the corpus in a store ----------------------------------------------------------------------------------


@pytest.fixture
def corpus_in_store(corpus, server) -> str:
    client = server.client()
    client.create_bucket(Bucket="corpora")
    with io.BytesIO() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(corpus, "photos")
        client.put_object(Bucket="corpora", Key="photos.tar", Body=archive.getvalue())
    files = sorted(corpus.rglob("*.jpg"))
    for path in files:
        client.put_object(Bucket="corpora", Key=f"photos/{path.relative_to(corpus)}", Body=path.read_bytes())
    rows = "".join(f"photos/{p.relative_to(corpus)},{p.parent.name}\n" for p in files)
    client.put_object(Bucket="corpora", Key="photos.csv", Body=b"path,label\n" + rows.encode())
    return "s3://corpora/photos"


def from_store(source: str, out, server: S3Server, *more) -> list:
    return ["shard", source, out, "--max-samples", 10, "--workers", 2,
            "--storage-options", json.dumps(server.options), *more]  # fmt: skip


def test_folders_archives_and_lists_in_a_store(corpus, undisturbed, corpus_in_store, server, tmp_path):
    run(*from_store(corpus_in_store, tmp_path / "folder", server))
    assert set_files(tmp_path / "folder") == undisturbed
    run(*from_store(f"{corpus_in_store}.tar", tmp_path / "tar", server, "--order", "shuffled"))
    run(*from_store(f"{corpus_in_store}.csv", "s3://sets/listed", server, "--work", tmp_path / "work"))
    run("data", "reshard", "s3://sets/listed", tmp_path / "csv", "--storage-options", json.dumps(server.options))
    images = sorted(p.read_bytes() for p in corpus.rglob("*.jpg"))
    assert sorted(members(tmp_path / "tar")) == sorted(members(tmp_path / "csv")) == images
    assert "0 problems" in run("data", "verify", "s3://sets/listed", "--storage-options", json.dumps(server.options))


def members(folder: Path) -> list[bytes]:
    """The JPEGs of all shards."""
    found = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def test_tars_of_a_bucket_that_is_only_read_are_indexed_elsewhere(corpus, server, tmp_path):
    options = ["--storage-options", json.dumps(server.options)]
    run("shard", corpus, tmp_path / "made", "--max-samples", 50)
    tars = {p.name: p.read_bytes() for p in (tmp_path / "made").glob("*.tar")}
    for name, data in tars.items():
        server.client().put_object(Bucket="sets", Key=f"foreign/{name}", Body=data)
    out = tmp_path / "index"
    run("data", "index", "s3://sets/foreign", "--out", out, *options)
    assert stored(server, "foreign/") == tars and not list(out.glob("*.tar"))  # neither written to nor copied
    assert "0 problems" in run("data", "verify", out, *options)
    assert "400 images" in run("data", "stats", out, *options)
    assert "class0/" in run("data", "inspect", out / "train-000000.tar", *options)
    run("data", "reshard", out, tmp_path / "copy", "--max-samples", 50, *options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").glob("*.tar")} == tars
    access = Access(storage_options=server.options, read_timeout=20)
    there = open_source(str(out), "train", image_size=32, num_classes=None, access=access)
    here = open_source(str(tmp_path / "made"), "train", image_size=32, num_classes=None)
    assert [there.read(i, 3).label for i in range(0, 400, 40)] == [here.read(i, 3).label for i in range(0, 400, 40)]
    error = run("shard", corpus, tmp_path / "none", "--dedupe-against", out, *options, code=1)
    assert "all are duplicates or held out" in error  # read from the bucket through the local index
    error = run("data", "index", "s3://sets/other", "--out", out, *options, code=1)
    assert "no .tar files" in error and "Traceback" not in error


def test_an_outage_of_the_corpus_is_waited_out(undisturbed, corpus_in_store, server, tmp_path):
    out = tmp_path / "out"
    process = start(*from_store(corpus_in_store, out, server, "--dedupe", "exact"))
    wait_until(lambda: markers(out) >= 3, process)
    server.kill()
    time.sleep(4)
    assert process.poll() is None and not (out / "dataset.json").exists()
    server.start()
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    tars = {n: d for n, d in undisturbed.items() if n.endswith((".tar", ".npy"))}
    assert {n: d for n, d in set_files(out).items() if n in tars} == tars  # nothing is there twice


def test_an_outage_while_a_list_is_read_and_while_an_archive_is(corpus, corpus_in_store, server, tmp_path):
    server.kill()
    out = tmp_path / "out"
    process = start(*from_store(f"{corpus_in_store}.tar", out, server))
    time.sleep(4)
    assert process.poll() is None and markers(out) == 0
    server.start()
    wait_until(lambda: markers(out) >= 3, process)
    server.kill()
    time.sleep(4)
    server.start()
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert sorted(members(out)) == sorted(p.read_bytes() for p in corpus.rglob("*.jpg"))


def test_many_objects_and_odd_names(server, tmp_path):
    client = server.client()
    odd = ["a b.jpg", "a+b.jpg", "a%20b.jpg", "q?x=1.jpg", "h#y.jpg", "[1]*.jpg", "ü☃.jpg"]
    names = [f"{i:05d}.jpg" for i in range(1100)] + odd
    for name in ("", "deep/"):  # as consoles mark a folder
        client.put_object(Bucket="sets", Key=f"many/{name}", Body=b"")
    for i, name in enumerate(names):
        client.put_object(Bucket="sets", Key=f"many/{name}", Body=jpeg(i) if name in odd else b"x")
    rows, ignored = list_rows("s3://sets/many", **server.options)
    assert [r["path"].decode() for r in rows] == sorted(names) and not ignored
    assert set(open_store("s3://sets/many", server.options).list()) >= set(names)  # a page has 1,000
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": f"s3://sets/many/{n}"}) + "\n" for n in odd))
    shard_corpus(ShardOptions(tmp_path / "m.jsonl", tmp_path / "out", workers=1, storage_options=server.options))
    assert sorted(members(tmp_path / "out")) == sorted(jpeg(1100 + i) for i in range(len(odd)))


def test_missing_credentials_are_said_at_once(server, tmp_path):
    options = {k: v for k, v in server.options.items() if k not in ("key", "secret")}
    more = ["--storage-options", json.dumps(options)]
    env = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    for place in (["s3://sets/photos", tmp_path / "out"], [make_corpus(tmp_path / "in", 3), "s3://sets/new"]):
        error = run("shard", *place, *more, *(["--work", tmp_path / "work"] if place[1] == "s3://sets/new" else []),
                    code=1, env=env)  # fmt: skip
        assert "Unable to locate credentials; see --storage-options" in error and "Traceback" not in error


@pytest.mark.parametrize("dedupe", ["off", "exact"])
def test_credentials_that_a_store_refuses_make_no_bad_images(server, tmp_path, dedupe):
    images = {f"{i}.jpg": jpeg(i) for i in range(5)}
    for name, data in images.items():
        server.client().put_object(Bucket="sets", Key=f"in/{name}", Body=data)
    lines = [f"s3://sets/in/{name},{len(data)}" for name, data in images.items()]
    (tmp_path / "m.csv").write_text("\n".join(["path,size", *lines]))  # sizes: nothing is asked for before it is read
    options = ShardOptions(
        tmp_path / "m.csv", tmp_path / "out", workers=1, storage_options=server.options, dedupe=dedupe
    )  # fmt: skip

    def free_requests(count: str) -> None:
        """From then on moto looks at keys, and it knows none."""
        url = f"{server.options['endpoint_url']}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, count.encode(), {"Content-Type": "text/plain"})).read()

    free_requests("0")
    with pytest.raises(Unfinished, match=r"cannot read s3://sets/in/.*Access Key Id.*\nRenew the credentials"):
        shard_corpus(options)
    free_requests("inf")
    shard_corpus(options)
    assert sorted(members(tmp_path / "out")) == sorted(images.values())


def test_refusals(corpus, server, tmp_path):
    options = ShardOptions(
        make_corpus(tmp_path / "in", 12), "s3://sets/other", max_samples=5, workers=1,
        storage_options=server.options, work=tmp_path / "work",
    )  # fmt: skip
    manifest = shard_corpus(options)
    assert DatasetManifest.from_json(stored(server, "other/")["dataset.json"].decode()) == manifest
    elsewhere = {"max_samples": 4, "work": tmp_path / "elsewhere"}
    with pytest.raises(UserError, match="s3://sets/other was begun with another plan: max_samples was 5, is 4"):
        shard_corpus(replace_options(options, **elsewhere))
    shard_corpus(replace_options(options, overwrite=True, **elsewhere))
    assert len([n for n in stored(server, "other/") if n.endswith(".tar")]) == 3
    server.client().put_object(Bucket="sets", Key="foreign/a.tar", Body=b"x")
    with pytest.raises(UserError, match=r"already holds a\.tar"):
        shard_corpus(replace_options(options, out="s3://sets/foreign", work=tmp_path / "foreign"))
    with pytest.raises(UserError, match="nowhere"):
        shard_corpus(replace_options(options, out="s3://nowhere/set", work=tmp_path / "nowhere"))


def replace_options(options: ShardOptions, **changes) -> ShardOptions:
    from dataclasses import replace

    return replace(options, **changes)
