"""Sick steps are skipped and, in a row, undone; a hang ends the process with the stacks on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import script, train

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose
from pipeline.health import EXIT_HUNG, SickSteps
from pipeline.ledger import LedgerReader
from pipeline.parallel.world import World
from pipeline.run import read_digests, read_lines, read_metrics
from pipeline.trainer import Trainer


def poison(bad: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of given backward passes (counted from 1, the warm-up is the first) not a number."""
    import pipeline.build as build

    original = build.make_loss

    def make_loss(*args):
        loss_fn, seen = original(*args), 0

        def loss(logits, target):
            nonlocal seen
            seen += logits.requires_grad
            return loss_fn(logits, target) * (float("nan") if logits.requires_grad and seen in bad else 1.0)

        return loss

    monkeypatch.setattr(build, "make_loss", make_loss)


# DeepSpeed keeps the groups of the first training in a process, so each of its trainings here gets its own
ONE_TRAINING = """
import pytest
from pathlib import Path
from helpers import script, train
from test_health import poison
with pytest.MonkeyPatch.context() as patch:
    poison({int(n) for n in sys.argv[2].split(",") if n}, patch)
    sys.exit(train(Path(sys.argv[1]), *sys.argv[3:]))
"""


def train_apart(run: Path, bad: str, *settings: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = script(ONE_TRAINING, run, bad, *settings)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fsdp", "zero2", "zero3"))]
)
def test_a_sick_step_changes_nothing(tmp_path, strategy):
    """Steps 1 to 3, the last one sick: weights, moments and the count of updates are those of 2 steps."""
    settings = (f"train.strategy={strategy}", "checkpoint.every=1 steps", "scheduler.name=constant")
    train_apart(tmp_path / "two", "", *settings, "train.duration=2 steps")
    train_apart(tmp_path / "sick", "4", *settings, "train.duration=4 steps", "checkpoint.keep_last=9")
    two, sick = (CheckpointReader(choose(tmp_path / r / "checkpoints", "step-2")) for r in ("two", "sick"))
    assert two.digest() == sick.digest()
    events = [e for e in read_lines(tmp_path / "sick" / "events.jsonl") if e["event"] == "sick"]
    assert [e["step"] for e in events] == [3]
    last = CheckpointReader(choose(tmp_path / "sick" / "checkpoints", "last"))
    assert last.state()["step"] == 4 and last.state()["optimizer_step"] == 3
    # a sick step is not saved: nobody should resume into one
    assert not (tmp_path / "sick" / "checkpoints" / "step-00000003").exists()


def test_sick_steps_in_a_row_are_undone_and_their_samples_passed_over(tmp_path, monkeypatch):
    poison({1 + 6, 1 + 7}, monkeypatch)
    run = tmp_path / "run"
    assert train(run, "train.duration=10 steps", "health.max_skipped=2", "checkpoint.every=4 steps") == 0
    [rollback] = [e for e in read_lines(run / "events.jsonl") if e["event"] == "rollback"]
    assert rollback["step"] == 4 and rollback["sick"] == [6, 7]
    positions = [position for _, position, _ in read_digests(run).values()]
    # 16 a step: steps 1 to 5 as ever, then the two bad positions are left out
    assert positions == [0, 16, 32, 48, 64, 112, 128, 144, 160, 176]
    assert len(read_metrics(run)) == 10
    # and so it stays after another start
    assert train(run, "train.duration=12 steps", "health.max_skipped=2", "checkpoint.every=4 steps") == 0
    assert [p for _, p, _ in read_digests(run).values()] == [*positions, 192, 208]


def test_after_a_rollback_the_new_weights_are_evaluated(tmp_path, monkeypatch):
    poison({1 + 6, 1 + 7}, monkeypatch)
    run = tmp_path / "run"
    settings = ("health.max_skipped=2", "checkpoint.every=4 steps", "data.val=synthetic", "eval.batch_size=500")
    assert train(run, "train.duration=8 steps", *settings, "eval.every=2 steps") == 0
    events = list(read_lines(run / "events.jsonl"))
    assert [e["step"] for e in events if e["event"] == "rollback"] == [4]
    assert [e["step"] for e in events if e["event"] == "eval"] == [2, 4, 6, 6, 8]


def test_a_rollback_keeps_what_the_ledger_could_not_take(tmp_path, monkeypatch):
    """The ledger's folder is out of the way from step 5 until after the rollback, as on a full disk."""
    poison({1 + 6, 1 + 7}, monkeypatch)
    run = tmp_path / "run"
    ledger, aside = run / "ledger", run / "aside"
    complete, roll_back = Trainer._complete_step, Trainer._roll_back

    def complete_step(self, batches):
        if self.step == 4 and not aside.exists():
            ledger.rename(aside)
            ledger.write_text("in the way")
        complete(self, batches)

    def roll_back_and_mend(self):
        roll_back(self)
        ledger.unlink()
        aside.rename(ledger)
        monkeypatch.setattr(Trainer, "_complete_step", complete)

    monkeypatch.setattr(Trainer, "_complete_step", complete_step)
    monkeypatch.setattr(Trainer, "_roll_back", roll_back_and_mend)
    assert train(run, "train.duration=8 steps", "health.max_skipped=2", "checkpoint.every=4 steps") == 0
    steps = [(s.attempt, step) for s in LedgerReader(ledger, 0) for step in range(s.step, s.end)]
    assert steps == [(0, s) for s in range(1, 8)] + [(1, s) for s in range(5, 9)]


