"""Archives, WebDataset tars, Parquet, URLs: from every kind of source to shards that read back as they were."""

import errno
import gzip
import io
import json
import os
import pickle
import signal
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import jpeg, make_corpus
from source_helpers import list_rows, tar_bytes

from data_tools import engines, hashing, scan, settle
from data_tools.engines import ShardOptions, preview_corpus, shard_corpus
from data_tools.errors import Unfinished, UserError
from data_tools.finalize import TooManyBad
from data_tools.indexing import IndexOptions, index_dataset
from data_tools.manifest import DatasetManifest, load_index
from data_tools.parallel import map_processes
from data_tools.sources import Columns, folder
from data_tools.verify import verify_dataset


def contents(out: Path) -> dict[str, dict[str, bytes]]:
    """Samples of all shards: key -> suffix -> bytes, as webdataset groups them."""
    samples: dict[str, dict[str, bytes]] = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None and suffix not in samples.get(key, {})
                samples.setdefault(key, {})[suffix] = file.read()
    return samples


def packed(source, out: Path, **options) -> tuple[DatasetManifest, dict[str, dict[str, bytes]]]:
    """Shards with one worker, verifies; what came out."""
    manifest = shard_corpus(ShardOptions(source, out, workers=1, **options))
    assert verify_dataset(out) == []
    return manifest, contents(out)


def two_classes(n: int = 8) -> dict[str, bytes]:
    return {f"{'cat' if i % 2 else 'dog'}/{i:03d}.jpg": jpeg(i) for i in range(n)}


def zip_bytes(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# --- archives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.tar", tar_bytes),
        ("a.tar.gz", partial(tar_bytes, mode="w:gz")),
        ("a.tgz", partial(tar_bytes, mode="w:gz")),
        ("a.tar.bz2", partial(tar_bytes, mode="w:bz2")),
        ("a.tar.xz", partial(tar_bytes, mode="w:xz")),
        ("a.zip", zip_bytes),
        ("b.zip", partial(zip_bytes, method=zipfile.ZIP_STORED)),
    ],
)
def test_an_archive_gives_what_the_folder_gives(tmp_path, name, make):
    images = two_classes()
    for path, data in images.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(data)
    (tmp_path / name).write_bytes(make({**images, "cat/notes.md": b"x", "__MACOSX/._a.jpg": b"x"}))
    _, expected = packed(tmp_path / "folder", tmp_path / "out1", max_samples=3)
    manifest, found = packed(tmp_path / name, tmp_path / "out2", max_samples=3)
    assert manifest.classes == ["cat", "dog"] and found == expected
    assert manifest.source["ignored"] == {"files without an image suffix": 1, "macOS ._ files": 1}
    assert manifest.source["options"]["order"] == "source"
    if name.endswith(("gz", "bz2", "xz")):
        with pytest.raises(UserError, match="--order source"):
            packed(tmp_path / name, tmp_path / "out3", order="shuffled")
    else:
        assert packed(tmp_path / name, tmp_path / "out3", order="shuffled")[1] == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_tar_with_many_shards(tmp_path, workers):
    images = two_classes(60)
    (tmp_path / "a.tar.gz").write_bytes(tar_bytes(images, "w:gz"))
    options = ShardOptions(tmp_path / "a.tar.gz", tmp_path / "out", max_samples=7, workers=workers)
    shard_corpus(options)
    assert {k: v["jpg"] for k, v in contents(tmp_path / "out").items()} == {
        p.removesuffix(".jpg"): d for p, d in images.items()}  # fmt: skip


