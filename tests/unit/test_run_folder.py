"""The run folder: logs that survive a crash, lines that a later attempt supersedes, and one training at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import script, train

from data_tools.errors import UserError
from pipeline.run import RunFolder, append_line, live_lines, read_digests, read_lines, read_metrics


def test_lines_are_read_back(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    assert list(read_lines(path)) == []
    lines = [{"step": i, "text": "é\n"} for i in range(3)]
    for line in lines:
        append_line(path, line)
    assert list(read_lines(path)) == lines


def test_a_line_cut_short_is_left_out_and_harms_no_other(tmp_path):
    """A full disk or a power cut leaves half a line; what is appended afterwards must not become part of it."""
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    with open(path, "a") as f:
        f.write('{"step": 2, "att')
    append_line(path, {"step": 3})
    append_line(path, {"step": 4})
    assert list(read_lines(path)) == [{"step": 1}, {"step": 3}, {"step": 4}]


def test_live_lines_leave_out_what_a_later_attempt_made_void(tmp_path):
    run = RunFolder(tmp_path)
    for attempt, step in enumerate([0, 4, 5, 2]):
        run.record("resume" if attempt else "start", attempt=attempt, step=step)
    lines = [
        {"step": s, "attempt": a}
        for a, steps in [(0, range(1, 8)), (1, range(5, 7)), (2, range(6, 10)), (3, range(3, 5))]
        for s in steps
    ]
    # attempt 3 went back to step 2 and has reached 4: what was beyond is void although nobody has repeated it yet
    assert [(x["step"], x["attempt"]) for x in live_lines(tmp_path, lines)] == [(1, 0), (2, 0), (3, 3), (4, 3)]


def test_metrics_are_those_of_training(tmp_path):
    run = RunFolder(tmp_path)
    for split, step in [("train", 1), ("val", 1), ("train", 2)]:
        append_line(run.metrics, {"step": step, "attempt": 0, "split": split})
    assert [x["step"] for x in read_metrics(tmp_path)] == [1, 2]


def test_digests_of_all_ranks_add_up(tmp_path):
    run = RunFolder(tmp_path)

    def line(rank: int, step: int, attempt: int, digest: int) -> None:
        append_line(
            run.ledger / f"rank-{rank:05d}.jsonl",
            {"step": step, "attempt": attempt, "epoch": 0, "position": 4 * step, "digest": f"{digest:016x}"},
        )

    line(0, 1, 0, 2**64 - 1)
    line(1, 1, 0, 5)
    line(0, 2, 0, 7)  # a crash before rank 1 wrote its own
    line(0, 2, 1, 8)
    line(1, 2, 1, 1)
    line(2, 2, 1, 1)
    assert read_digests(tmp_path) == {1: (0, 4, f"{4:016x}"), 2: (0, 8, f"{10:016x}")}


def test_status_is_replaced_whole(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_status() == {}
    for step in range(3):
        run.write_status(state="training", step=step)
        assert run.read_status()["step"] == step
    assert [p.name for p in tmp_path.iterdir()] == ["STATUS.json"]
    run.status.write_text('{"st')
    assert run.read_status() == {}


def test_attempts_are_counted_by_their_starts(tmp_path):
    run = RunFolder(tmp_path)
    for event, attempts in [("start", 0), ("save", 1), ("signal", 1), ("resume", 1), ("finish", 2)]:
        assert run.next_attempt() == attempts
        run.record(event, step=1)
    assert [e["event"] for e in read_lines(run.events)][-1] == "finish"


def test_describe_writes_down_what_runs(tmp_path):
    run = RunFolder(tmp_path)
    run.describe("a: 1\n")
    run.describe("a: 2\n")
    assert run.config.read_text() == "a: 2\n"
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "env.json").read_text())["packages"]["torch"]


# -------------------------------------------------------------------------------------------------- the lock

# Holds the lock as a training does, beside a worker process that it forked and that outlives it
HOLD = """
import time
from pipeline.run import RunFolder
run = RunFolder(sys.argv[1])
run.lock()
if os.fork() == 0:
    time.sleep(3)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_the_lock_holds_while_a_process_lives_and_no_longer(tmp_path):
    process = subprocess.Popen(script(HOLD, tmp_path), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    try:
        with pytest.raises(UserError, match=rf"another training.*pid {process.pid} on .*another run.dir"):
            RunFolder(tmp_path).lock()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # A data worker that lives a moment longer than its killed parent must not keep a restart out
    started = time.monotonic()
    RunFolder(tmp_path).lock()
    assert time.monotonic() - started < 2


def test_a_relative_path_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder("runs/a")
    run.record("start")
    assert (Path(tmp_path) / "runs" / "a" / "events.jsonl").exists()


@pytest.mark.parametrize("number, code", [(errno.ESTALE, 74), (errno.EIO, 74), (errno.EACCES, 1), (errno.EROFS, 1)])
def test_a_launcher_may_try_again_where_the_run_folder_did_not_answer(tmp_path, monkeypatch, number, code):
    """Exit code 1 says that no restart can help."""

    def take_over(*_: object) -> None:
        raise OSError(number, os.strerror(number), "runs/a")

    monkeypatch.setattr("pipeline.cli.take_over_run", take_over)
    with pytest.raises(UserError, match=os.strerror(number)) as e:
        train(tmp_path / "run")
    assert e.value.exit_code == code
