"""A rank that is lost without a word, as a node out of reach is, while the others wait for data or for a save.

Both waits may rightly take minutes, and are not to be taken for a hang; nor is a lost rank for a slow one.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from mixer_process import (
    Mixer,
    assert_same_run,
    attempts,
    current_step,
    poll,
    run_arguments,
    undisturbed_run,
    wait_for_progress,
)

from pipeline.logs import StartLogs
from pipeline.pulse import read_pulse
from pipeline.run import RunFolder, read_lines

pytestmark = pytest.mark.slow

# The 5 min of data.read_timeout would be added to what is waited for a rank that reads; and twice that for a save
SETTINGS = ("health.timeout=4 s", "data.read_timeout=5 min")


def start(run: Path, *extra: str, stretch: float) -> Mixer:
    arguments = run_arguments(run, *SETTINGS, *extra)
    return Mixer(["launch", "local", *arguments, "--nproc", "2"], run.parent, stretch=stretch)


def assert_goes_on_without(rank: int, mixer: Mixer, run: Path) -> None:
    """The others notice that the rank is frozen, and start again."""
    frozen = mixer.rank(rank)
    os.kill(frozen, signal.SIGSTOP)
    assert poll(lambda: "no step for" in mixer.output(), 60), mixer.output()
    os.kill(frozen, signal.SIGKILL)  # torchrun would give it half a minute to answer
    assert poll(lambda: attempts(run) == 2, 60), mixer.output()


def test_while_others_wait_for_its_data(tmp_path, tmp_path_factory):
    undisturbed = undisturbed_run(tmp_path_factory.getbasetemp(), 2)
    run = tmp_path / "run"
    mixer = start(run, stretch=0.03)
    wait_for_progress(mixer, run, 0)
    os.kill(mixer.worker(1), signal.SIGSTOP)
    step = current_step(run)

    def stands() -> bool:
        nonlocal step
        before, step = step, current_step(run)
        time.sleep(2)
        return before == step

    assert poll(stands)
    time.sleep(7)  # slow data is no hang
    assert attempts(run) == 1 and "no step for" not in mixer.output()
    beat = read_pulse(StartLogs(RunFolder(run).path / "logs" / "local.0").pulse(0))
    assert beat and time.time() - beat.since > 8, "whoever looks at the run sees that it stands"
    assert_goes_on_without(1, mixer, run)
    assert mixer.wait(120) == 0, mixer.output()
    assert_same_run(run, undisturbed)
    assert mixer.all_gone(5), mixer.processes()


def test_a_stop_is_heard_while_ranks_wait_for_data(tmp_path, tmp_path_factory):
    undisturbed = undisturbed_run(tmp_path_factory.getbasetemp(), 2)
    run = tmp_path / "run"
    mixer = start(run, "health.timeout=60 s", stretch=0.03)  # ending a stopped worker takes 5 s
    wait_for_progress(mixer, run, 0)
    os.kill(mixer.worker(1), signal.SIGSTOP)
    time.sleep(3)  # what was read ahead is used up
    RunFolder(run).stop.write_text("save\n")
    assert mixer.wait(60) == 75, mixer.output()
    assert "no step for" not in mixer.output()
    again = Mixer(["resume", str(run)], tmp_path)
    assert again.wait(120) == 0, again.output()
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("background", ["true", "false"])
def test_while_others_wait_for_its_save(tmp_path, background):
    """Backward passes, writes and commits take 3 s each: a save is longer than health.timeout, and yet no hang."""
    run, probe = tmp_path / "run", tmp_path / "probe"
    settings = (
        "checkpoint.every=1 steps",
        "train.duration=3 steps",
        "scheduler.warmup=0 steps",
        "train.micro_batch_size=7",
    )
    mixer = start(run, *settings, f"checkpoint.background={background}", stretch=3)

    def saving() -> bool:
        beat = read_pulse(StartLogs(RunFolder(run).path / "logs" / "local.0").pulse(0))
        writes = probe.exists() and probe.read_bytes()[3:4] == b"C"  # rank 1
        return bool(writes and beat and beat.state == "saving")

    assert poll(saving), mixer.output()
    assert_goes_on_without(1, mixer, run)
    assert mixer.wait(180) == 0, mixer.output()
    assert attempts(run) == 2
    assert min(e["seconds"] for e in read_lines(RunFolder(run).events) if e["event"] == "save") > 4