def test_imagenet_layout_a_tar_of_class_tars(tmp_path):
    inner = {f"n{c:08d}": {f"n{c:08d}_{i}.JPEG": jpeg(10 * c + i) for i in range(4)} for c in range(3)}
    outer = {f"{wnid}.tar": tar_bytes(images) for wnid, images in inner.items()}
    (tmp_path / "train.tar").write_bytes(tar_bytes(outer))
    (tmp_path / "train.zip").write_bytes(zip_bytes(outer, zipfile.ZIP_STORED))
    (tmp_path / "tars").mkdir()
    for name, data in outer.items():
        (tmp_path / "tars" / name).write_bytes(data)
    expected = {f"{w}/{n.removesuffix('.JPEG')}": d for w, images in inner.items() for n, d in images.items()}
    for source in ("train.tar", "train.zip"):
        manifest, found = packed(tmp_path / source, tmp_path / f"out-{source}")
        assert manifest.classes == sorted(inner) and list(manifest.splits) == ["train"]
        assert {k: s["jpg"] for k, s in found.items()} == expected
        assert all(manifest.classes[int(s["cls"])] == k.split("/")[0] for k, s in found.items())
    manifest, found = packed(tmp_path / "tars", tmp_path / "out")
    assert {k: s["jpg"] for k, s in found.items()} == expected and manifest.classes is None
    manifest, found = packed(tmp_path / "tars", tmp_path / "out2", columns=Columns(label_from_folder=True))
    assert manifest.classes == sorted(inner) and len(found) == 12


def test_wrapping_folders_and_splits_inside_an_archive(tmp_path):
    images = {
        f"set-1/{s}/{c}/{i}.jpg": jpeg(i) for i, (s, c) in enumerate([("train", "a"), ("train", "b"), ("test", "b")])
    }
    (tmp_path / "a.tar").write_bytes(tar_bytes(images))
    manifest, _ = packed(tmp_path / "a.tar", tmp_path / "out")
    assert manifest.classes == ["a", "b"] and {s: manifest.samples(s) for s in manifest.splits} == {
        "train": 2,
        "test": 1,
    }


def test_path_traversal_links_and_odd_names_stay_names(tmp_path):
    names = ["../../escape.jpg", "/abs/olute.jpg", "a/../b.jpg", "new\nline.jpg", "sp ace.jpg", "ünï.jpg", ".dot.jpg"]
    data = tar_bytes({name: jpeg(i) for i, name in enumerate(names)})
    buffer = io.BytesIO(data)
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(buffer.getvalue())
    manifest, found = packed(tmp_path / "in" / "a.tar", tmp_path / "in" / "out")
    assert len(found) == len(names) and {s["jpg"] for s in found.values()} == {jpeg(i) for i in range(len(names))}
    assert all(not k.startswith("/") and ".." not in k for k in found)
    assert manifest.source["ignored"] == {"links and devices in archives": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_an_archive_that_breaks_off_is_one_bad_sample(tmp_path, name):
    data = tar_bytes(two_classes(), "w:gz" if name.endswith("gz") else "w")
    (tmp_path / name).write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(TooManyBad, match=r"cannot be read to its end|archive ends within"):
        packed(tmp_path / name, tmp_path / "out")
    _, found = packed(tmp_path / name, tmp_path / "out", max_bad=2)
    images = {p.removesuffix(".jpg"): d for p, d in two_classes().items()}
    assert 1 < len(found) < 8 and all(images[k] == s["jpg"] for k, s in found.items())


def test_no_archive_at_all(tmp_path):
    for name in ("a.tar", "a.zip", "a.tar.gz", "a.parquet"):
        (tmp_path / name).write_bytes(b"<html>404</html>" * 100)
        with pytest.raises(UserError):
            packed(tmp_path / name, tmp_path / f"out-{name}")


def test_zip_members_that_lie_about_their_size(tmp_path):
    data = bytearray(zip_bytes({"a.jpg": jpeg(0), "b.jpg": b"\0" * 10_000_000}))
    at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)  # the directory entry of b.jpg
    data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(TooManyBad, match="another size than its directory says"):
        packed(tmp_path / "a.zip", tmp_path / "out")


