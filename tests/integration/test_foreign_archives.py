"""Archives as others make and damage them: nothing is left out without a word, nothing ends in a traceback."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from corpora import jpeg, run
from source_helpers import list_rows, tar_bytes

from data_tools import reading
from data_tools.engines import ShardOptions, shard_corpus
from data_tools.errors import UserError
from data_tools.finalize import TooManyBad
from data_tools.indexing import IndexOptions, index_dataset
from data_tools.manifest import DatasetManifest
from data_tools.reshard import ReshardOptions, reshard
from data_tools.sources import Columns
from data_tools.verify import verify_dataset


def images(out: Path) -> list[bytes]:
    """The images of all shards, in order."""
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def labelled(n: int) -> dict[str, bytes]:
    members = {}
    for i in range(n):
        members |= {f"{i:04d}.jpg": jpeg(i), f"{i:04d}.cls": b"%d" % (i % 3)}
    return members


def damaged_header(data: bytes, member: int) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[member].offset
    return data[: at + 10] + b"x" * 50 + data[at + 60 :]


def latin(path: Path) -> Path:
    """A tar whose names are not valid UTF-8."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(4):
            info = tarfile.TarInfo(os.fsdecode(b"caf\xe9/%d.jpg" % i))
            info.size = len(jpeg(i))
            tar.addfile(info, io.BytesIO(jpeg(i)))
    return path


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "outer.tar"])
def test_a_damaged_header_in_the_middle_is_not_the_end_of_a_tar(tmp_path, name):
    data = damaged_header(tar_bytes({f"a/{i}.jpg": jpeg(i) for i in range(10)}), 5)
    if name == "a.tar.gz":
        import gzip

        data = gzip.compress(data)
    elif name == "outer.tar":
        data = tar_bytes({"a.tar": data})
    (tmp_path / name).write_bytes(data)
    options = ShardOptions(tmp_path / name, tmp_path / "out", workers=1)
    with pytest.raises(TooManyBad, match="damaged header at byte"):
        shard_corpus(options)
    shard_corpus(ShardOptions(tmp_path / name, tmp_path / "out", workers=1, max_bad=1))
    assert images(tmp_path / "out") == [jpeg(i) for i in range(5)]


def test_a_tar_with_a_damaged_header_is_not_indexed(tmp_path):
    (tmp_path / "a.tar").write_bytes(damaged_header(tar_bytes(labelled(10)), 6))
    with pytest.raises(UserError, match=r"a\.tar cannot be read to its end .*damaged header"):
        index_dataset(IndexOptions(str(tmp_path), workers=1))
    assert not (tmp_path / "dataset.json").exists()


def test_a_shard_whose_header_was_damaged_does_not_verify(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(labelled(10)))
    index_dataset(IndexOptions(str(tmp_path), workers=1))
    (tmp_path / "a.tar").write_bytes(damaged_header((tmp_path / "a.tar").read_bytes(), 6))
    assert any("damaged header" in what for _, _, what in verify_dataset(tmp_path))


def test_neighbours_that_say_nothing(tmp_path):
    """An empty `.cls` is no class of its own, and one that cannot be read costs no other sample its own."""
    members = labelled(12) | {f"{i:04d}.cls": b"%d" % i for i in range(12)} | {"0005.cls": b"\n"}
    members |= {"0006.json": b"[" * 200_000}
    (tmp_path / "a.tar").write_bytes(tar_bytes(dict(sorted(members.items()))))
    manifest = shard_corpus(ShardOptions(tmp_path / "a.tar", tmp_path / "out", workers=1))
    assert manifest.classes is None and manifest.stats["train"]["class_counts"] == [1, 1, 1, 1, 1, 0, *[1] * 6]
    assert manifest.source["ignored"] == {"damaged .json neighbours": 1, "empty .cls neighbours": 1}


def test_a_zip_member_beside_an_image_that_cannot_be_unpacked(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [("a.jpg", jpeg(0)), ("a.cls", b"1"), ("a.txt", b"hello " * 100), ("b.jpg", jpeg(1))]:
            archive.writestr(name, data)
        at = archive.getinfo("a.txt").header_offset
    data = bytearray(buffer.getvalue())
    data[at + 35 : at + 45] = b"\xff" * 10
    (tmp_path / "a.zip").write_bytes(data)
    rows, ignored = list_rows(tmp_path / "a.zip")
    assert [(r["path"], r["label"], r["extra"]) for r in rows] == [(b"a.jpg", "1", None), (b"b.jpg", None, None)]
    assert ignored == {"damaged .txt neighbours": 1}


# --- names --------------------------------------------------------------------------------------------------


def test_a_class_name_in_an_archive_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'caf\\udce9' is not valid UTF-8"):
        shard_corpus(ShardOptions(latin(tmp_path / "a.tar"), tmp_path / "out", workers=1))


def test_tars_with_keys_that_are_not_utf8_are_indexed_shown_and_copied(tmp_path):
    tar = latin(tmp_path / "a.tar")
    assert index_dataset(IndexOptions(str(tmp_path), workers=1)).samples("train") == 4
    assert verify_dataset(tmp_path) == []
    assert r"caf\udce9/0  jpg" in run("data", "inspect", tar)
    reshard(ReshardOptions((str(tmp_path),), str(tmp_path / "copy"), workers=1))
    assert verify_dataset(tmp_path / "copy") == [] and images(tmp_path / "copy") == [jpeg(i) for i in range(4)]


def test_keys_of_an_inventory_are_encoded_in_csv_alone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "i.csv").write_text('"b","a%2Bb+c.jpg","5"\n')
    pq.write_table(pa.table({"bucket": ["b"], "key": ["a+b%20c.jpg"], "size": [5]}), tmp_path / "i.parquet")
    (text,), _ = list_rows(tmp_path / "i.csv", Columns(header=("Bucket", "Key", "Size")))
    (table,), _ = list_rows(tmp_path / "i.parquet")
    assert (text["path"], table["path"]) == (b"s3://b/a+b c.jpg", b"s3://b/a+b%20c.jpg")


