"""SIGKILL, anywhere and at any time: the run that comes of it is the undisturbed one, bit for bit.

Compared are, for every step, the digest of the samples that reached the model and the loss, and at the end the digest
of all weights, moments and averages.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from mixer_process import (
    STEPS,
    Mixer,
    assert_same_run,
    attempts,
    history,
    poll,
    run_arguments,
    undisturbed_run,
    wait_for_progress,
)

from pipeline.audit import audit
from pipeline.checkpoint.manager import committed_steps, step_folder
from pipeline.config import load_config
from pipeline.run import RunFolder, read_lines


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed_run(tmp_path_factory.getbasetemp(), 2)


def test_killed_rank_launcher_and_agent(tmp_path: Path, undisturbed: Path) -> None:
    """A rank: the launcher starts again by itself. The launcher: nothing is left running. The agent: both."""
    run = tmp_path / "run"
    mixer = Mixer(["launch", "local", *run_arguments(run), "--nproc", "2"], tmp_path)
    wait_for_progress(mixer, run, 0, steps=8)
    os.kill(mixer.rank(1), signal.SIGKILL)
    wait_for_progress(mixer, run, 1)
    assert "a training process died; restarting from step" in mixer.output()
    os.kill(mixer.process.pid, signal.SIGKILL)
    mixer.process.wait()
    assert mixer.all_gone(), mixer.processes()
    assert committed_steps(RunFolder(run).checkpoints)[-1] < STEPS

    mixer = Mixer(["resume", str(run)], tmp_path)
    wait_for_progress(mixer, run, 2)
    os.kill(mixer.agent(), signal.SIGKILL)
    assert mixer.wait() == 0, mixer.output()  # the ranks saved and ended, the launcher then started them again
    assert mixer.all_gone(), mixer.processes()
    assert "Traceback" not in mixer.output()
    assert attempts(run) == 4
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_killed_rank_zero(tmp_path: Path, undisturbed: Path) -> None:
    """The rank that commits checkpoints and holds the run folder's lock."""
    run = tmp_path / "run"
    mixer = Mixer(["launch", "local", *run_arguments(run), "--nproc", "2"], tmp_path)
    wait_for_progress(mixer, run, 0, steps=15)
    os.kill(mixer.rank(0), signal.SIGKILL)
    assert mixer.wait() == 0, mixer.output()
    assert attempts(run) == 2
    assert mixer.all_gone(5), mixer.processes()
    assert_same_run(run, undisturbed)


def rewound(undisturbed: Path, run: Path, step: int) -> Path:
    """A copy of the finished run as it was at its last checkpoint up to `step`; its ledger still tells the rest."""
    shutil.copytree(undisturbed, run)
    folder = RunFolder(run)
    folder.finished.unlink()
    for later in committed_steps(folder.checkpoints):
        if later > step:
            shutil.rmtree(step_folder(folder.checkpoints, later))
    return run


@pytest.mark.parametrize(
    ("strategy", "nproc"),
    [
        ("fsdp", 3),
        pytest.param("zero2", 1, marks=pytest.mark.slow),
        pytest.param("zero3", 3, marks=pytest.mark.slow),
        pytest.param("zero1", 4, marks=pytest.mark.slow),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        pytest.param("zero2", 3, marks=pytest.mark.slow),
    ],
)
def test_another_strategy_and_number_of_ranks(tmp_path: Path, undisturbed: Path, strategy: str, nproc: int) -> None:
    run = rewound(undisturbed, tmp_path / "run", STEPS - 1)
    begin = committed_steps(RunFolder(run).checkpoints)[-1]
    assert 0 < begin < STEPS
    mixer = Mixer(["resume", str(run), f"train.strategy={strategy}", "--nproc", str(nproc)], tmp_path, stretch=0)
    assert mixer.wait() == 0, mixer.output()
    assert f"RESUMED from step {begin}, written by ddp on 2 ranks; now {strategy} on {nproc}" in mixer.output()
    for (step, samples, loss), (_, wanted, reference) in zip(history(run), history(undisturbed), strict=True):
        assert samples == wanted, step
        assert loss == pytest.approx(reference, abs=1e-5), step
    folder = RunFolder(run)
    assert audit(load_config(str(folder.config)).config, folder).faults == []


@pytest.mark.slow
def test_a_layout_that_changes_again_and_again(tmp_path: Path, undisturbed: Path) -> None:
    """ddp on 2, then another layout after each stop, each stop by a signal in the middle."""
    run = tmp_path / "run"
    command = ["launch", "local", *run_arguments(run), "--nproc", "2"]
    for attempt, (strategy, nproc) in enumerate([("zero3", 3), ("fsdp", 2), ("zero1", 3), ("ddp", 1), ("zero2", 2)]):
        mixer = Mixer(command, tmp_path)
        wait_for_progress(mixer, run, attempt, steps=3)
        mixer.process.terminate()
        assert mixer.wait() == 75, mixer.output()
        command = ["resume", str(run), f"train.strategy={strategy}", "--nproc", str(nproc)]
    mixer = Mixer(command, tmp_path)
    assert mixer.wait() == 0, mixer.output()
    for (step, samples, loss), (_, wanted, reference) in zip(history(run), history(undisturbed), strict=True):
        assert samples == wanted, step
        assert loss == pytest.approx(reference, abs=1e-5), step


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_killed_by_the_clock_ten_times(tmp_path: Path, strategy: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All processes killed at once at random times, ten times or more, of which at least three inside a backward pass
    or a checkpoint's write; `probe/sitecustomize.py` tells which."""
    steps, kills, inside = 400, 10, 3
    extra = [f"train.duration={steps} steps", f"train.strategy={strategy}", "checkpoint.every=3 steps"]
    undisturbed = undisturbed_run(tmp_path_factory.getbasetemp(), 2, *extra)
    run, clock = tmp_path / "run", random.Random(3)
    landed: list[str] = []
    command = ["launch", "local", *run_arguments(run, *extra), "--nproc", "2"]
    while len(landed) < kills or sum(bool(set(where) & set("BC")) for where in landed) < inside:
        assert len(landed) < 4 * kills, f"kills landed at {landed}"
        probe = tmp_path / f"probe-{len(landed)}"
        started = attempts(run)
        mixer = Mixer(command, tmp_path, stretch=0.02, probe=probe)
        # Most of a start is imports; the clock begins when training does, so that most kills fall into steps
        assert poll(lambda: attempts(run) > started), mixer.output()  # noqa: B023
        time.sleep(clock.uniform(0, 1.2))
        assert mixer.process.poll() is None, f"it ended before it could be killed:\n{mixer.output()}"
        mixer.kill()
        landed.append(probe.read_bytes().replace(b"\0", b".").decode() if probe.exists() else "")
        command = ["resume", str(run)]
    mixer = Mixer(command, tmp_path, stretch=0)
    assert mixer.wait(600) == 0, mixer.output()
    print(f"{len(landed)} kills, at (two letters a rank; B backward, C checkpoint): {landed}")
    resumes = [e["step"] for e in read_lines(RunFolder(run).events) if e["event"] in ("start", "resume")]
    print(f"began at steps {json.dumps(resumes)}")
    assert_same_run(run, undisturbed, steps)
