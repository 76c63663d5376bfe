"""What a job decides before it starts anything: nothing to do, asked to end, started too often."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.jobs import book
from pipeline.run import RunFolder, read_lines

PLAN = {"max_restarts": 2, "max_requeues": 5, "preflight": True, "requeue": "auto", "chain": 1, "then_eval": False}


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "submission.json").write_text(json.dumps(PLAN))
    book(tmp_path, "submitted", "7", by="user", nodes="2")
    return tmp_path


def start(run: Path) -> tuple[int, str]:
    """Exit code and output of the batch script's command, where there is no srun to start anything with."""
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": "/nowhere"}
    result = subprocess.run(
        [sys.executable, "-m", "launch.slurm_job", "train", str(run)],
        env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def launched(run: Path, step: int) -> None:
    book(run, "started", "7", restart=0, nodes=["n1", "n2"], step=step)
    book(run, "launched", "7", restart=0, attempt=0, step=step)


def test_a_finished_run_never_starts_again(run):
    (run / "FINISHED").write_text("step 9\n")
    assert start(run)[0] == 0
    assert [line["event"] for line in read_lines(run / "jobs.jsonl")] == ["submitted"]


def test_a_run_that_was_asked_to_end_does_not_start(run):
    (run / "STOP").write_text("save\n")
    assert start(run)[0] == 75
    assert [line["event"] for line in read_lines(run / "jobs.jsonl")] == ["submitted"]


def test_starts_without_progress_are_capped(run):
    for _ in range(4):  # one more than the two restarts, and one for a job that was lost while it started
        launched(run, -1)
    code, said = start(run)
    assert code == 1 and "4 starts in a row made no new checkpoint" in said
    assert list(read_lines(run / "jobs.jsonl"))[-1]["why"] == "error"


def test_progress_lifts_the_cap_but_not_the_count(run):
    for step in (-1, -1, -1, -1):
        launched(run, step)
    RunFolder(run).record("save", step=5)
    code, said = start(run)
    assert "no new checkpoint" not in said and code != 0  # it went on to its preflight, and found no srun
    for step in (5, 10):
        launched(run, step)
    RunFolder(run).record("save", step=15)
    assert "started 7 times already" in start(run)[1]  # six here, and the one above


def test_the_user_starts_the_count_anew(run):
    for _ in range(9):
        launched(run, -1)
    book(run, "submitted", "8", by="resume", nodes="2")
    assert "in a row" not in start(run)[1] and "times already" not in start(run)[1]