def test_an_archive_that_changes_while_it_is_read(tmp_path, monkeypatch):
    from data_tools import pack

    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_bytes(two_classes()))
    check = pack.check_images

    def then_change(*args):
        os.utime(archive, ns=(0, 1))
        return check(*args)

    monkeypatch.setattr(pack, "check_images", then_change)
    with pytest.raises(UserError, match=r"a.tar was written again while"):
        shard_corpus(ShardOptions(archive, tmp_path / "out", workers=1))
    assert not list((tmp_path / "out").glob("*.tar"))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(tmp_path):
    bomb, harm = pickle.dumps(Bomb(tmp_path / "harm")), tmp_path / "harm"
    array = io.BytesIO()
    np.save(array, np.array([Bomb(harm)], object), allow_pickle=True)
    hostile = {f"b.{s}": bomb for s in ("pyd", "pickle", "pkl", "pth", "cls", "json", "txt", "ten")}
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "a.tar").write_bytes(tar_bytes({"a.jpg": jpeg(0), "b.jpg": jpeg(1), "b.npy": array.getvalue(), **hostile}))
    with suppress(UserError):
        packed(tars / "a.tar", tmp_path / "out")
    for label in ("none", "json:x", "cls"):
        with suppress(UserError):
            index_dataset(IndexOptions(str(tars), label=label, workers=1, max_bad=5))
    verify_dataset(tars)
    (tars / "a.idx.npy").write_bytes(array.getvalue())
    assert any("damaged" in d.what for d in verify_dataset(tars))
    assert not harm.exists()
    pickle.loads(bomb)
    assert harm.exists()  # the bomb works


# --- WebDataset tars ----------------------------------------------------------------------------------------


def test_img2dataset_output(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in range(2):
        members = {}
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            members |= {
                f"{key}.jpg": jpeg(10 * shard + i), f"{key}.txt": f"caption {key}".encode(),
                f"{key}.json": json.dumps({"url": f"http://x/{key}", "status": "success", "key": key}).encode(),
            }  # fmt: skip
        (tmp_path / "in" / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
        (tmp_path / "in" / f"{shard:05d}_stats.json").write_text("{}")
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / "in" / f"{shard:05d}.parquet")
    manifest, found = packed(tmp_path / "in", tmp_path / "out")
    assert manifest.samples("train") == 6 and manifest.classes is None
    sample = found["00001/000010002"]
    assert sample["jpg"] == jpeg(12) and "cls" not in sample
    assert json.loads(sample["json"]) == {
        "url": "http://x/000010002", "status": "success", "key": "000010002", "txt": "caption 000010002"}  # fmt: skip


def test_a_finished_set_is_a_source_with_its_classes_and_splits(tmp_path):
    make_corpus(tmp_path / "in", 30)
    first, samples = packed(tmp_path / "in", tmp_path / "set", max_samples=10, val_fraction=0.3)
    again, copies = packed(tmp_path / "set", tmp_path / "copy")
    assert again.classes == first.classes == ["class0", "class1", "class2"]
    assert {s: again.samples(s) for s in again.splits} == {s: first.samples(s) for s in first.splits}
    assert sorted((s["jpg"], s["cls"]) for s in samples.values()) == sorted(
        (s["jpg"], s["cls"]) for s in copies.values()
    )
    (tmp_path / "set" / "dataset.json").unlink()
    (tmp_path / "set" / "contact-sheet.png").unlink()
    named, _ = packed(tmp_path / "set", tmp_path / "named")
    assert {s: named.samples(s) for s in named.splits} == {s: first.samples(s) for s in first.splits}
    assert named.classes is None


def test_labels_from_json_neighbours(tmp_path):
    members = {}
    for i, tags in enumerate([["red"], ["red", "blue"], []]):
        members |= {f"{i}.jpg": jpeg(i), f"{i}.json": json.dumps({"tags": tags, "video": "v"}).encode()}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    manifest, found = packed(tmp_path / "a.tar", tmp_path / "out", columns=Columns(label="tags"))
    assert manifest.classes == ["blue", "red"]
    assert [json.loads(s["json"])["labels"] for s in found.values()] == [[1], [1, 0], []]
    assert load_index(tmp_path / "out" / "train-000000.idx.npy")["label"].tolist() == [-1] * 3


# --- Parquet ------------------------------------------------------------------------------------------------


def hugging_face(file: Path, n: int, names: list[str] | None, start: int = 0) -> None:
    images = [{"bytes": jpeg(start + i), "path": f"{i}.jpg"} for i in range(n)]
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
            ("id", pa.int32()),
        ],
        metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table([images, [i % 3 for i in range(n)], list(range(n))], schema=schema)
    pq.write_table(table, file, row_group_size=4)


