"""What the options of `mixer shard` make of a corpus: groups, conversions that fail, the accounts at the end."""

import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import jpeg, make_corpus, run
from PIL import Image

from data_tools.engines import ShardOptions, plan_into, shard_corpus
from data_tools.errors import UserError
from data_tools.finalize import TooManyBad
from data_tools.manifest import DatasetManifest, load_index
from data_tools.sources import Columns
from data_tools.verify import verify_dataset


def records(out: Path) -> dict[str, list[dict]]:
    """The `.json` members of each split."""
    found: dict[str, list[dict]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            texts = [tar.extractfile(m).read() for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
        found.setdefault(path.name.partition("-")[0], []).extend(map(json.loads, texts))
    return found


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_group_never_straddles_splits_whatever_lists_it(tmp_path, form):
    make_corpus(tmp_path / "in", 60)
    rows = [{"path": f"in/class{i % 3}/{i:05d}.jpg", "patient": f"p{i % 20}"} for i in range(60)]
    file = tmp_path / f"list.{form}"
    if form == "csv":
        file.write_text("path,patient\n" + "".join(f"{r['path']},{r['patient']}\n" for r in rows))
    elif form == "jsonl":
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    run("shard", file, tmp_path / "out", "--group-by", "patient", "--val-fraction", "0.3", "--workers", 1)
    patients = {split: [r["patient"] for r in found] for split, found in records(tmp_path / "out").items()}
    assert len(patients["train"]) + len(patients["val"]) == 60 and len(patients["val"]) >= 9
    assert not set(patients["train"]) & set(patients["val"])


def test_groups_that_nothing_names(tmp_path):
    source = make_corpus(tmp_path / "in", 3)
    (tmp_path / "list.csv").write_text("path,patient\nin/class0/00000.jpg,\n")
    for place, column, message in [
        (source, "patient", "an image folder has none"),
        (tmp_path / "list.csv", "product", "has no column 'product'"),
        (tmp_path / "list.csv", "patient", "line 2: empty patient"),
    ]:
        with pytest.raises(UserError, match=message):
            shard_corpus(ShardOptions(place, tmp_path / "out", group_by=column))


def test_the_image_column_that_is_asked_for(tmp_path):
    table = pa.table({"thumb": [jpeg(0, 8)] * 3, "photo": [jpeg(i) for i in range(3)], "cls": [0, 1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    shard_corpus(ShardOptions(tmp_path / "a.parquet", tmp_path / "out", columns=Columns(image="photo"), workers=1))
    assert set(load_index(tmp_path / "out" / "train-000000.idx.npy")["height"]) == {24}
    with pytest.raises(UserError, match="--image-column cls: no such column of bytes"):
        shard_corpus(ShardOptions(tmp_path / "a.parquet", tmp_path / "no", columns=Columns(image="cls"), workers=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_cannot_be_converted_are_quarantined(tmp_path, workers):
    source = make_corpus(tmp_path / "in", 12, classes=1, side=60)
    folder = source / "class0"
    Image.new("RGB", (20_000, 30), "red").save(folder / "wide.png")
    Image.fromarray(np.zeros((50, 50), np.float32)).save(folder / "float.tif")
    (folder / "cut.jpg").write_bytes(jpeg(0, 60)[:1500])
    options = ShardOptions(source, tmp_path / "out", resize=30, encode="webp:80", max_samples=5, workers=workers)
    with pytest.raises(TooManyBad, match="3 of 15 images are bad"):
        shard_corpus(options)
    manifest = shard_corpus(replace(options, max_bad=3))
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {os.path.basename(b["path"]): b["reason"] for b in listed}
    assert reasons.keys() == {"wide.png", "float.tif", "cut.jpg"}
    assert reasons["wide.png"] == "20000 x 30 pixels, webp takes 16383 a side at most"
    assert reasons["float.tif"].startswith("floating-point pixels") and reasons["cut.jpg"].startswith("damaged")
    assert manifest.samples("train") == 12 and verify_dataset(tmp_path / "out") == []


def test_accounts_that_do_not_add_up_are_no_finished_set(tmp_path):
    """planned = written + quarantined + duplicates, for every shard and in all."""
    source, out = make_corpus(tmp_path / "in", 12), tmp_path / "out"
    options = ShardOptions(source, out, max_samples=5, workers=1)
    shard_corpus(options)
    (out / "dataset.json").unlink()
    marker = out / "plan" / "train-000001.done.json"
    said = json.loads(marker.read_text())
    marker.write_text(json.dumps({**said, "samples": said["samples"] - 1}))
    with pytest.raises(UserError, match=r"train-000001.tar: 4 samples were planned, 3 written and 0 quarantined"):
        shard_corpus(options)
    marker.write_text(json.dumps(said))
    header = out / "plan" / "plan.json"
    plan = json.loads(header.read_text())
    header.write_text(json.dumps({**plan, "corpus": {**plan["corpus"], "listed": 13}}))
    error = run("shard", "--finalize", out, code=1)
    assert "13 samples are in the corpus, 12 in shards and 0 are duplicates" in error
    assert not (out / "dataset.json").exists()
    header.write_text(json.dumps(plan))
    assert shard_corpus(options) == DatasetManifest.load(out)


def test_a_plan_alone_writes_no_shard(tmp_path):
    plan = plan_into(ShardOptions(make_corpus(tmp_path / "in", 12), tmp_path / "out", max_samples=5))
    assert len(plan.shards) == 3 and not list((tmp_path / "out").glob("*.tar"))
