"""Tools on finished sets: index of foreign tars, reshard, stats, inspect, verify."""

import io
import json
import os
import resource
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import jpeg, make_corpus, run, set_files

from data_tools.engines import ShardOptions, shard_corpus
from data_tools.errors import UserError
from data_tools.finalize import TooManyBad
from data_tools.indexing import IndexOptions, index_dataset
from data_tools.manifest import DatasetManifest, load_index
from data_tools.reshard import ReshardOptions, reshard
from data_tools.verify import verify_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    make_corpus(folder / "in", 60)
    shard_corpus(ShardOptions(folder / "in", folder / "out", val_fraction=0.2, max_samples=10, workers=1))
    return folder / "out"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1.5  # a fractional time needs PAX headers
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def foreign(tmp_path) -> Path:
    """What others write: PAX headers, the label before the image, extra members, odd order, a sample without image."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number, name in enumerate(("train_0.tar", "train_1.tar", "val_0.tar")):
        with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
            for i in range(6):
                seed, key = number * 10 + i, f"dir/{'long' * 30 if i == 3 else 'n'}{number}{i}"
                add(tar, f"{key}.json", json.dumps({"caption": "a", "class": "b" if i % 2 else "a"}).encode())
                add(tar, f"{key}.cls", b"%d" % (i % 3))
                if i != 4:
                    add(tar, f"{key}.JPG", jpeg(seed))
                add(tar, f"{key}.txt", b"text")
    return folder


def samples(out: Path) -> dict[bytes, tuple[str, int]]:
    """Every image of a set -> (split, label), by its index and its bytes."""
    manifest, found = DatasetManifest.load(out), {}
    for split, shards in manifest.splits.items():
        for shard in shards:
            data = (out / shard.name).read_bytes()
            for row in load_index(out / shard.index_name):
                found[data[row["offset"] : row["offset"] + row["size"]]] = (split, int(row["label"]))
    return found


# --- index --------------------------------------------------------------------------------------------------


def test_index_in_place(foreign):
    before = {p.name: p.read_bytes() for p in foreign.glob("*.tar")}
    manifest = index_dataset(IndexOptions(str(foreign), workers=1))
    assert (manifest.samples("train"), manifest.samples("val")) == (10, 5)
    assert manifest.source["ignored"] == {"samples without an image": 3}
    found = samples(foreign)
    assert {d: lab for d, (_, lab) in found.items()} == {
        jpeg(n * 10 + i): i % 3 for n in range(3) for i in (0, 1, 2, 3, 5)
    }
    assert {p.name: p.read_bytes() for p in foreign.glob("*.tar")} == before
    assert verify_dataset(foreign, workers=1) == []


def test_index_reads_only_new_tars_again(foreign):
    index_dataset(IndexOptions(str(foreign), workers=1))
    first = {p.name: p.stat().st_mtime_ns for p in foreign.glob("*.npy")}
    with tarfile.open(foreign / "train_2.tar", "w") as tar:
        add(tar, "x.jpg", jpeg(77))
    manifest = index_dataset(IndexOptions(str(foreign), workers=2))
    assert manifest.samples("train") == 11 and verify_dataset(foreign, workers=1) == []
    assert {n: (foreign / n).stat().st_mtime_ns for n in first} == first


def test_index_of_a_read_only_folder_elsewhere(foreign, tmp_path):
    listing = sorted(os.listdir(foreign))
    out = tmp_path / "idx"
    manifest = index_dataset(IndexOptions(str(foreign), out, label="json:class", classes=("a", "b"), workers=1))
    assert sorted(os.listdir(foreign)) == listing and (out / "train_0.tar").is_symlink()
    assert {d: lab for d, (_, lab) in samples(out).items()}[jpeg(11)] == 1 and manifest.classes == ["a", "b"]
    assert verify_dataset(out, workers=1) == []


def test_index_bad_images_and_labels(foreign):
    with tarfile.open(foreign / "bad.tar", "w") as tar:
        add(tar, "good.jpg", jpeg(50))
        add(tar, "broken.jpg", b"no image")
        add(tar, "named.jpg", jpeg(51))
        add(tar, "named.cls", b"cat")
    with pytest.raises(TooManyBad, match="2 of 18 images are bad"):
        index_dataset(IndexOptions(str(foreign), workers=1))
    assert not (foreign / "dataset.json").exists()
    manifest = index_dataset(IndexOptions(str(foreign), workers=1, max_bad=2, split="test"))
    assert manifest.samples("test") == 16
    reasons = [json.loads(line)["reason"] for line in (foreign / "quarantine.jsonl").read_text().splitlines()]
    assert "not an image" in reasons[0] and "'cat'" in reasons[1]
    assert verify_dataset(foreign, workers=1) == []


def test_index_refusals(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.tar\.gz: unpack"):
        index_dataset(IndexOptions(str(tmp_path)))
    (tmp_path / "a.tar").write_bytes(b"junk" * 500)
    with pytest.raises(UserError, match=r"a\.tar cannot be read to its end"):
        index_dataset(IndexOptions(str(tmp_path), workers=1))


def test_index_mends_a_damaged_index(dataset, tmp_path):
    import shutil

    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / "val-000000.idx.npy").write_bytes(b"junk")
    index_dataset(IndexOptions(str(copy), workers=1))
    assert verify_dataset(copy, workers=1) == [] and samples(copy) == samples(dataset)
    assert DatasetManifest.load(copy).classes == DatasetManifest.load(dataset).classes


# --- reshard ------------------------------------------------------------------------------------------------


def options(*sources: Path, out: Path, **kw) -> ReshardOptions:
    return ReshardOptions(tuple(map(str, sources)), str(out), workers=1, **kw)


def test_reshard_keeps_samples_splits_and_order(dataset, tmp_path):
    manifest = reshard(options(dataset, out=tmp_path / "out", max_samples=17))
    assert [s.samples for s in manifest.splits["train"]][:2] == [17, 17]
    assert samples(tmp_path / "out") == samples(dataset)
    assert list(samples(tmp_path / "out")) == list(samples(dataset))
    assert verify_dataset(tmp_path / "out", workers=1) == []
    reshard(options(tmp_path / "out", out=tmp_path / "other", max_samples=4))
    back = reshard(options(tmp_path / "other", out=tmp_path / "back", max_samples=17))
    assert back.splits == manifest.splits  # byte for byte


def test_reshard_same_bytes_for_any_number_of_workers_and_after_a_restart(dataset, tmp_path):
    wanted = options(dataset, out=tmp_path / "one", max_samples=7, order="shuffled", seed=3)
    reshard(wanted)
    reshard(replace(wanted, out=str(tmp_path / "two"), workers=2))
    assert set_files(tmp_path / "one") == set_files(tmp_path / "two")
    assert list(samples(tmp_path / "one")) != list(samples(dataset)) and samples(tmp_path / "one") == samples(dataset)
    before = set_files(tmp_path / "one")
    (tmp_path / "one" / "train-000002.tar").unlink()
    (tmp_path / "one" / "dataset.json").unlink()
    kept = (tmp_path / "one" / "train-000000.tar").stat().st_mtime_ns
    reshard(wanted)
    assert set_files(tmp_path / "one") == before
    assert (tmp_path / "one" / "train-000000.tar").stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="another reshard"):
        reshard(replace(wanted, seed=4))


def test_reshard_foreign_tars(foreign, tmp_path):
    index_dataset(IndexOptions(str(foreign), workers=1))
    reshard(options(foreign, out=tmp_path / "out", order="shuffled"))
    assert samples(tmp_path / "out") == samples(foreign)
    assert verify_dataset(tmp_path / "out", workers=1) == []
    import webdataset

    read = list(webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False))
    assert len(read) == 10 and all({"jpg", "json", "cls", "txt"} <= s.keys() for s in read)
    assert all(len(s["__key__"]) <= 90 for s in read)


def test_merge_with_other_classes_filters_and_subsets(dataset, tmp_path):
    for i in range(9):
        path = tmp_path / "in" / ("class2" if i % 2 else "new") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(100 + i, side=24 + 8 * (i % 3)))
    shard_corpus(ShardOptions(tmp_path / "in", tmp_path / "b", workers=1))
    merged = reshard(options(dataset, tmp_path / "b", out=tmp_path / "m"))
    assert merged.classes == ["class0", "class1", "class2", "new"]
    assert samples(tmp_path / "m")[jpeg(100)] == ("train", 3)
    assert samples(tmp_path / "m")[jpeg(101, 32)] == ("train", 2)
    assert len(samples(tmp_path / "m")) == 69 and verify_dataset(tmp_path / "m", workers=1) == []

    few = reshard(options(tmp_path / "m", out=tmp_path / "f", classes=("new", "class1"), splits=("train",)))
    assert few.classes == ["new", "class1"] and {lab for _, lab in samples(tmp_path / "f").values()} == {0, 1}
    large = reshard(options(tmp_path / "b", out=tmp_path / "l", min_side=32))
    assert large.stats["train"]["height"][0] == 32
    with pytest.raises(UserError, match="no set has a class 'dog'"):
        reshard(options(dataset, out=tmp_path / "x", classes=("dog",)))

    thirds = [set(samples(_subset(dataset, tmp_path, f))) for f in (0.1, 0.3, 0.9)]
    assert thirds[0] <= thirds[1] <= thirds[2] and 0 < len(thirds[1]) < len(thirds[2]) < 60
    again = reshard(options(dataset, out=tmp_path / "v", val_fraction=0.5))
    assert 15 < again.samples("val") < 45


def _subset(dataset: Path, tmp_path: Path, fraction: float) -> Path:
    out = tmp_path / f"s{fraction}"
    reshard(options(dataset, out=out, subset=fraction))
    return out


def test_equal_keys(dataset, tmp_path):
    with pytest.raises(UserError, match="60 keys occur more than once"):
        reshard(options(dataset, dataset, out=tmp_path / "e"))
    assert sum(map(len, [samples(_twice(dataset, tmp_path, "drop"))])) == 60
    renamed = DatasetManifest.load(_twice(dataset, tmp_path, "rename"))
    assert renamed.samples("train") + renamed.samples("val") == 120
    assert verify_dataset(tmp_path / "rename", workers=1) == []


def _twice(dataset: Path, tmp_path: Path, what: str) -> Path:
    reshard(options(dataset, dataset, out=tmp_path / what, duplicates=what))
    return tmp_path / what


def test_a_damaged_source_is_not_copied(dataset, tmp_path):
    import shutil

    copy = shutil.copytree(dataset, tmp_path / "copy")
    row = load_index(copy / "train-000000.idx.npy")[2]
    data = bytearray((copy / "train-000000.tar").read_bytes())
    data[int(row["offset"]) + 100] ^= 1
    (copy / "train-000000.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"train-000000\.tar row 2: crc32"):
        reshard(options(copy, out=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.tar"))


# --- verify, stats, inspect ---------------------------------------------------------------------------------


def test_verify_finds_what_is_too_much_and_twice(dataset, tmp_path):
    import shutil

    copy = shutil.copytree(dataset, tmp_path / "copy")
    (copy / "stray.tar").write_bytes(b"")
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["splits"]["val"].append(manifest["splits"]["train"][0])
    (copy / "dataset.json").write_text(json.dumps(manifest))
    found = {d.what for d in verify_dataset(copy, decode=False, workers=1)}
    assert {"is not in the manifest", "the manifest lists a shard twice"} <= found
    assert any("split val" in what for what in found) and any("key" in what for what in found)


def test_commands(dataset, tmp_path):
    said = run("data", "stats", dataset)
    assert "train: " in said and "images a class" in said and "mean 0." in said
    numbers = json.loads(run("data", "stats", dataset, "--json"))
    assert len(numbers["splits"]["train"]["std"]) == 3
    tar = dataset / "train-000000.tar"
    key = run("data", "inspect", tar, "--limit", 1).split()[0]
    assert "label" in run("data", "inspect", tar, key, "--save", tmp_path / "saved")
    assert sorted(p.suffix for p in (tmp_path / "saved").iterdir()) == [".cls", ".jpg"]
    assert "holds no sample 'nobody'" in run("data", "inspect", tar, "nobody", code=1)
    assert "finished" in run("data", "reshard", dataset, tmp_path / "out", "--subset", "50%")
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"")
    run("data", "verify", tmp_path / "out", "--report", tmp_path / "damage.jsonl", code=1)
    assert json.loads((tmp_path / "damage.jsonl").read_text().splitlines()[0])["shard"] == "train-000000.tar"


def test_a_contact_sheet_is_drawn(dataset):
    from PIL import Image

    with Image.open(dataset / "contact-sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 500


def test_a_full_disk_ends_a_reshard_with_a_message(dataset, tmp_path):
    def limit() -> None:  # no file may grow beyond this: writing fails within a tar
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    error = run("data", "reshard", dataset, tmp_path / "out", code=1, preexec_fn=limit)
    assert "run the same command to go on" in error and "Traceback" not in error
    assert not list((tmp_path / "out").glob("train*.tar")) and not list((tmp_path / "out").glob(".*"))
    run("data", "reshard", dataset, tmp_path / "out")
    assert samples(tmp_path / "out") == samples(dataset)


def test_an_index_elsewhere_is_no_source_and_no_place_to_index(dataset, tmp_path):
    (tmp_path / "tars.url").write_text("s3://public/laion\n")
    with pytest.raises(UserError, match=r"index of the tars at s3://public/laion: give those"):
        shard_corpus(ShardOptions(tmp_path, tmp_path / "out", workers=1))
    with pytest.raises(UserError, match="is the index of s3://public/laion: give that, with --out"):
        index_dataset(IndexOptions(str(tmp_path), workers=1))


def test_a_class_list_that_is_missing_or_says_a_name_twice(foreign, tmp_path):
    (tmp_path / "names").write_text("a\na\n")
    for file, message in ((tmp_path / "names", "already on line 1"), (tmp_path / "none", "No such file")):
        error = run("data", "index", foreign, "--classes", file, code=1)
        assert message in error and "Traceback" not in error


def test_lists_of_keys(dataset, tmp_path):
    (tmp_path / "keys").write_text("class0/00000\nclass1/00001\nclass2/00002\nno/such\n")
    (tmp_path / "drop").write_text("class1/00001\n")
    run("data", "reshard", dataset, tmp_path / "kept", "--keys", tmp_path / "keys", "--drop-keys", tmp_path / "drop")
    assert set(samples(tmp_path / "kept")) == {jpeg(0), jpeg(2)}
    run("data", "reshard", dataset, tmp_path / "rest", "--drop-keys", tmp_path / "keys")
    assert set(samples(tmp_path / "rest")) == {jpeg(i) for i in range(3, 60)}
    assert "none: [Errno 2]" in run("data", "reshard", dataset, tmp_path / "x", "--keys", tmp_path / "none", code=1)
