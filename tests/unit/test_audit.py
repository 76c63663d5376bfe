"""The audit passes honest runs, through crashes and other settings, and finds every planted fault."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import members, shards_of, train, write_dataset
from test_health import poison

from data_tools.errors import UserError
from pipeline.audit import Audit, audit
from pipeline.audit_epochs import EpochReport
from pipeline.cli import run_audit
from pipeline.config import load_config
from pipeline.ledger import LedgerReader, LedgerWriter
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


def counts(report: Audit) -> dict[int, tuple[int, int | None]]:
    """epoch -> (samples, left out) of a run on one set."""
    return {e.epoch: (e.samples, left_out(e)) for e in report.epochs}


def left_out(epoch: EpochReport) -> int | None:
    return None if epoch.left_out is None else len(epoch.left_out)


def test_an_honest_run_passes_across_a_restart(run, capsys):
    report = audited(run)
    assert report.faults == []
    assert (report.steps, report.attempts, report.superseded) == (11, 2, 2)
    assert counts(report) == {0: (64, 11), 1: (64, 11), 2: (48, None)}
    assert run_audit(str(run), []) == 0
    assert "exact" in capsys.readouterr().out
    first = next(row for row in listed(run) if row.get("epoch") == 0)
    assert len(set(first["left_out"])) == 11 and set(first["left_out"]) < set(range(75))


def entries(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """A ledger, one dict a step, superseded ones too."""
    return [
        {
            "step": s.step + i,
            "attempt": s.attempt,
            "epoch": s.epoch,
            "position": s.position + i * s.batch,
            "slots": [s.first, s.last],
            "digest": f"{int(digest):016x}",
            "masked": s.masked.get(s.step + i, []),
        }
        for s in LedgerReader(run / "ledger", rank)
        for i, digest in enumerate(s.digests)
    ]


def rewrite(run: Path, lines: list[dict[str, Any]], old: bool = False, rank: int = 0) -> None:
    """Puts these entries in the place of a rank's ledger; `old`: in the format of version 0.1."""
    folder = run / "ledger"
    for path in folder.glob(f"rank-{rank:05d}.*"):
        path.unlink()
    if old:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"rank-{rank:05d}.jsonl").write_text(text)
        return
    for line in lines:
        first, last = line["slots"]
        writer = LedgerWriter(folder, rank, attempt=line["attempt"], first=first, last=last, batch=16)
        writer.add(line["step"], line["epoch"], line["position"], int(line["digest"], 16), line["masked"])


def listed(run: Path) -> list[dict[str, Any]]:
    """What `mixer audit` writes down."""
    assert run_audit(str(run), []) == 0
    return [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]


def edit(run: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], old: bool = False) -> None:
    rewrite(run, change(entries(run)), old)


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


def a_step_told_twice(lines):
    return [*lines[:3], lines[2], *lines[3:]]


def an_attempt_that_nobody_began(lines):
    return [*lines, {**lines[-1], "attempt": 7, "step": 12}]


def a_lost_end(lines):
    return lines[:-1]


FAULTS = [
    a_lost_line,
    a_doubled_batch,
    an_edited_position,
    wrong_bytes,
    a_rank_that_took_too_little,
    a_step_from_nowhere,
    a_step_told_twice,
    an_attempt_that_nobody_began,
    a_lost_end,
]


@pytest.mark.parametrize("old", [False, True], ids=["segments", "version-0.1"])
def test_both_formats_are_read(run, old):
    edit(run, lambda lines: lines, old)
    report = audited(run)
    assert report.faults == [] and (report.steps, report.superseded) == (11, 2)


