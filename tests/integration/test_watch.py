"""status, logs, why and stop as their users meet them: real runs, frozen, killed and stopped from another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mixer_process import (
    MIXER,
    Mixer,
    assert_same_run,
    attempts,
    current_step,
    poll,
    run_arguments,
    undisturbed_run,
    wait_for_progress,
)

from data_tools.errors import UserError
from pipeline.checkpoint.manager import committed_steps
from pipeline.run import RunFolder, read_lines

LONG = 200  # steps: what is done to the run takes its time on a busy machine


def mixer(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run([*MIXER, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def view(run: Path, *more: str) -> dict[str, Any]:
    return json.loads(mixer("status", run, "--json", *more))[0]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mixer]]:
    """Starts a run of two ranks; nothing of it is left after a test that failed."""
    started = []

    def begin(run: Path, *more: str, **environment: str) -> Mixer:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        command = ["launch", "local", *run_arguments(run, *more), "--nproc", "2"]
        started.append(Mixer(command, run.parent, stretch=0.15))
        return started[-1]

    yield begin
    for mixer in started:
        mixer.kill()


Start = Callable[..., Mixer]


@pytest.mark.slow
def test_a_run_is_watched_frozen_killed_stopped_and_resumed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, start: Start
) -> None:
    long = f"train.duration={LONG} steps"
    undisturbed = undisturbed_run(tmp_path_factory.getbasetemp(), 2, long)
    run = tmp_path / "run"
    training = start(run, long)
    wait_for_progress(training, run, 0, steps=8)
    seen = view(run)
    assert seen["state"] == "TRAINING" and 0 < seen["step"] <= LONG == seen["total_steps"]
    assert (seen["world_size"], seen["strategy"], seen["restarts"]) == (2, "ddp", 0)
    assert seen["loss"] > 0 and seen["img_per_s"] > 0 and seen["eta_s"] is not None and len(seen["nodes"]) == 1
    assert seen["checkpoint"] in (6, 12, 18) and seen["checkpoint_age_s"] >= 0

    # Frozen: rank 0 waits in a collective, its own pulse goes on
    frozen = training.rank(1)
    os.kill(frozen, signal.SIGSTOP)

    def stalled() -> dict[str, Any] | None:
        seen = view(run, "--stalled-after", "3")
        return seen["slowest"] if seen["state"] == "STALLED" else None

    assert poll(lambda: stalled() is not None)
    slowest = stalled()
    assert slowest and slowest["rank"] == 1
    assert "gives no sign of life" in slowest["why"]
    refused = mixer("train", *run_arguments(run), code=UserError.exit_code)  # beside it: what is shown is not that one
    assert "another training writes into this run folder" in refused
    assert view(run)["start"] == seen["start"] == "local.0"
    os.kill(frozen, signal.SIGCONT)
    stood = view(run)["step"]
    assert poll(lambda: view(run)["step"] > stood and view(run)["state"] == "TRAINING")

    # Killed: it starts again by itself, and says whose fault it was
    os.kill(frozen, signal.SIGKILL)
    wait_for_progress(training, run, 1, steps=2)
    assert "killed by SIGKILL" in training.output()
    told = mixer("why", run)
    assert "start local.0: rank 1 on " in told and "killed by SIGKILL" in told
    assert view(run)["restarts"] == 1

    # Asked to stop from here
    said = mixer("stop", run)
    assert training.wait() == 75, training.output()
    step = current_step(run)[1]
    assert f"STOPPED at step {step}" in said and view(run)["state"] == "STOPPED"
    assert committed_steps(RunFolder(run).checkpoints)[-1] == step < LONG
    assert [e["name"] for e in read_lines(RunFolder(run).events) if e["event"] == "signal"] == ["mixer stop"]
    assert "nothing to stop" in mixer("stop", run)

    assert "finished" in mixer("resume", run)
    assert view(run)["state"] == "FINISHED"
    assert_same_run(run, undisturbed, LONG)
    ranks = [mixer("logs", run, "--start", "local.0", "--rank", str(r), "-n", "0") for r in (0, 1)]
    assert "step   6/200" in ranks[0] and "rank 1 of 2" in ranks[1] and "step   6/" not in ranks[1]
    table = mixer("status", tmp_path)
    assert "FINISHED" in table and f"{LONG}/{LONG}" in table


@pytest.mark.slow
def test_stop_now_ends_a_hanging_run_and_nothing_starts_again(tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    training = start(run)
    wait_for_progress(training, run, 0, steps=8)
    os.kill(training.rank(1), signal.SIGSTOP)
    saved = committed_steps(RunFolder(run).checkpoints)[-1]
    assert "STOPPED" in mixer("stop", run, "--now")
    assert training.wait(60) == 75, training.output()
    assert attempts(run) == 1 and committed_steps(RunFolder(run).checkpoints)[-1] == saved
    told = mixer("why", run)
    assert "STOPPED" in told and "first failure" not in told
    assert training.all_gone()


@pytest.mark.slow
def test_stop_now_reaches_ranks_that_cannot_be_killed_from_here(tmp_path: Path, start: Start) -> None:
    """As from another machine: the file alone, which the pulses look at."""
    run = tmp_path / "run"
    training = start(run)
    wait_for_progress(training, run, 0, steps=2)
    (run / "STOP").write_text("now\n")
    assert training.wait(60) == 75, training.output()
    assert "ends at once, as `mixer stop --now` asked" in training.output()


@pytest.mark.slow
def test_stop_and_resume_without_a_launcher(tmp_path: Path) -> None:
    """One process; the wish to stop of the day before does not stop the next start."""
    run = tmp_path / "run"
    training = Mixer(["train", *run_arguments(run)], tmp_path, stretch=0.05)
    try:
        wait_for_progress(training, run, 0, steps=2)
        assert "STOPPED" in mixer("stop", run)
        assert training.wait() == 75 and (run / "STOP").exists()
    finally:
        training.kill()
    assert "finished" in mixer("resume", run)
    assert view(run)["state"] == "FINISHED" and not (run / "STOP").exists()


def test_why_names_the_first_failure_with_its_traceback(tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    training = start(run, "launch.max_restarts=0", MIXER_TEST_RAISE="1:12")
    wait_for_progress(training, run, 0, steps=2)
    follower = subprocess.Popen(
        [*MIXER, "logs", str(run), "--rank", "1", "--follow"], stdout=subprocess.PIPE, text=True
    )
    assert training.wait() == UserError.exit_code, training.output()
    assert "rank 1 on " in training.output() and f"`mixer why {run}`" in training.output()
    followed, _ = follower.communicate(timeout=60)
    assert "ZeroDivisionError: a test asked for it" in followed
    told = mixer("why", run)
    assert "FAILED" in told and "start local.0: rank 1 on " in told
    assert "ZeroDivisionError: a test asked for it" in told and "in _forward_backward" in told
    assert "1 other ranks only noticed that it was gone" in told
    record = json.loads((run / "logs" / "local.0" / "error-rank-1.json").read_text())
    assert (record["rank"], record["exception"], record["exit_code"]) == (1, "ZeroDivisionError", 70)
    assert view(run)["state"] == "FAILED"


def test_a_user_error_is_told_once(tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    training = start(run, f"data.train={tmp_path / 'nowhere'}")
    assert training.wait() == UserError.exit_code
    assert training.output().count("error:") == 1, training.output()
    told = mixer("why", run)
    assert "FAILED" in told and "nowhere" in told and "Traceback" not in told


def test_what_is_no_run_and_no_rank(tmp_path: Path) -> None:
    for command in ("status", "why", "stop", "logs"):
        assert "is not a run folder" in mixer(command, tmp_path / "x", code=UserError.exit_code)
    (tmp_path / "run" / "logs" / "local.0").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "local.0" / "rank-0.log").write_text("hello\n")
    assert mixer("logs", tmp_path / "run") == "hello\n"
    text = mixer("logs", tmp_path / "run", "--rank", "7", code=UserError.exit_code)
    assert "has no log of rank 7; ranks there: 0 to 0" in text
    assert "there are: local.0" in mixer("logs", tmp_path / "run", "--start", "9.9", code=UserError.exit_code)


def test_answers_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs" / "local.0").mkdir(parents=True)
    for command in (["status"], ["why"], ["logs"]):
        code = (
            f"import sys; sys.argv = ['mixer', *{command!r}, {str(tmp_path / 'run')!r}]; from launch.cli import main\n"
        )
        code += "try: main()\nexcept SystemExit: pass\n"
        code += "print({'torch', 'omegaconf', 'deepspeed', 'pyarrow', 'upath'} & sys.modules.keys() or 'light')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.endswith("light\n"), done.stdout + done.stderr
