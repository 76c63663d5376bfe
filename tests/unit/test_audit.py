"""The audit passes honest runs, through crashes and other settings, and finds every planted fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import members, shards_of, train, write_dataset

from data_tools.errors import UserError
from pipeline.audit import Audit, audit
from pipeline.cli import run_audit
from pipeline.config import load_config
from pipeline.run import RunFolder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit") / "shards"
    return write_dataset(folder, {"train": shards_of(members(75), [30, 25, 20])})


SETTINGS = ("train.duration=11 steps", "checkpoint.every=3 steps", "model.num_classes=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards) -> Path:
    """11 steps of 16 over 75 samples (4 steps an epoch), begun again from step 6 after it had reached 8."""
    run = tmp_path_factory.mktemp("audited") / "run"
    assert train(run, f"data.train={shards}", *SETTINGS, "train.duration=8 steps") == 0
    shutil.rmtree(run / "checkpoints" / "step-00000008")  # as if the machine had died before it was written
    assert train(run, f"data.train={shards}", *SETTINGS) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def audited(run: Path, *overrides: str) -> Audit:
    return audit(load_config(str(run / "config.yaml"), [f"run.dir={run}", *overrides]).config, RunFolder(run))


def test_an_honest_run_passes_across_a_restart(run, capsys):
    report = audited(run)
    assert report.faults == []
    assert (report.steps, report.attempts, report.superseded) == (11, 2, 2)
    assert report.epochs == {0: 64, 1: 64, 2: 48}
    assert report.left_out == {0: 11, 1: 11}
    assert run_audit(str(run), []) == 0
    assert "exact" in capsys.readouterr().out


def edit(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = run / "ledger" / "rank-00000.jsonl"
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def last(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    return [line for line in lines if line["step"] == step][-1]


def a_lost_line(lines):
    return [line for line in lines if line["step"] != 5]


def a_doubled_batch(lines):
    last(lines, 4).update({k: last(lines, 3)[k] for k in ("epoch", "position", "digest")})
    return lines


def an_edited_position(lines):
    last(lines, 5)["position"] += 16
    return lines


def wrong_bytes(lines):
    last(lines, 9)["digest"] = "0" * 16
    return lines


def a_rank_that_took_too_little(lines):
    last(lines, 9)["slots"] = [0, 15]
    return lines


def a_step_from_nowhere(lines):
    return [*lines, {**lines[-1], "step": 40}]


@pytest.mark.parametrize(
    "fault",
    [a_lost_line, a_doubled_batch, an_edited_position, wrong_bytes, a_rank_that_took_too_little, a_step_from_nowhere],
)
def test_planted_faults_are_found(run, fault):
    edit(run, fault)
    assert audited(run).faults
    with pytest.raises(UserError, match="fault"):
        run_audit(str(run), [])


def test_a_loader_that_returns_other_bytes_is_found(tmp_path, shards, monkeypatch):
    """The right ids, but the pixels and the crc32 of another sample."""
    from pipeline.data.source import TarSource

    read = TarSource.read
    monkeypatch.setattr(TarSource, "read", lambda self, i, channels: read(self, (i + (i == 7)) % 75, channels))
    assert train(tmp_path / "run", f"data.train={shards}", *SETTINGS) == 0
    monkeypatch.undo()
    faults = audited(tmp_path / "run").faults
    assert 1 <= len(faults) <= 3 and all("or the bytes" in f for f in faults)


def test_bad_samples_are_masked_and_said(tmp_path, shards):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 255  # inside the first image of the second shard
    tar.write_bytes(data)
    assert train(tmp_path / "run", f"data.train={copy}", *SETTINGS, "data.max_bad_fraction=0.5") == 0
    report = audited(tmp_path / "run")
    assert report.faults == [] and report.masked >= 1


def test_other_data_is_refused(run, tmp_path):
    other = write_dataset(tmp_path / "other", {"train": shards_of(members(75, first=3), [30, 25, 20])})
    with pytest.raises(UserError, match="other data"):
        audited(run, f"data.train={other}")


def test_a_start_of_a_release_that_recorded_less_is_said(run):
    path = run / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        event.pop("order", None)
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
    with pytest.raises(UserError, match="cannot be audited"):
        audited(run)