@pytest.mark.parametrize("old", [False, True], ids=["segments", "version-0.1"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(run, fault, old):
    edit(run, fault, old)
    assert audited(run).faults
    with pytest.raises(UserError, match="fault"):
        run_audit(str(run), [])


def test_a_loader_that_returns_other_bytes_is_found(tmp_path, shards, monkeypatch):
    """The right ids, but the pixels and the crc32 of another sample."""
    from pipeline.data.source import TarSource

    read = TarSource.read
    monkeypatch.setattr(TarSource, "read", lambda self, i, *how: read(self, (i + (i == 7)) % 75, *how))
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
    assert report.faults == [] and report.masked
    step, slot, sample, why = report.masked[0]
    assert step >= 1 and 0 <= slot < 16 and 30 <= sample < 55 and "crc32" in why
    assert [row["masked"] for row in listed(tmp_path / "run") if "masked" in row] == [m[2] for m in report.masked]


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


# ------------------------------------------------------------------------- mixtures, subsets, changed data


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, shards) -> Path:
    """27 steps of 16 from two sets, 0.7 and 0.3, begun again from step 20 after it had reached 22."""
    root = tmp_path_factory.mktemp("mixture")
    write_dataset(root / "b", {"train": [members(40, first=100)]})
    data = f"data.train=[{{path: {shards}, weight: 0.7}}, {{path: {root / 'b'}, weight: 0.3}}]"
    options = [data, "model.num_classes=3", "checkpoint.every=10 steps", "scheduler.name=constant"]
    assert train(root / "run", *options, "train.duration=22 steps") == 0
    shutil.rmtree(root / "run" / "checkpoints" / "step-00000022")
    assert train(root / "run", *options, "train.duration=27 steps") == 0
    return root / "run"


def test_of_a_mixture_every_set_has_its_own_epochs(mixture, capsys, shards):
    report = audited(mixture)
    assert report.faults == [] and report.steps == 27 and report.superseded == 2
    large = [e for e in report.epochs if e.name == str(shards)]
    small = [e for e in report.epochs if e.name != str(shards)]
    assert sum(e.samples for e in report.epochs) == 27 * 16
    assert sum(e.samples for e in large) == pytest.approx(0.7 * 27 * 16, abs=25)
    # 75 samples in 11 lanes: epochs of 66, the 9 left out are others each time; 40 in 5: of 40
    assert [(e.samples, left_out(e)) for e in large[:-1]] == [(66, 9)] * 4
    assert [(e.samples, left_out(e)) for e in small[:-1]] == [(40, 0)] * 3
    assert large[-1].left_out is None and small[-1].left_out is None
    assert run_audit(str(mixture), []) == 0
    assert f"epoch 0 of {shards}" in capsys.readouterr().out


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_planted_in_a_mixture_are_found(mixture, tmp_path, fault):
    shutil.copytree(mixture, tmp_path / "run")
    edit(tmp_path / "run", fault)
    assert audited(tmp_path / "run").faults


def test_a_mixture_that_reads_the_wrong_set_is_found(tmp_path, shards, monkeypatch):
    """The right ids, but bytes of the other set: joined sources that miscount."""
    from pipeline.data.sets import JoinedSource

    read = JoinedSource.read
    monkeypatch.setattr(JoinedSource, "read", lambda self, i, *how: read(self, i if i != 75 else 3, *how))
    write_dataset(tmp_path / "b", {"train": [members(20, first=100)]})
    data = f"data.train=[{{path: {shards}, weight: 1}}, {{path: {tmp_path / 'b'}, weight: 1}}]"
    assert train(tmp_path / "run", data, *SETTINGS) == 0
    monkeypatch.undo()
    faults = audited(tmp_path / "run").faults
    assert faults and all("or the bytes" in f for f in faults)


def test_a_subset_is_audited_from_the_index_alone(tmp_path, shards):
    settings = [f"data.train={shards}", *SETTINGS, "data.subset=60%"]
    assert train(tmp_path / "run", *settings) == 0
    report = audited(tmp_path / "run")
    assert report.faults == [] and len(report.epochs) >= 4
    assert all(e.left_out is not None and len(e.left_out) < 16 for e in report.epochs[:-1])
    # Were the file that says which samples are chosen wrong, the audit would not follow it
    (path,) = (tmp_path / "run" / "data").glob("*.ids")
    ids = np.fromfile(path, dtype="<u4")
    ids[3] = next(i for i in range(75) if i not in ids)
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    np.sort(ids).tofile(other / "data" / path.name)
    assert train(other, *settings) == 0
    assert audited(other).faults


def test_a_change_of_data_is_followed(tmp_path, shards):
    """One set, then a mixture, then a subset of the first: each is where its attempt says it is."""
    b = write_dataset(tmp_path / "b", {"train": [members(40, first=100)]})
    run = tmp_path / "run"
    common = ["model.num_classes=3", "checkpoint.every=3 steps", "scheduler.name=constant"]
    mixed = f"data.train=[{{path: {shards}, weight: 1}}, {{path: {b}, weight: 1}}]"
    assert train(run, f"data.train={shards}", *common, "train.duration=6 steps") == 0
    assert train(run, mixed, *common, "train.duration=11 steps", allow=["data.train"]) == 0
    subset = [f"data.train={shards}", "data.subset=60%"]
    assert train(run, *subset, *common, "train.duration=15 steps", allow=["data.train"]) == 0
    report = audited(run)
    assert report.faults == [] and report.steps == 15
    assert [(e.name, e.epoch) for e in report.epochs][:2] == [(str(shards), 0), (str(shards), 1)]
    assert sum(e.samples for e in report.epochs if e.name == str(b)) == pytest.approx(40, abs=16)
    edit(run, lambda lines: [line for line in lines if line["step"] != 8])
    assert any("step 8" in fault for fault in audited(run).faults)
    moved = tmp_path / "moved"
    b.rename(moved)
    with pytest.raises(UserError, match="attempt 1 trained on other data"):
        audited(run)


# ------------------------------------------------------------------------------------------- rotated files


def test_rotated_ledgers_are_one(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("pipeline.trainer.LedgerWriter", functools.partial(LedgerWriter, file_bytes=80))
    run = tmp_path / "run"
    assert train(run, f"data.train={shards}", *SETTINGS) == 0
    files = sorted((run / "ledger").iterdir())
    assert len(files) >= 3
    report = audited(run)
    assert report.faults == [] and report.steps == 11
    files[1].rename(run / "elsewhere")
    assert audited(run).faults
    (run / "elsewhere").rename(files[1])
    assert audited(run).faults == []


def test_a_ledger_cut_short_by_a_crash_needs_no_repair(finished, tmp_path, shards):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "FINISHED").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000011")
    (path,) = (run / "ledger").iterdir()
    path.write_bytes(path.read_bytes()[:-21])  # the last digest and some of the one before
    assert train(run, f"data.train={shards}", *SETTINGS) == 0
    report = audited(run)
    assert report.faults == [] and (report.steps, report.attempts) == (11, 3)


def test_another_batch_size_in_mid_run_is_followed(tmp_path, shards):
    run, common = tmp_path / "run", [f"data.train={shards}", "model.num_classes=3", "scheduler.name=constant"]
    assert train(run, *common, "train.duration=6 steps") == 0
    more = [*common, "train.global_batch_size=32", "train.duration=9 steps"]
    assert train(run, *more, allow=["train.global_batch_size"]) == 0
    report = audited(run)
    assert report.faults == [] and report.steps == 9
    assert sum(e.samples for e in report.epochs) == 6 * 16 + 3 * 32


@pytest.mark.parametrize("kind", ["one set", "mixture"])
def test_samples_passed_over_after_sick_steps_are_accounted_for(tmp_path, shards, monkeypatch, kind):
    b = write_dataset(tmp_path / "b", {"train": [members(40, first=100)]})
    mixed = f"[{{path: {shards}, weight: 1}}, {{path: {b}, weight: 1}}]"
    poison({1 + 6, 1 + 7}, monkeypatch)
    data = [f"data.train={shards if kind == 'one set' else mixed}", "health.max_skipped=2"]
    run = tmp_path / "run"
    assert train(run, *SETTINGS[1:], *data, "train.duration=16 steps") == 0
    report = audited(run)
    assert report.faults == [] and report.skipped == 32 and report.steps == 16
    passed = [row["passed_over"] for row in listed(run) if "passed_over" in row]
    assert sum(map(len, passed)) == 32
