"""The few-shot probe: the reference's formula in both branches, its choice of shots, and what a run gets from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_before, picture, png, train

from data_tools.errors import UserError
from pipeline.cli_eval import run_fewshot
from pipeline.data.source import open_source
from pipeline.fewshot import BIAS, L2, FewShot, fit, pick
from pipeline.run import read_lines
from pipeline.weights.trained import TrainedModel


def reference_scores(x: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """Ridge regression as the least squares problem that it is: rows sqrt(l2) I with targets 0 appended."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    z, t = ((np.column_stack([(a - mean) / std, np.full(len(a), 100.0)])) for a in (x, test))
    y = np.column_stack([np.where(labels == k, 1.0, -1.0) for k in range(classes)])
    d = z.shape[1]
    stacked = np.vstack([z, np.sqrt(l2) * np.eye(d)]), np.vstack([y, np.zeros((d, classes))])
    return t @ np.linalg.lstsq(*stacked, rcond=None)[0]


@pytest.mark.parametrize(("n", "d"), [(300, 20), (20, 300), (21, 20), (20, 20)])  # primal and dual
@pytest.mark.parametrize("l2", [1.0, L2])
def test_equals_the_reference_formula_in_both_branches(n, d, l2):
    rng = np.random.default_rng(n + d)
    classes = 7
    labels = rng.permutation(np.arange(n) % classes)
    x = (rng.normal(size=(n, d)) * rng.uniform(0.1, 9, d) + rng.normal(size=d) + np.eye(classes, d)[labels]).astype(
        "f4"
    )
    x[:, 3] = 2.5  # a feature that never changes: 1e-5 keeps it finite
    test = rng.normal(size=(50, d)).astype("f4")
    test[:, 3] = 2.5
    weight, bias = fit(torch.from_numpy(x), torch.from_numpy(labels), classes, l2)
    scores = (torch.from_numpy(test).double() @ weight + bias).numpy()
    np.testing.assert_allclose(scores, reference_scores(x, labels, test, classes, l2), rtol=0, atol=1e-6)


def test_shots_are_the_first_of_one_seeded_permutation_after_another():
    labels = np.random.default_rng(0).integers(0, 4, 100)
    rng = np.random.default_rng(2)
    expected = [rng.permutation(np.where(labels == k)[0])[:5] for k in range(4)]
    assert pick(labels, 5, 2).tolist() == np.concatenate(expected).tolist()
    assert set(pick(labels, 1, 2)) < set(pick(labels, 5, 2))  # fewer shots are among the more
    few = np.array([0, 0, 1])
    assert sorted(pick(few, 10, 0).tolist()) == [0, 1, 2]  # a class may have fewer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fewshot") / "run"
    assert train(folder, "train.duration=20 steps", "data.train=synthetic") == 0
    return folder


def colours(root: Path, split: str, each: int) -> None:
    """Three classes that differ in brightness: even an untrained Mixer's features tell them apart."""
    for k in range(3):
        for i in range(each):
            path = root / split / f"class{k}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png((picture(100 * k + i, 8, 8) // 4 + 80 * k).astype(np.uint8)))


def test_a_run_is_probed_and_the_report_written(run, tmp_path, capsys):
    colours(tmp_path / "set", "train", 6)
    colours(tmp_path / "set", "test", 4)
    with as_before():
        assert run_fewshot(str(run), str(tmp_path / "set"), None, "last", False, [], [1, 5], 3, None, L2) == 0
    report = json.loads((run / "eval" / "fewshot-step-00000020.json").read_text())
    assert report["samples"] == 12 and [r["shots"] for r in report["fewshot"]] == [1, 5]
    assert report["fewshot"][1]["top1"] > 0.9
    assert "5-shot  top-1" in capsys.readouterr().out


def test_accuracy_is_that_of_the_reference_on_the_same_features(run, world):
    """The stream in batches against features and scores written out, for every choice of shots."""
    trained = TrainedModel.open(str(run))
    predictor = trained.load(world)
    train_set, test_set = (open_source("synthetic", s, image_size=8, num_classes=4) for s in ("train", "val"))
    test_set.samples, test_set.shard_sizes = 101, [101]  # type: ignore[attr-defined]
    fewshot = FewShot.of(train_set, test_set, image_size=8, channels=3, pool=200, shots=[3, 10], seeds=[0, 5],
                         batch_size=32)  # fmt: skip
    result = fewshot.run(predictor.features, world)

    def features(samples, ids) -> np.ndarray:
        images = torch.stack([samples.row(0, int(i)).image for i in ids]).float() / 127.5 - 1
        with torch.no_grad():
            return predictor.model.forward_features(images).numpy()

    test_x, test_y = features(fewshot.test, range(101)), test_set.labels()[:101]
    for shots in (3, 10):
        for seed in (0, 5):
            chosen = pick(train_set.labels()[:200], shots, seed)
            scores = reference_scores(features(fewshot.train, chosen), train_set.labels()[chosen], test_x, 4, L2)
            assert result.top1[shots, seed] == pytest.approx((scores.argmax(1) == test_y).mean(), abs=1e-12)
    assert result.samples == 101
    assert result.mean(3) == pytest.approx((result.top1[3, 0] + result.top1[3, 5]) / 2)


def test_testing_on_what_was_fitted_is_refused(run, tmp_path):
    colours(tmp_path / "set", "train", 2)
    with as_before(), pytest.raises(UserError, match="--test"):
        run_fewshot(str(run), str(tmp_path / "set"), None, "last", False, [], [1], 1, None, L2)


def test_the_constant_feature_is_the_originals():
    assert (BIAS, L2) == (100.0, 1024.0)


def test_a_training_can_probe_at_every_evaluation(tmp_path, capsys):
    colours(tmp_path / "set", "train", 4)
    colours(tmp_path / "set", "test", 5)
    few = [f"eval.fewshot={tmp_path / 'set'}", "eval.fewshot_shots=[1,3]", "data.val=synthetic", "eval.batch_size=500"]
    assert train(tmp_path / "run", *few, "train.duration=2 steps", "eval.every=1 steps") == 0
    scores = [m for m in read_lines(tmp_path / "run" / "metrics.jsonl") if m["split"] == "val"]
    assert len(scores) == 2 and all(0 <= m["fewshot_1"] <= 1 and "fewshot_3" in m for m in scores)
    assert "3-shot" in capsys.readouterr().out
    with pytest.raises(UserError, match="no val split"):
        train(tmp_path / "other", few[0], "data.val=none")
