"""A signal, to whichever process: the step ends, the state is saved, exit code 75, and nothing stays behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from mixer_process import (
    STEPS,
    STRETCH,
    Mixer,
    assert_same_run,
    current_step,
    poll,
    run_arguments,
    undisturbed_run,
    wait_for_progress,
)

from pipeline.checkpoint.manager import committed_steps
from pipeline.config import load_config, to_yaml
from pipeline.run import RunFolder, read_lines

TERM, USR2, INT = signal.SIGTERM, signal.SIGUSR2, signal.SIGINT


def shared_memory() -> set[str]:
    """What torch and Python leave in /dev/shm when they are not given the time to clean up."""
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("torch_", "sem.", "psm_"))}


def assert_saved_and_gone(mixer: Mixer, run: Path, name: str) -> None:
    assert mixer.wait() == 75, mixer.output()
    assert mixer.all_gone(5), mixer.processes()
    step = current_step(run)[1]
    assert 0 < step < STEPS, "the signal came too late"
    assert committed_steps(RunFolder(run).checkpoints)[-1] == step
    event = [e for e in read_lines(RunFolder(run).events) if e["event"] == "signal"][-1]
    assert (event["step"], event["name"]) == (step, name)
    assert RunFolder(run).read_status()["state"] == "saved"
    assert "Traceback" not in mixer.output()
    assert f"go on with `mixer resume {run}`" in mixer.output()


@pytest.mark.parametrize(
    "signals",
    [
        [("launcher", TERM), ("agent", USR2), ("terminal", INT), ("launcher", INT)],
        pytest.param([("launcher", USR2), ("agent", TERM), ("agent", INT)], marks=pytest.mark.slow),
    ],
    ids=["quick", "the others"],
)
def test_launcher_agent_and_terminal(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, signals: list[tuple[str, signal.Signals]]
) -> None:
    """One run over two ranks, stopped again and again, ends as if it had never been."""
    undisturbed = undisturbed_run(tmp_path_factory.getbasetemp(), 2)
    run, before = tmp_path / "run", shared_memory()
    command = ["launch", "local", *run_arguments(run), "--nproc", "2"]
    for attempt, (target, number) in enumerate(signals):
        # The launcher alone does not know whether the others heard of it: it asks as `mixer stop` does,
        # and rank 0 looks for that every two seconds only
        asks = (target, number) == ("launcher", INT)
        mixer = Mixer(command, tmp_path, stretch=0.2 if asks else STRETCH)
        wait_for_progress(mixer, run, attempt)
        if target == "terminal":  # Ctrl-C reaches every process of the foreground group
            os.killpg(mixer.process.pid, number)
        else:
            os.kill(mixer.agent() if target == "agent" else mixer.process.pid, number)
        assert_saved_and_gone(mixer, run, "mixer stop" if asks else number.name)
        assert not RunFolder(run).stop.exists()
        command = ["resume", str(run)]
    mixer = Mixer(command, tmp_path)
    assert mixer.wait() == 0, mixer.output()
    assert shared_memory() <= before
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_an_evaluation_leaves_the_training_of_its_run_alone(tmp_path: Path) -> None:
    """Neither does it take back what `mixer stop` asked for, nor does its Ctrl-C ask the training to stop."""
    run = RunFolder(tmp_path / "run")
    run.describe(to_yaml(load_config("digits", ["data.train=synthetic", f"run.dir={run.path}"]).config))
    run.stop.write_text("save\n")
    command = ["eval", str(run.path), "--nproc", "2"]
    failed = Mixer(command, tmp_path)
    assert failed.wait() == 1 and "no checkpoint" in failed.output(), failed.output()
    assert run.stop.exists()
    run.stop.unlink()
    interrupted = Mixer(command, tmp_path)
    assert poll(lambda: any("-m launch.agent" in command for command in interrupted.processes().values()))
    interrupted.process.send_signal(INT)
    seen = poll(lambda: run.stop.exists() or interrupted.process.poll() is not None)
    assert seen and not run.stop.exists()
    assert interrupted.wait() == 130, interrupted.output()


def test_single_process(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`mixer train` without a launcher."""
    undisturbed = undisturbed_run(tmp_path_factory.getbasetemp(), 1)
    run = tmp_path / "run"
    command = ["train", *run_arguments(run)]
    for attempt, number in enumerate([USR2, INT]):
        mixer = Mixer(command, tmp_path)
        wait_for_progress(mixer, run, attempt)
        if number == INT:
            os.killpg(mixer.process.pid, number)
        else:
            mixer.process.send_signal(number)
        assert_saved_and_gone(mixer, run, number.name)
        command = ["resume", str(run)]
    mixer = Mixer(command, tmp_path)
    assert mixer.wait() == 0, mixer.output()
    assert_same_run(run, undisturbed)
