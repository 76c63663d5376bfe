"""`mixer eval`: tables, pictures and ReaL labels, counted by hand, on shards, folders and imported weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Member, as_before, picture, png, train, write_dataset
from PIL import Image

from data_tools.errors import UserError
from pipeline.cli_eval import run_eval
from pipeline.data.augment import EvalTransform
from pipeline.evaluate import RealLabels
from pipeline.pictures import confusion_picture
from pipeline.weights.importing import import_weights
from pipeline.weights.trained import TrainedModel

COUNT, CLASSES = 23, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    samples = [Member(png(picture(i, 9, 11)), i % CLASSES) for i in range(COUNT)]
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": [samples], "val": [samples[:13], samples[13:]]}, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    assert train(folder, "train.duration=6 steps", f"data.train={data}", "data.val=null", "optimizer.lr=0.1") == 0
    return folder


@pytest.fixture(scope="module")
def guesses(run) -> np.ndarray:
    """The class that the last checkpoint takes each image for, worked out image by image."""
    trained = TrainedModel.open(str(run))
    model = trained.network("cpu").eval()
    model.load_state_dict(dict(trained.tensors()))
    transform = EvalTransform(8, 0.875)
    images = torch.stack([transform(picture(i, 9, 11)) for i in range(COUNT)]).float() / 127.5 - 1
    with torch.no_grad():
        return model(images).argmax(1).numpy()


def evaluated(run: Path, *overrides: str, real: Path | None = None) -> dict:
    with as_before():
        assert run_eval(str(run), "last", False, ["eval.batch_size=5", *overrides], real) == 0
    return json.loads(next((run / "eval").glob("step-*.json")).read_text())


def test_a_set_without_a_val_split(run, tmp_path):
    alone = write_dataset(tmp_path, {"train": [[Member(png(picture(i, 9, 11)), 0) for i in range(5)]]}, CLASSES)
    with pytest.raises(UserError, match=r"no val split.*data\.val="):
        evaluated(run, f"data.train={alone}")


def test_report_table_and_picture(run, guesses, capsys):
    report = evaluated(run)
    truth = np.arange(COUNT) % CLASSES
    assert report["samples"] == COUNT and report["top1"] == pytest.approx((guesses == truth).mean())
    assert report["img_per_s"] > 0 and report["model_img_per_s"] > 0
    with open(run / "eval" / "step-00000006-classes.csv") as f:
        rows = list(csv.DictReader(f))
    assert [r["name"] for r in rows] == [f"class{k}" for k in range(CLASSES)]
    for k, row in enumerate(rows):
        assert int(row["samples"]) == (truth == k).sum()
        assert float(row["top1"]) == pytest.approx((guesses[truth == k] == k).mean(), abs=1e-4)
        wrong = np.bincount(guesses[truth == k], minlength=CLASSES)
        wrong[k] = 0
        if wrong.any():
            assert row["most_often_taken_for"] == f"class{wrong.argmax()}"
    with Image.open(run / "eval" / "step-00000006-confusion.png") as image:
        assert image.width == image.height > 100
    assert "img/s of the model alone" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["list", "object"])
def test_real_labels(run, guesses, tmp_path, form):
    """Every image: nothing is right (it does not count), its own class, or any of two others."""
    labels = [[], [1], [0, 2]] * 8
    names = [f"{i // 13:03d}{i if i < 13 else i - 13:05d}" for i in range(COUNT)]
    path = tmp_path / "real.json"
    if form == "object":
        path.write_text(json.dumps({f"{n}.JPEG": labels[i] for i, n in enumerate(names)}))
        chosen = labels[:COUNT]
    else:  # entry n is of the file whose name ends in n + 1; there is none that ends in 0
        path.write_text(json.dumps([[k % CLASSES] for k in range(200)]))
        with pytest.raises(UserError, match=r"says nothing of 00000000\.png"):
            evaluated(run, real=path)
        return
    report = evaluated(run, real=path)
    counted = [(g in c) for g, c in zip(guesses.tolist(), chosen) if c]
    assert report["real_samples"] == len(counted) and report["real_top1"] == pytest.approx(np.mean(counted))


def test_the_list_of_real_labels_goes_by_the_number_in_the_name():
    real = RealLabels([[5], [6, 7], []])
    assert real.of("ILSVRC2012_val_00000002.JPEG") == [6, 7]
    assert real.of("n01440764/ILSVRC2012_val_00000003.JPEG") == []
    with pytest.raises(UserError, match="says nothing"):
        real.of("ILSVRC2012_val_00000004.JPEG")


def test_a_file_that_is_no_labels_is_refused(tmp_path):
    for content in ("{", "[1, 2]", "[]", '{"a": ["x"]}'):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(UserError, match="no file of labels"):
            RealLabels.load(tmp_path / "real.json")


def test_imported_weights_on_a_folder_of_images(run, guesses, tmp_path):
    import_weights(str(run), tmp_path / "imported")
    for i in range(COUNT):
        path = tmp_path / "images" / f"class{i % CLASSES}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(i, 9, 11)))
    report = evaluated(tmp_path / "imported", f"data.val={tmp_path / 'images'}", "train.precision=fp32")
    assert report["top1"] == pytest.approx((guesses == np.arange(COUNT) % CLASSES).mean())
    with pytest.raises(UserError, match=r"data\.val=FOLDER"):
        evaluated(tmp_path / "imported")
    (tmp_path / "images" / "class9").mkdir()
    with pytest.raises(UserError, match="has 5 classes, the model 4"):
        evaluated(tmp_path / "imported", f"data.val={tmp_path / 'images'}")


@pytest.mark.parametrize("classes", [3, 60])
def test_the_confusion_picture_is_dark_where_many_are(classes):
    counts = np.eye(classes) * 9
    counts[1, 0] = 1
    image = np.asarray(confusion_picture(counts, [f"c{k}" for k in range(classes)]).convert("L")).astype(int)
    cell = max(1, 900 // classes)
    edge = image.shape[0] - cell * classes  # names, where they are written
    corner = image[edge:, edge:][2::cell, 2::cell]  # near the upper left corner of each cell
    assert corner.shape == (classes, classes)
    assert corner[0, 0] < corner[1, 0] < corner[0, 1] == 255