def test_an_inventory_of_all_versions_gives_those_that_are_there(tmp_path):
    rows = ["a.jpg,v2,true,false,5", "a.jpg,v1,false,false,4", "b.jpg,v2,true,true,0", "b.jpg,v1,false,false,6"]
    (tmp_path / "i.csv").write_text("".join(f"b,{row}\n" for row in rows))
    header = ("Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size")
    rows, ignored = list_rows(tmp_path / "i.csv", Columns(header=header))
    assert [(r["path"], r["size"]) for r in rows] == [(b"s3://b/a.jpg", 5)]
    assert ignored == {"old versions and delete markers": 3}


# --- reading ------------------------------------------------------------------------------------------------


def test_archives_beside_remote_files_are_read_by_one_thread(tmp_path, monkeypatch):
    """Remote files are read ahead by many threads; a file object has one position."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for i in range(20):
        memory.pipe(f"/bucket/photos/{i:03d}.jpg", jpeg(i))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for i in range(20, 60):
            archive.writestr(f"{i:03d}.jpg", jpeg(i))
    readers, inflate = set(), reading.inflate_member

    def slowly(read, *args):
        import threading
        import time

        readers.add(threading.get_ident())
        time.sleep(0.001)  # between finding the place and reading there
        return inflate(read, *args)

    monkeypatch.setattr(reading, "inflate_member", slowly)
    options = ShardOptions(["memory://bucket/photos", tmp_path / "z.zip"], tmp_path / "out", workers=1)
    assert shard_corpus(options).samples("train") == 60
    assert images(tmp_path / "out") == [jpeg(i) for i in range(60)] and len(readers) == 1
    memory.store.clear()


def test_a_compressed_tar_that_is_made_anew_is_opened_anew(tmp_path):
    for seed in (0, 100):
        (tmp_path / "a.tar.gz").write_bytes(tar_bytes({f"{i}.jpg": jpeg(seed + i) for i in range(4)}, "w:gz"))
        os.utime(tmp_path / "a.tar.gz", ns=(0, 10**9 * (seed + 1)))
        shard_corpus(ShardOptions(tmp_path / "a.tar.gz", tmp_path / "out", workers=1, overwrite=True))
        assert images(tmp_path / "out") == [jpeg(seed + i) for i in range(4)]


def test_equal_keys_are_renamed_apart(tmp_path):
    """Long keys that differ at their end, and a key that one set holds three times."""
    long = "x" * 80
    for name in ("a", "b"):
        members = {f"{long}{i:010d}.jpg": jpeg(i) for i in range(12)}
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            for key, data in [*members.items(), *[(f"same.{s}", jpeg(s_)) for s_, s in enumerate(("jpg", "cls"))][:1]]:
                info = tarfile.TarInfo(key)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for i in (20, 21):  # not neighbours, so they are samples of their own
                for key, data in [(f"between{i}.jpg", jpeg(30 + i)), ("same.jpg", jpeg(i))]:
                    info = tarfile.TarInfo(key)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        index_dataset(IndexOptions(str(tmp_path / name), workers=1))
    sets = (str(tmp_path / "a"), str(tmp_path / "b"))
    reshard(ReshardOptions(sets, str(tmp_path / "out"), workers=1, duplicates="rename"))
    assert verify_dataset(tmp_path / "out") == []
    assert DatasetManifest.load(tmp_path / "out").samples("train") == 2 * 17


def test_several_labels_are_numbered_anew_where_classes_are(tmp_path):
    for name, classes in (("a", ["x", "y"]), ("b", ["z", "x"])):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(ord(name)))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"path": f"{name}.jpg", "labels": classes, "by": "me"}))
        shard_corpus(ShardOptions(tmp_path / f"{name}.jsonl", tmp_path / name, workers=1))
    sets = (str(tmp_path / "a"), str(tmp_path / "b"))
    manifest = reshard(ReshardOptions(sets, str(tmp_path / "out"), workers=1))
    assert manifest.classes == ["x", "y", "z"]
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        found = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
    assert found == [{"labels": [0, 1], "by": "me"}, {"labels": [2, 0], "by": "me"}]
