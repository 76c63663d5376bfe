"""`mixer demo`: the whole way on real images, with a violent interruption in the middle.

Scikit-learn's handwritten digits become image files, then shards; a training on two processes is killed with
SIGKILL, resumed on three under another strategy, evaluated, and compared with a training that nobody disturbed.
Every step is a `mixer` command of its own, printed as one would type it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from launch.demo_report import draw, examine, interrupted_run, show, undisturbed_run
from launch.processes import die_with_parent
from pipeline.run import RunFolder

KILL_BETWEEN = 0.36, 0.62  # shares of the steps; the kill itself comes a little later
MARKER = ".mixer-demo"
_PHASE_SECONDS = 900  # a phase that takes longer hangs
_POLL_SECONDS = 0.02


def run_demo(folder: Path) -> int:
    """Does it all in `folder`, from scratch. Returns 0 if the demo showed what it claims, else 1.

    Raises:
        UserError: an extra is missing, `folder` holds something else, or a command failed.
    """
    _require_extras()
    _clear(folder)
    started = time.monotonic()
    stage = _Stages(folder, 6)
    images, shards = folder / "images", folder / "shards"
    run, other = interrupted_run(folder), undisturbed_run(folder)

    count = write_digits(images)
    stage("images", f"{count:,} handwritten digits, real scans, as {images}/<digit>/*.png")
    stage("shard", "packed into tar files")
    stage.mixer("shard", str(images), str(shards), "--val-fraction", "0.15", "--max-samples", "400")

    config = ["digits", f"data.train={shards}", "train.strategy=ddp", "--nproc", "2"]
    stage("train", "on 2 processes, to be killed on the way")
    probe = _probe_deepspeed()
    killed = stage.mixer("launch", "local", *config, f"run.dir={run}", watch=run, kill=True)
    stage.say(f"SIGKILL to all {len(killed)} processes: launcher, agent, ranks, loader workers")
    (folder / "kill.json").write_text(json.dumps({"time": time.time(), "pids": killed}) + "\n")

    strategy = "zero3" if probe.wait() == 0 else "fsdp"
    stage("resume", f"the same run under {strategy} on 3 processes")
    stage.mixer("resume", str(run), "--nproc", "3", f"train.strategy={strategy}", watch=run)
    stage("compare", "the same training, undisturbed")
    stage.mixer("launch", "local", *config, f"run.dir={other}", watch=other)
    stage("evaluate", "both, on images that neither has seen")
    for path in (run, other):
        stage.mixer("eval", str(path))
    return report_demo(folder, time.monotonic() - started)


def report_demo(folder: Path, seconds: float | None = None) -> int:
    """Table, picture and verdict on what lies in `folder`. Returns 0 if all is as it should be, else 1."""
    _require_extras()
    if not (folder / MARKER).exists():
        raise UserError(f"{folder} holds no demo; `mixer demo {folder}` makes one")
    report = examine(folder)
    draw(report, folder / "loss.png")
    show(report)
    took = f" in {seconds:.0f} s" if seconds else ""
    if report.problems:
        print(f"the demo FAILED{took}", file=sys.stderr, flush=True)
        return 1
    print(f"the demo passed{took}", flush=True)
    return 0


def _require_extras() -> None:
    names = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"the demo needs {' and '.join(missing)}: pip install 'mixer-pretraining[demo]', "
            "or `pip install -e '.[demo]'` in a checkout"
        )


def _clear(folder: Path) -> None:
    """An empty folder with a marker in it. Deletes what an earlier demo left, and nothing that is not a demo's."""
    foreign = folder.exists() and not (folder / MARKER).exists()
    if foreign and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and was not made by the demo: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