def test_hugging_face_parquet(tmp_path):
    hugging_face(tmp_path / "in/data/train-00000-of-00002.parquet", 9, ["zebra", "ant", "bee"])
    hugging_face(tmp_path / "in/data/train-00001-of-00002.parquet", 5, ["zebra", "ant", "bee"], start=9)
    hugging_face(tmp_path / "in/data/validation-00000-of-00001.parquet", 4, ["zebra", "ant", "bee"], start=14)
    for order in ("auto", "shuffled"):
        manifest, found = packed(tmp_path / "in", tmp_path / f"out-{order}", order=order)
        assert manifest.classes == ["zebra", "ant", "bee"]
        assert (manifest.samples("train"), manifest.samples("val")) == (14, 4)
        assert sorted(s["jpg"] for s in found.values()) == sorted(jpeg(i) for i in range(18))
        sample = next(s for s in found.values() if s["jpg"] == jpeg(10))
        assert (sample["cls"], json.loads(sample["json"])) == (b"1", {"id": 1})


def test_parquet_with_plain_bytes_and_missing_ones(tmp_path):
    table = pa.table({"jpg": [jpeg(0), None, b"", jpeg(1)], "class": ["a", "b", "a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(TooManyBad, match="no image bytes"):
        packed(tmp_path / "a.parquet", tmp_path / "out")
    _, found = packed(tmp_path / "a.parquet", tmp_path / "out", max_bad=2)
    assert {(s["jpg"], s["cls"]) for s in found.values()} == {(jpeg(0), b"0"), (jpeg(1), b"1")}
    with pytest.raises(UserError, match="no such column of bytes"):
        packed(tmp_path / "a.parquet", tmp_path / "x", columns=Columns(image="class"))


def test_parquet_manifest_quick_and_slow_way_agree(tmp_path):
    make_corpus(tmp_path / "in", 12)
    files = sorted((tmp_path / "in").rglob("*.jpg"))
    columns = {
        "path": [str(p.relative_to(tmp_path)) for p in files], "size": [p.stat().st_size for p in files],
        "label": [p.parent.name for p in files], "split": ["val" if i < 3 else "train" for i in range(12)],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "quick.parquet")
    del columns["size"]
    pq.write_table(pa.table({**columns, "note": ["x"] * 12}), tmp_path / "slow.parquet")
    _, quick = packed(tmp_path / "quick.parquet", tmp_path / "out1")
    _, slow = packed(tmp_path / "slow.parquet", tmp_path / "out2")
    assert {k: (s["jpg"], s["cls"]) for k, s in quick.items()} == {k: (s["jpg"], s["cls"]) for k, s in slow.items()}
    assert {s["json"] for s in slow.values()} == {b'{"note":"x"}'} and len(slow) == 12
    rows, _ = list_rows(tmp_path / "quick.parquet")
    assert all(r["mtime_ns"] == 0 and r["size"] for r in rows)


# --- several sources, URLs ----------------------------------------------------------------------------------


def test_several_kinds_of_sources_in_one_set(tmp_path):
    make_corpus(tmp_path / "folder", 6)
    (tmp_path / "more.tar").write_bytes(tar_bytes({"class1/x.jpg": jpeg(90), "zebra/y.jpg": jpeg(91)}))
    (tmp_path / "list.csv").write_text("path,label\nfolder/class0/00000.jpg,class9\n")
    manifest, found = packed([tmp_path / "folder", tmp_path / "more.tar", tmp_path / "list.csv"], tmp_path / "out")
    assert manifest.classes == ["class0", "class1", "class2", "class9", "zebra"] and len(found) == 9
    assert found["more/class1/x"] == {"jpg": jpeg(90), "cls": b"1"}
    assert found["list/folder/class0/00000"] == {"jpg": jpeg(0), "cls": b"3"}


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_everything_can_lie_in_an_object_store(tmp_path, memory):
    images = two_classes()
    for path, data in images.items():
        memory.pipe(f"/bucket/folder/{path}", data)
    memory.pipe("/bucket/a.tar", tar_bytes(images))
    memory.pipe("/bucket/a.zip", zip_bytes(images))
    memory.pipe("/bucket/m.csv", ("path,label\n" + "".join(f"folder/{p},{p[:3]}\n" for p in images)).encode())
    urls = "".join(json.dumps({"url": f"memory://bucket/folder/{p}", "label": p[:3]}) + "\n" for p in images)
    memory.pipe("/bucket/m.jsonl", urls.encode())
    hugging_face(tmp_path / "t.parquet", 8, ["a", "b", "c"])
    memory.pipe("/bucket/hf/train-0.parquet", (tmp_path / "t.parquet").read_bytes())
    expected = sorted(images.values())
    for number, name in enumerate(("folder", "a.tar", "a.zip", "m.csv", "m.jsonl", "hf")):
        manifest, found = packed(f"memory://bucket/{name}", tmp_path / str(number))
        assert sorted(s["jpg"] for s in found.values()) == expected, name
        assert manifest.classes == (["a", "b", "c"] if name == "hf" else ["cat", "dog"])


def test_a_missing_object_is_quarantined(tmp_path, memory):
    memory.pipe("/bucket/a.jpg", jpeg(0))
    memory.pipe("/bucket/m.csv", b"path\na.jpg\ngone.jpg\n")
    with pytest.raises(TooManyBad, match=r"'gone.jpg': unreadable"):
        packed("memory://bucket/m.csv", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        packed("memory://bucket/nothing", tmp_path / "out2")


def refusal(code: str, message: str) -> Exception:
    """As s3fs raises it."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": message}}, "GetObject"))


@pytest.mark.parametrize("dedupe", ["off", "exact"])
@pytest.mark.parametrize(
    "code, message",
    [
        ("ExpiredToken", "The provided token has expired."),
        ("InvalidAccessKeyId", "unknown"),  # other stores word it in their own way
        ("InvalidToken", "The provided token is malformed or otherwise invalid."),
        ("SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided."),
    ],
)
def test_credentials_that_expire_are_no_bad_images(tmp_path, memory, monkeypatch, code, message, dedupe):
    pytest.importorskip("s3fs")
    source = make_corpus(tmp_path / "in", 40)
    for path in source.rglob("*.jpg"):
        memory.pipe(f"/bucket/in/{path.relative_to(source)}", path.read_bytes())
    monkeypatch.setattr(hashing, "BLOCK_ROWS", 5)
    out, read, reads = tmp_path / "out", type(memory).cat_file, []

    def expiring(fs, path, *args, **kw):
        reads.append(path)
        if len(reads) > 20:
            raise refusal(code, message)
        return read(fs, path, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", expiring)
        with pytest.raises(Unfinished, match=r"cannot read memory://.*\nRenew the credentials .* same command again"):
            packed("memory://bucket/in", out, dedupe=dedupe, max_samples=10)
    kept = list(out.glob("plan/work/hashes/hash-*" if dedupe == "exact" else "*.tar"))
    before = {p.name for p in kept}
    assert before
    made = []
    hash_block, pack = hashing.hash_block, engines.run_task
    monkeypatch.setattr(hashing, "hash_block", lambda task: made.append(task.out.name) or hash_block(task))
    monkeypatch.setattr(engines, "run_task", lambda task, *more: made.append(task.name) or pack(task, *more))
    _, found = packed("memory://bucket/in", out, dedupe=dedupe, max_samples=10)
    assert len(found) == 40 and not before & set(made)


def test_one_object_that_may_not_be_read_is_a_bad_image(tmp_path, memory, monkeypatch):
    pytest.importorskip("s3fs")
    for i in range(3):
        memory.pipe(f"/bucket/in/{i}.jpg", jpeg(i))
    read = type(memory).cat_file

    def refusing(fs, path, *args, **kw):
        if path.endswith("1.jpg"):
            raise refusal("AccessDenied", "Access Denied")
        return read(fs, path, *args, **kw)

    monkeypatch.setattr(type(memory), "cat_file", refusing)
    manifest, found = packed("memory://bucket/in", tmp_path / "out", max_bad=1)
    assert len(found) == 2 and manifest.source["quarantined"] == 1


class RefusingHandler(SimpleHTTPRequestHandler):
    """A web server that does not show everything to everybody."""

    def log_message(self, *_):
        pass

    def send_head(self):
        if "secret" in self.path:
            return self.send_error(403)
        return super().send_head()


def test_images_behind_http(tmp_path):
    pytest.importorskip("aiohttp")
    make_corpus(tmp_path / "www", 6)
    handler = partial(RefusingHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        files = sorted(p.relative_to(tmp_path / "www") for p in (tmp_path / "www").rglob("*.jpg"))
        lines = [json.dumps({"url": f"{base}/{p}", "label": p.parent.name}) for p in files]
        lines += [json.dumps({"url": f"{base}/{name}.jpg", "label": "class0"}) for name in ("no", "secret")]
        (tmp_path / "m.jsonl").write_text("\n".join(lines))
        begin = time.monotonic()
        _, found = packed(tmp_path / "m.jsonl", tmp_path / "out", max_bad=2)
        assert time.monotonic() - begin < 9  # neither is asked for again and again
        server.shutdown()
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["unreadable: FileNotFoundError", "unreadable: HTTP status 403"]
    assert sorted(s["jpg"] for s in found.values()) == sorted(jpeg(i) for i in range(6))


class RangeHandler(SimpleHTTPRequestHandler):
    """A web server that gives parts of files, as most do."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if asked is None or not path.is_file():
            return super().do_GET()
        first, last = asked.removeprefix("bytes=").split("-")
        data = path.read_bytes()
        part = data[int(first) : int(last or len(data)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


def test_archives_and_lists_behind_http(tmp_path):
    pytest.importorskip("aiohttp")
    images, www = two_classes(), tmp_path / "www"
    for path, data in images.items():
        (www / path).parent.mkdir(parents=True, exist_ok=True)
        (www / path).write_bytes(data)
    (www / "a.tar").write_bytes(tar_bytes(images))
    (www / "a.zip").write_bytes(zip_bytes(images))
    (www / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(images)))
    (www / "m.csv").write_text("path,label\n" + "".join(f"{p},{p[:3]}\n" for p in images))
    hugging_face(www / "t.parquet", 8, ["a", "b", "c"])
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(www))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("a.tar", "a.zip", "a.tar.gz", "m.csv", "t.parquet"):
            _, found = packed(f"http://127.0.0.1:{server.server_port}/{name}", tmp_path / name)
            assert sorted(s["jpg"] for s in found.values()) == sorted(images.values()), name
        with pytest.raises(UserError, match=r"none\.tar"):
            packed(f"http://127.0.0.1:{server.server_port}/none.tar", tmp_path / "none")
        server.shutdown()


# --- duplicates, previews -----------------------------------------------------------------------------------


def test_duplicates_are_dropped_and_listed(tmp_path):
    source = make_corpus(tmp_path / "in", 20)
    (source / "class2" / "again.jpg").write_bytes(jpeg(0))  # of class0/00000.jpg
    (source / "class2" / "more.jpg").write_bytes(jpeg(0))
    (source / "class1" / "empty.jpg").write_bytes(b"")
    (source / "class1" / "empty2.jpg").write_bytes(b"")
    for order in ("shuffled", "source"):
        out = tmp_path / order
        manifest, found = packed(source, out, dedupe="exact", order=order, max_bad=1)
        assert len(found) == 20 and manifest.source["duplicates"] == 3
        lines = [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()]
        assert lines == [
            {"path": "class1/empty2.jpg", "reason": "duplicate", "of": "class1/empty.jpg"},
            {"path": "class2/again.jpg", "reason": "duplicate", "of": "class0/00000.jpg"},
            {"path": "class2/more.jpg", "reason": "duplicate", "of": "class0/00000.jpg"},
        ]
        assert shard_corpus(ShardOptions(source, out, workers=1, dedupe="exact", order=order, max_bad=1)) == manifest


@pytest.mark.parametrize("unread", [0, 1, 2])
def test_how_many_images_could_not_be_compared_is_said(tmp_path, capsys, unread):
    source, val = make_corpus(tmp_path / "in", 20), make_corpus(tmp_path / "val", 5)
    packed(val, tmp_path / "val-set")
    for i in range(unread):
        (source / "class0" / f"broken{i}.jpg").symlink_to(tmp_path / "nothing")
    for name, options in [("exact", {"dedupe": "exact"}), ("against", {"dedupe_against": (tmp_path / "val-set",)})]:
        manifest, found = packed(source, tmp_path / name, max_bad=unread, **options)
        assert len(found) == (20 if name == "exact" else 15) and manifest.source["quarantined"] == unread
        said = [line for line in capsys.readouterr().err.splitlines() if "not compared" in line]
        assert len(said) == bool(unread) and all(f"not compared: {unread} images" in line for line in said)


def test_killed_hashing_goes_on_with_the_blocks_that_are_missing(tmp_path, monkeypatch):
    source = make_corpus(tmp_path / "in", 40)
    for i in range(7):
        (source / "class1" / f"again{i}.jpg").write_bytes(jpeg(3 * i))
    _, expected = packed(source, tmp_path / "whole", dedupe="exact")
    monkeypatch.setattr(hashing, "BLOCK_ROWS", 5)
    monkeypatch.setattr(settle, "on_processes", lambda _: one_by_one)
    begun = []

    def one_by_one(tasks):
        for task in tasks:
            begun.append(task.out.name)
            if len(begun) in (3, 6):
                raise Killed
            yield hashing.hash_block(task)

    for _ in range(2):
        with pytest.raises(Killed):
            packed(source, tmp_path / "out", dedupe="exact")
    _, found = packed(source, tmp_path / "out", dedupe="exact")
    assert found == expected and len(found) == 40
    assert len(begun) == 10 + 2 and len(set(begun)) == 10  # 47 rows; the two that were killed began twice
    assert not (tmp_path / "out" / "plan" / "work").exists()


class Killed(BaseException):
    """No error that anybody catches."""


def hash_or_die(log: Path, task: hashing.HashTask) -> None:
    """Notes what it begins; its process dies the first time that it comes to the last of eight blocks."""
    with log.open("a") as file:
        file.write(task.out.name + "\n")
    if task.start == 35 and log.read_text().count(task.out.name) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    hashing.hash_block(task)


def test_a_lost_hashing_process_costs_only_what_it_was_at(tmp_path, monkeypatch):
    source, log = make_corpus(tmp_path / "in", 40), tmp_path / "log"
    (source / "class1" / "again.jpg").write_bytes(jpeg(0))
    (source / "class1" / "00001.jpg").unlink()
    monkeypatch.setattr(hashing, "BLOCK_ROWS", 5)
    monkeypatch.setattr(settle, "on_processes", lambda _: partial(map_processes, partial(hash_or_die, log), workers=2))
    with pytest.raises(Unfinished, match=r"a worker process died.*run the same command again"):
        packed(source, tmp_path / "out", dedupe="exact")
    done = sorted(p.name for p in (tmp_path / "out" / "plan" / "work" / "hashes").glob("hash-*"))
    assert done
    _, found = packed(source, tmp_path / "out", dedupe="exact")
    begun = log.read_text().split()
    assert len(found) == 39 and len(set(begun)) == 8 and all(begun.count(name) == 1 for name in done)


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_that_cannot_be_listed_costs_no_hashes(tmp_path, memory, monkeypatch, remote):
    """The listing fails in the middle, then as the hashing of the finished one is to go on."""
    source = make_corpus(tmp_path / "in", 40)
    for path in source.rglob("*.jpg"):
        memory.pipe(f"/bucket/in/{path.relative_to(source)}", path.read_bytes())
    where, work = "memory://bucket/in" if remote else source, tmp_path / "out" / "plan" / "work"
    monkeypatch.setattr(scan, "PART_ROWS", 5)
    monkeypatch.setattr(settle, "on_processes", lambda _: one_by_one)
    begun, left = [], {}  # left: how often a folder can still be listed
    listing, scandir = folder.places.list_folder, os.scandir

    def one_by_one(tasks):
        for task in tasks:
            begun.append(task.out.name)
            if len(begun) == 6:
                raise Killed
            yield hashing.hash_block(task)

    def listed(place, *args):
        name = Path(str(place)).name
        left[name] = left.get(name, 1000) - 1
        if left[name] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return (listing if remote else scandir)(place, *args)

    monkeypatch.setattr(*((folder.places, "list_folder") if remote else (os, "scandir")), listed)
    left["class2"] = 0
    with pytest.raises(Unfinished, match=r"cannot list .*class2.*Input/output error; mend that and run the same"):
        packed(where, tmp_path / "out", dedupe="exact")
    assert (work / "scan" / "scan-00000.json").exists()
    left.clear()
    with pytest.raises(Killed):
        packed(where, tmp_path / "out", dedupe="exact")
    left["in"] = 1  # seen to be a folder, then lost
    with pytest.raises(Unfinished, match="cannot list"):
        packed(where, tmp_path / "out", dedupe="exact")
    left.clear()
    _, found = packed(where, tmp_path / "out", dedupe="exact")
    assert len(found) == 40 and len(begun) == 8 + 1 and len(set(begun)) == 8


def test_samples_of_another_set_are_kept_out(tmp_path, memory):
    packed(make_corpus(tmp_path / "val", 5), tmp_path / "val-set")
    source = make_corpus(tmp_path / "in", 20)  # the first five are the same images
    manifest, found = packed(source, tmp_path / "out", dedupe_against=(tmp_path / "val-set",))
    assert manifest.samples("train") == 15
    assert {s["jpg"] for s in found.values()} == {jpeg(i) for i in range(5, 20)}
    assert (tmp_path / "out" / "duplicates.jsonl").read_text().count("held out") == 5
    with pytest.raises(UserError, match="held_out was"):
        packed(source, tmp_path / "out")
    for path in (tmp_path / "val-set").iterdir():
        if path.is_file():
            memory.pipe(f"/bucket/val/{path.name}", path.read_bytes())
    again = ShardOptions(source, tmp_path / "out", workers=1, dedupe_against=("memory://bucket/val",))
    assert shard_corpus(again) == manifest  # a copy of the set at a URL is the same set
    tar = memory.cat("/bucket/val/train-000000.tar")
    memory.pipe("/bucket/val/train-000000.tar", tar[: len(tar) // 2])
    with pytest.raises(UserError, match=r"memory://bucket/val: train-000000.tar is damaged"):
        shard_corpus(again)
    with pytest.raises(UserError, match=r"no dataset.json"):
        packed(source, tmp_path / "out2", dedupe_against=(tmp_path / "in",))


@pytest.mark.parametrize("converted", [{"resize": 60}, {"encode": "jpeg:80"}])
def test_a_set_whose_bytes_were_made_anew_holds_nothing_out(tmp_path, converted):
    held, source = make_corpus(tmp_path / "val", 5, side=120), make_corpus(tmp_path / "in", 20, side=120)
    val_set = tmp_path / "val-set"
    packed(held, val_set, **converted)
    with pytest.raises(UserError, match=r"val-set: it was packed with --resize or --encode.*\n.*without them"):
        packed(source, tmp_path / "out", dedupe_against=(val_set,))
    raw = json.loads((val_set / "dataset.json").read_text())
    (val_set / "dataset.json").write_text(json.dumps(raw | {"source": {}}))  # one made elsewhere
    assert packed(source, tmp_path / "out", dedupe_against=(val_set,))[0].samples("train") == 20
    packed(held, tmp_path / "plain")
    assert packed(source, tmp_path / "out2", dedupe_against=(tmp_path / "plain",))[0].samples("train") == 15


def test_preview_says_how_long_and_writes_nothing(tmp_path):
    source = make_corpus(tmp_path / "in", 30)
    before = sorted(tmp_path.rglob("*"))
    plan, seconds = preview_corpus(ShardOptions(source, tmp_path / "out", max_samples=10, workers=1))
    assert len(plan.shards) == 3 and 0 < seconds < 60 and sorted(tmp_path.rglob("*")) == before


def test_smaller_images_in_another_encoding(tmp_path):
    source = make_corpus(tmp_path / "in", 6, side=120)
    for encode, suffix in (("jpeg:80", "jpg"), ("webp:70", "webp")):
        out = tmp_path / suffix
        packed(source, out, resize=60, encode=encode)
        rows = load_index(out / "train-000000.idx.npy")
        assert set(rows["height"]) == {60} and set(rows["width"]) == {64} and np.all(rows["size"] < 6000)
        assert all(set(s) == {suffix, "cls"} for s in contents(out).values())