def test_a_second_rollback_remembers_what_the_first_one_passed_over(tmp_path, monkeypatch):
    poison({1 + 6, 1 + 7, 1 + 10, 1 + 11}, monkeypatch)  # steps 6 and 7; after the rollback to 4: steps 7 and 8
    run = tmp_path / "run"
    assert train(run, "train.duration=10 steps", "health.max_skipped=2", "checkpoint.every=4 steps") == 0
    assert [e["step"] for e in read_lines(run / "events.jsonl") if e["event"] == "rollback"] == [4, 4]
    positions = [position for _, position, _ in read_digests(run).values()]
    assert positions == [0, 16, 32, 48, 64, 112, 160, 176, 192, 208]


def test_a_run_that_is_always_sick_ends_with_a_message(tmp_path, monkeypatch):
    poison(set(range(1 + 6, 100)), monkeypatch)
    with pytest.raises(UserError, match="it is not the samples"):
        train(tmp_path / "run", "train.duration=40 steps", "health.max_skipped=2", "checkpoint.every=4 steps")


def test_without_a_checkpoint_the_run_ends_with_a_message(tmp_path, monkeypatch):
    poison({1 + 1, 1 + 2}, monkeypatch)
    with pytest.raises(UserError, match="no checkpoint to go back to"):
        train(tmp_path / "run", "health.max_skipped=2", "checkpoint.every=100 steps")


def test_a_loss_spike_counts_only_when_asked_for(world):
    def sick(factor: float | None) -> list[int]:
        steps = SickSteps(max_in_a_row=5, spike_factor=factor)
        for step, loss in enumerate([2.0, 2.1, 1.9, 30.0, 2.0], start=1):
            steps.add(step, torch.tensor(8 * loss), torch.tensor(8.0), torch.tensor(1.0))
        return [step for step, _ in steps.look(world)]

    assert sick(None) == []
    assert sick(3.0) == [4]


def test_a_hang_leaves_the_stacks_and_a_retryable_code(tmp_path: Path):
    log = tmp_path / "logs" / "stacks.txt"
    code = f"""
import time
from pathlib import Path
from pipeline.health import Watchdog
Watchdog(0.4, Path({str(log)!r}))
def where_it_hangs():
    time.sleep(60)
where_it_hangs()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_HUNG
    assert "where_it_hangs" in log.read_text()
    assert "health.timeout" in done.stdout


@pytest.mark.parametrize("disk", ["full", "stale"])
def test_a_hang_ends_the_process_also_where_nothing_can_be_written(tmp_path: Path, disk: str):
    log = Path("/dev/full") if disk == "full" else tmp_path / "pipe"  # a pipe that nobody reads blocks open()
    if disk == "stale":
        os.mkfifo(log)
    code = f"""
import time
from pathlib import Path
from pipeline import health
health._LAST_WORDS_SECONDS = 1.0
def on_hang(error):
    raise OSError("nor can this")
health.Watchdog(0.4, Path({str(log)!r}), on_hang=on_hang)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_HUNG
    assert ("could not be written" in done.stdout) == (disk == "full")


# A training whose first save takes longer than a step may
SLOW_SAVE = """
import time
from pathlib import Path
from helpers import train
from pipeline.checkpoint.manager import CheckpointManager
original = CheckpointManager.save
def save(self, step, **rest):
    time.sleep(7.0 if step == 1 else 0.0)
    original(self, step, **rest)
CheckpointManager.save = save
sys.exit(train(Path(sys.argv[1]), "checkpoint.every=1 steps", "health.timeout=4 s", "train.duration=3 steps"))
"""


@pytest.mark.slow
def test_a_slow_save_is_no_hang(tmp_path):
    done = subprocess.run(script(SLOW_SAVE, tmp_path / "run"), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e["step"] for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == "save"] == [1, 2, 3]


def test_collectives_wait_longer_than_the_watchdogs(tmp_path, monkeypatch):
    class Joined(Exception):
        pass

    def join(timeout_s: float = 0.0) -> World:
        raise Joined(timeout_s)

    monkeypatch.setattr(World, "join", join)
    with pytest.raises(Joined) as e:
        train(tmp_path / "run", "health.timeout=40 min", "data.read_timeout=10 min")
    # the rank that others wait for may be in a read, and two steps apart
    assert e.value.args[0] > (40 + 2 * 10 + 1) * 60


def test_a_start_that_fails_says_why(tmp_path, monkeypatch):
    def fail(self: Trainer) -> None:
        raise ValueError("the cause")

    monkeypatch.setattr(Trainer, "_start", fail)
    with pytest.raises(ValueError, match="the cause"):
        train(tmp_path / "run")