def write_digits(folder: Path) -> int:
    """Scikit-learn's 1,797 scans of 8 x 8 pixels as grey PNG files of 32 x 32, a folder a digit. Returns how many."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
    for i, (scan, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        grey.resize((32, 32), Image.Resampling.BICUBIC).save(folder / str(digit) / f"{i:04d}.png")
    return len(digits.images)


def _probe_deepspeed() -> subprocess.Popen[bytes]:
    """Tries, beside the training, whether DeepSpeed can be imported here: its exit code says so."""
    return subprocess.Popen(
        [sys.executable, "-c", "import deepspeed"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )


class _Stages:
    """Numbered headings, and the commands under them: output to DEMO/logs, progress to the terminal."""

    def __init__(self, folder: Path, count: int):
        self._folder, self._count, self._number, self._name = folder, count, 0, ""
        (folder / "logs").mkdir()

    def __call__(self, name: str, text: str) -> None:
        self._number, self._name = self._number + 1, name
        print(f"[{self._number}/{self._count}] {name}: {text}", flush=True)

    def say(self, text: str) -> None:
        print(f"      {text}", flush=True)

    def mixer(self, *arguments: str, watch: Path | None = None, kill: bool = False) -> list[int]:
        """Runs `mixer ARGUMENTS` to its end, or, with `kill`, to a moment in the middle of the run `watch`.

        Returns the processes that were killed. Raises UserError if the command fails, or ends before the kill.
        """
        self.say(f"$ mixer {shlex.join(arguments)}")
        log = self._folder / "logs" / f"{self._number}-{self._name}.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        try:
            pids = self._follow(process, watch, kill)
        except BaseException:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()
            raise
        if kill and not pids:
            code = process.returncode
            raise UserError(f"the training ended (exit code {code}) before it could be killed\n{_tail(log)}")
        if not kill and process.returncode:
            raise UserError(f"`mixer {arguments[0]}` failed with exit code {process.returncode}\n{_tail(log)}")
        return pids

    def _follow(self, process: subprocess.Popen[bytes], watch: Path | None, kill: bool) -> list[int]:
        share = random.uniform(*KILL_BETWEEN)
        deadline = time.monotonic() + _PHASE_SECONDS
        with _progress() as advance:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise UserError(f"gave up after {_PHASE_SECONDS} s; see {self._folder / 'logs'}")
                step, total = _position(watch) if watch else (0, 0)
                advance(step, total)
                if kill and total and step >= share * total:
                    time.sleep(random.uniform(0, 0.1))  # anywhere in a step: forward, backward, saving, ...
                    pids = kill_tree(process.pid)
                    process.wait()
                    return pids
                time.sleep(_POLL_SECONDS)
        return []


def _position(run: Path) -> tuple[int, int]:
    """(last logged step, all steps) of a training that goes on, by its own STATUS.json; zeros before it is there."""
    status = RunFolder(run).read_status()
    return status.get("step", 0), status.get("total_steps", 0)


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([*text, f"(all of it: {log})"])


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stdout.isatty():
        yield lambda step, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(TextColumn("      step"), BarColumn(), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda step, total: bar.update(task, completed=step, total=total or None)


# --- the kill -----------------------------------------------------------------------------------------------


def kill_tree(root: int) -> list[int]:
    """SIGKILL to a process and all its descendants, which have not a moment to react. Returns their ids.

    They are stopped first, until no new one turns up: so none can start another, restart one or tidy up.
    """
    family: list[int] = []
    while True:
        new = [pid for pid in _descendants(root) if pid not in family]
        if not new:
            break
        for pid in new:
            _signal(pid, signal.SIGSTOP)
        family += new
    for pid in family:
        _signal(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while alive := _running().intersection(family) - {root}:  # the caller's own child it reaps itself
        if time.monotonic() > deadline:
            raise UserError(f"processes {sorted(alive)} survived SIGKILL for 30 s")
        time.sleep(0.01)
    return family


def _descendants(root: int) -> list[int]:
    """`root` and all below it."""
    children: dict[int, list[int]] = {}
    for pid, parent, _ in _processes():
        children.setdefault(parent, []).append(pid)
    family = [root]
    for pid in family:
        family += children.get(pid, [])
    return family


def _running() -> set[int]:
    return {pid for pid, _, state in _processes() if state not in "ZX"}


def _processes() -> list[tuple[int, int, str]]:
    """(process, its parent, state letter) of everything that runs here."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True, check=True)
        split = (line.split() for line in listed.stdout.splitlines())
        return [(int(pid), int(parent), state[0]) for pid, parent, state in split]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
            except OSError:
                continue  # ended in the meantime
            state, parent = stat.rpartition(")")[2].split()[:2]
            found.append((int(entry), int(parent), state))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
