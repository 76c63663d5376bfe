"""The command line as its users meet it: what goes wrong is said in a line or two that name the way out."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

from data_tools.errors import UserError

HERE = Path(__file__).parent


def mixer(*arguments: str | Path, python: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "launch.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def complaint(result: subprocess.CompletedProcess[str], code: int = UserError.exit_code) -> str:
    """What a refused command said, having checked its form."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert 1 <= len(result.stderr.strip().splitlines()) <= 2, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text("run: {name: test}\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 8 steps, with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "plain.yaml").write_text("run: {name: test}\n")
    result = mixer("train", folder / "plain.yaml", f"run.dir={folder / 'run'}", *TINY)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages that a command under `-X importtime` imported."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "digits", "data.train=synthetic", "--print-config"]]
)
def test_answers_without_torch(arguments: list[str]) -> None:
    """Seconds differ from machine to machine; that nothing heavy is imported is what makes it quick on all."""
    result = mixer(*arguments, python=("-X", "importtime"))
    assert result.returncode == 0
    assert not imported(result) & {"torch", "accelerate", "deepspeed", "pyarrow", "webdataset", "tensorboard"}


def test_help_names_every_subcommand() -> None:
    text = mixer("--help").stdout
    assert all(f" {name} " in text for name in ("shard", "data", "train", "resume", "launch", "eval"))


def test_print_config_shows_origins() -> None:
    lines = mixer("train", "digits", "data.train=synthetic", "optimizer.lr=0.5", "--print-config").stdout.splitlines()

    def line(key: str) -> str:
        return next(text for text in lines if text.split(":")[0].strip() == key)

    assert "0.5" in line("lr") and "command line" in line("lr")
    assert "digits.yaml" in line("hidden_dim")
    assert "default" in line("keep_every")


@pytest.mark.parametrize("key", ["optimizer.learning_rat", "optimzer.lr", "optimizer.lrr"])
def test_a_typo_on_the_command_line(key: str) -> None:
    text = complaint(mixer("train", "digits", "data.train=synthetic", f"{key}=1"))
    assert key in text
    assert "did you mean optimizer.lr?" in text or key.endswith("rat")


def test_a_typo_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train:\n  duration: 8 steps\n  stratgy: ddp\n")
    text = complaint(mixer("train", tmp_path / "r.yaml", "data.train=synthetic"))
    assert "train.stratgy" in text and "did you mean train.strategy?" in text and "r.yaml:3" in text


def test_an_unknown_recipe() -> None:
    text = complaint(mixer("train", "digts", "data.train=synthetic"))
    assert "digts" in text and "did you mean digits?" in text and "cifar10" in text


def test_a_missing_data_folder(recipe: Path, tmp_path: Path) -> None:
    text = complaint(mixer("train", recipe, *TINY, "data.train=/no/where", f"run.dir={tmp_path / 'run'}"))
    assert "/no/where" in text


def test_data_is_not_chosen(recipe: Path) -> None:
    assert "data.train" in complaint(mixer("train", recipe, "train.duration=8 steps"))


def test_resume_of_something_else(tmp_path: Path) -> None:
    assert "no such folder" in complaint(mixer("resume", tmp_path / "nothing"))
    assert "not a run folder" in complaint(mixer("resume", tmp_path))


def test_eval_of_an_unknown_checkpoint(finished: Path) -> None:
    text = complaint(mixer("eval", finished, "data.val=synthetic", "--checkpoint", "step-5"))
    assert "step-5" in text and "step-4, step-8" in text
    assert "--checkpoint last" in complaint(mixer("eval", finished, "data.val=synthetic", "--checkpoint", "best"))


def test_eval_of_an_average_that_is_not_kept(finished: Path) -> None:
    assert "train.ema_decay" in complaint(mixer("eval", finished, "data.val=synthetic", "--ema"))


@pytest.mark.slow
def test_eval_is_the_same_on_any_number_of_ranks(finished: Path) -> None:
    alone = mixer("eval", finished, "data.val=synthetic")
    assert alone.returncode == 0, alone.stderr
    found = alone.stdout.partition(": ")[2].partition(" of ")[0]
    assert "on 1,000 samples" in found
    assert found in mixer("eval", finished, "data.val=synthetic", "--nproc", "3").stdout


@pytest.mark.slow
def test_more_ranks_than_the_batch(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = complaint(mixer("train", recipe, *TINY, "train.global_batch_size=2", f"run.dir={run}", "--nproc", "3"))
    assert "3 ranks" in text and "train.global_batch_size=2" in text


@pytest.mark.slow
def test_zero_without_deepspeed(recipe: Path, tmp_path: Path) -> None:
    block = {"PYTHONPATH": str(HERE / "no_deepspeed")}
    text = complaint(mixer("train", recipe, *TINY, "train.strategy=zero2", f"run.dir={tmp_path / 'zero'}", **block))
    assert "train.strategy=zero2" in text and "train.strategy=fsdp or ddp" in text
    for strategy in ("ddp", "fsdp"):
        run = tmp_path / strategy
        result = mixer("train", recipe, *TINY, f"train.strategy={strategy}", f"run.dir={run}", **block)
        assert result.returncode == 0, result.stderr


def test_refused_and_declared_changes(finished: Path) -> None:
    text = complaint(mixer("resume", finished, "model.hidden_dim=8"))
    assert "model.hidden_dim" in text and "cannot change" in text
    text = complaint(mixer("resume", finished, "optimizer.weight_decay=0.5"))
    assert "--allow optimizer.weight_decay" in text


def test_a_run_folder_in_use(finished: Path) -> None:
    with open(finished / ".lock", "a+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert "another training writes into this run folder" in complaint(mixer("resume", finished))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = mixer("resume", tmp_path / "nothing", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr and "UserError" in result.stderr


def test_resume_of_a_finished_run_does_nothing(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    result = mixer("resume", finished)
    assert result.returncode == 0, result.stderr
    assert (finished / "metrics.jsonl").read_text() == before
    assert (finished / "FINISHED").exists()


def test_smoke(recipe: Path, tmp_path: Path) -> None:
    """Everything that a long run does, in seconds and in a throw-away folder."""
    run = tmp_path / "run"
    result = mixer("train", recipe, *TINY, "data.val=synthetic", f"run.dir={run}", "--smoke", "--nproc", "2")
    assert result.returncode == 0, result.stderr
    assert "fit to submit" in result.stdout and "evaluated 1000 samples" in result.stdout
    assert not run.exists()


def test_without_a_standard_error() -> None:
    """As some schedulers start a program: there is nowhere for a crash's stack, and nothing wrong."""
    command = f"{shlex.quote(sys.executable)} -m launch.cli --help 2>&-"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0 and "Usage" in done.stdout
