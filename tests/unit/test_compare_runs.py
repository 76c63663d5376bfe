"""`mixer compare runs`: what runs logged, undone steps left out of curves and counted in device-hours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import members, shards_of, train, write_dataset
from PIL import Image

from data_tools.errors import UserError
from pipeline.compare.runs import compare_runs, distinct_names, read_history
from pipeline.run import append_line, read_lines, read_metrics

VAL = ["eval.every=4 steps"]


def line(step: int, attempt: int, rate: float, **more: float) -> dict:
    """As the trainer logs a training step, at `rate` images/s a device and a batch of 10."""
    return {"step": step, "attempt": attempt, "split": "train", "loss": 1 / step, "accuracy": 0.5,
            "img_per_s_per_device": rate, "samples_seen": step * 10, **more}  # fmt: skip


def folder(path: Path, events: list[dict], lines: list[dict], *settings: str) -> Path:
    """A run folder with these events and metrics, as an attempt would append them."""
    from pipeline.config import load_config, to_yaml

    base = ["data.train=synthetic", "model.num_classes=4", "train.global_batch_size=10", f"run.dir={path}"]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(load_config("mixer_b16_i1k", [*base, *settings]).config))
    for event in events:
        append_line(path / "events.jsonl", event)
    for row in lines:
        append_line(path / "metrics.jsonl", row)
    return path


def start(attempt: int, step: int, ranks: int, event: str = "resume") -> dict:
    return {"event": event, "attempt": attempt, "step": step, "world_size": ranks}


def test_undone_steps_are_paid_for_and_in_no_curve(tmp_path: Path) -> None:
    """Two ranks get to step 6, of which 5 and 6 are lost; three go on from 4 and roll back once, from 8 to 6."""
    first = [line(s, 0, 10.0, val=s) for s in range(1, 7)]  # 10 images at 10/s: a device-second a step
    second = [line(s, 1, 5.0) for s in range(5, 9)]  # two device-seconds a step
    third = [line(s, 2, 5.0) for s in range(7, 11)]
    evaluated = [
        {"step": s, "attempt": a, "split": "val", "loss": 0.3, "top1": t, "top5": 1.0, "samples_seen": s * 10}
        for s, a, t in [(6, 0, 0.9), (6, 1, 0.4), (8, 1, 0.8), (8, 2, 0.6), (10, 2, 0.5)]
    ]
    run = folder(
        tmp_path / "run",
        [start(0, 0, 2, "start"), start(1, 4, 3), start(2, 6, 3, "rollback")],
        [*first, *second, *third, *evaluated],
    )
    history = read_history(run)
    assert [p.step for p in history.train] == list(range(1, 11))
    hours = [p.device_hours * 3600 for p in history.train]
    # steps 1 to 4 of the first attempt; 5, 6 of the second after 6 device-seconds; the rest after 6 + 8
    assert hours == pytest.approx([1, 2, 3, 4, 8, 10, 16, 18, 20, 22])
    assert history.device_hours * 3600 == pytest.approx(22)
    assert [(p.step, p.values["top1"]) for p in history.val] == [(6, 0.4), (8, 0.6), (10, 0.5)]
    best = history.best()
    assert best and (best.step, best.samples) == (8, 80)
    assert best.device_hours * 3600 == pytest.approx(18)
    assert (history.attempts, history.devices) == (3, [2, 3, 3])


def test_an_evaluation_between_two_log_lines_lies_between_their_hours(tmp_path: Path) -> None:
    lines = [line(4, 0, 10.0), line(8, 0, 10.0)]
    val = {"step": 6, "attempt": 0, "split": "val", "loss": 1.0, "top1": 0.1, "top5": 0.5, "samples_seen": 60}
    history = read_history(folder(tmp_path / "run", [start(0, 0, 1, "start")], [*lines, val]))
    assert history.val[0].device_hours * 3600 == pytest.approx(6)


def test_a_resume_with_another_batch_size_costs_what_it_logged(tmp_path: Path) -> None:
    """Batches of 20 after step 4; a third attempt only evaluates."""
    larger = [line(s, 1, 10.0) | {"samples_seen": 40 + (s - 4) * 20} for s in (5, 6)]
    val = {"step": 6, "attempt": 2, "split": "val", "loss": 1.0, "top1": 0.1, "top5": 0.5, "samples_seen": 80}
    run = folder(
        tmp_path / "run",
        [start(0, 0, 1, "start"), start(1, 4, 4), start(2, 6, 2)],
        [*(line(s, 0, 10.0) for s in range(1, 5)), *larger, val],
        "train.global_batch_size=20",
    )
    history = read_history(run)
    assert [p.device_hours * 3600 for p in history.train] == pytest.approx([1, 2, 3, 4, 6, 8])
    assert [p.samples for p in history.train] == [10, 20, 30, 40, 60, 80]
    assert history.val[0].device_hours * 3600 == pytest.approx(8)
    assert (history.attempts, history.devices) == (3, [1, 4])


def test_two_trainings_are_compared_as_they_logged_themselves(tmp_path: Path) -> None:
    shards = {"train": shards_of(members(48, 4), [24, 24]), "val": shards_of(members(12, 4, 100), [12])}
    data = write_dataset(tmp_path / "data", shards, classes=4)
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for run, rate in zip(runs, ("0.01", "0.001")):
        sets = [f"data.train={data}", "data.val=null", f"optimizer.lr={rate}", *VAL]
        assert train(run, *sets) == 0
    table = compare_runs([str(r) for r in runs], tmp_path / "out")
    assert (tmp_path / "out" / "runs.md").read_text() == table + "\n"
    facts = json.loads((tmp_path / "out" / "runs.json").read_text())
    for run, fact, row in zip(runs, facts, table.splitlines()[2:]):
        logged = read_metrics(run)
        evaluated = [x for x in read_lines(run / "metrics.jsonl") if x["split"] == "val"]
        name, model, samples, hours, loss, val_loss, top1, best, *_ = (c.strip() for c in row.strip("|").split("|"))
        assert (name, model, samples) == (f"{run.parent.name}/run", "mixer_s16 P=4 C=16 L=2 D_S=8 D_C=32", "128")
        assert (loss, val_loss) == (f"{logged[-1]['loss']:.4f}", f"{evaluated[-1]['loss']:.4f}")
        assert top1 == f"{evaluated[-1]['top1']:.2%}"
        assert best == f"{max(x['top1'] for x in evaluated):.2%}"
        assert fact["last"]["samples_seen"] == logged[-1]["samples_seen"] == 128
        spent = sum(16 / x["img_per_s_per_device"] for x in logged) / 3600
        assert fact["device_hours"] == pytest.approx(spent)
        assert float(hours) == pytest.approx(spent, rel=1e-3)
    with Image.open(tmp_path / "out" / "runs.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_losses_of_different_kinds_are_said_to_be(tmp_path: Path) -> None:
    rows = [line(s, 0, 10.0) for s in (1, 2)]
    kinds = {"a": "sigmoid_xent", "b": "softmax_xent"}
    for name, kind in kinds.items():
        folder(tmp_path / name, [start(0, 0, 1, "start")], rows, f"loss.name={kind}")
    table = compare_runs([str(tmp_path / n) for n in kinds], tmp_path / "out")
    assert "not comparable: a sigmoid_xent, b softmax_xent" in table
    assert "a (unfinished)" in table


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a run folder: no such folder"):
        compare_runs(["nowhere"], tmp_path)
    folder(tmp_path / "new", [], [])
    with pytest.raises(UserError, match="has logged nothing yet"):
        compare_runs([str(tmp_path / "new")], tmp_path)
    with pytest.raises(UserError, match="the same run twice"):
        distinct_names([tmp_path / "new", f"{tmp_path}/new/"])
    assert distinct_names(["/r/a/run", "/r/b/run"]) == ["a/run", "b/run"]
