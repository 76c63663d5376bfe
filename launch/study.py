"""Runs the trainings of a study: each a `mixer launch local` in a process of its own, some side by side.

A finished run is kept, an unfinished one goes on from its checkpoint: starting the same study again is all that
resuming takes. A signal is passed on, the trainings save, and the study ends with exit code 75; where the study itself
is killed, the kernel asks its trainings to save and end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from launch.processes import SAVE_SECONDS, die_with_parent
from launch.watch import look, span
from pipeline.cli import EXIT_SAVED
from pipeline.compare.study import Cell, config_file, read_history
from pipeline.logs import LOGS
from pipeline.run import read_lines

_POLL_SECONDS = 0.25
_LOOK_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass
class _Training:
    cell: Cell
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    evaluations: int


class StudyRunner:
    """jobs: trainings side by side. nproc: processes of each; None: one a GPU, one where there is none."""

    def __init__(self, cells: Sequence[Cell], out: Path, jobs: int = 1, nproc: int | None = None):
        self.cells, self.out, self.jobs, self.nproc = list(cells), out, jobs, nproc
        self.failed: list[str] = []
        self._signal: int | None = None
        self._saved = False  # a training was stopped from elsewhere

    def run(self) -> int:
        """Returns 0 when all runs are finished, 75 when they saved and are to be continued, 1 when some failed."""
        done = [c for c in self.cells if c.finished()]
        unfinished = [(n, c) for n, c in enumerate(self.cells, 1) if not c.finished()]
        waiting = [(n, c) for n, c in unfinished if not c.submitted()]
        if len(waiting) < len(unfinished):
            self._say(f"{len(unfinished) - len(waiting)} runs were submitted to SLURM, and are left to it")
        if done:
            self._say(f"{len(done)} of {len(self.cells)} runs are finished already")
        running: list[_Training] = []
        with self._signals(lambda: running), _Bars() as bars:
            while running or (waiting and not self._ending()):
                while waiting and len(running) < self.jobs and not self._ending():
                    running.append(self._start(*waiting.pop(0)))
                    if self._signal is not None:  # told while it was started: nobody else has heard of it
                        running[-1].process.send_signal(signal.SIGTERM)
                time.sleep(_POLL_SECONDS)
                for training in [t for t in running if t.process.poll() is not None]:
                    running.remove(training)
                    bars.remove(training.cell.name)
                    self._ended(training)
                bars.show([t.cell for t in running])
                self._tell(running)
        if self.failed:
            return 1
        return EXIT_SAVED if self._ending() and not all(c.finished() for c in self.cells) else 0

    def _ending(self) -> bool:
        return self._signal is not None or self._saved

    def _start(self, number: int, cell: Cell) -> _Training:
        log = self.out / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = ["launch", "local", str(config_file(self.out, cell.name)), f"run.dir={cell.run.path}"]
        command += ["--nproc", str(self.nproc)] if self.nproc else []
        environment = {**os.environ}
        environment.pop(LOGS, None)
        # One that saves since an earlier study was killed still holds its folder
        environment.setdefault("MIXER_LOCK_PATIENCE", str(SAVE_SECONDS))
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.jobs * (self.nproc or 1)))))
        before = [e for e in read_lines(cell.run.events) if e["event"] == "save"]
        with open(log, "ab") as f:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *command],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C comes here alone, and is passed on once
                preexec_fn=die_with_parent,
            )
        goes_on = f", goes on from step {before[-1]['step']:,}" if before else ""
        self._say(f"[{number}/{len(self.cells)}] {cell.name}: training{goes_on}")
        return _Training(cell, number, process, log, time.monotonic(), self._evaluations(cell))

    def _evaluations(self, cell: Cell) -> int:
        return sum(1 for line in read_lines(cell.run.metrics) if line.get("split") == "val")

    def _tell(self, running: Sequence[_Training]) -> None:
        """A line for each new evaluation."""
        for t in running:
            lines = [line for line in read_lines(t.cell.run.metrics) if line.get("split") == "val"]
            if len(lines) > t.evaluations:
                t.evaluations = len(lines)
                line = lines[-1]
                self._say(
                    f"[{t.number}/{len(self.cells)}] {t.cell.name}: step {line['step']:,}, top-1 {line['top1']:.2%}"
                )

    def _ended(self, training: _Training) -> None:
        cell, code = training.cell, training.process.returncode
        head = f"[{training.number}/{len(self.cells)}] {cell.name}"
        took = span(time.monotonic() - training.began)
        if code == 0 and cell.finished():
            best = read_history(cell.run.path).best()
            what = f"best top-1 {best.values['top1']:.2%} at step {best.step:,}" if best else "no evaluation"
            self._say(f"{head}: finished in {took}, {what}")
        elif code == EXIT_SAVED or (self._signal is not None and code == -signal.SIGTERM):  # before it could listen
            self._saved = True
            self._say(f"{head}: saved")
        else:
            self.failed.append(f"{cell.name}: {_last_error(training.log, code)}")
            self._say(f"{head}: FAILED after {took}: {_last_error(training.log, code)}")

    def _say(self, text: str) -> None:
        print(text, flush=True)

    @contextlib.contextmanager
    def _signals(self, running: Callable[[], Sequence[_Training]]) -> Iterator[None]:
        """Passes signals on; whatever happens here, no training is left over."""

        def forward(number: int, frame: object) -> None:
            self._signal = number
            for training in running():
                training.process.send_signal(signal.SIGTERM)

        before = {n: signal.signal(n, forward) for n in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for training in running():
                training.process.terminate()
                training.process.wait()


class _Bars:
    """On a terminal: a bar for each running training. Elsewhere nothing."""

    def __init__(self) -> None:
        self._progress = None
        self._tasks: dict = {}
        self._next_look = 0.0
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}")
            self._progress = Progress(*columns, TimeRemainingColumn(), transient=True)

    def __enter__(self) -> _Bars:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()

    def show(self, cells: Sequence[Cell]) -> None:
        if not self._progress or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        for view, cell in zip(look([c.run.path for c in cells]), cells):
            if cell.name not in self._tasks:
                self._tasks[cell.name] = self._progress.add_task(cell.name, total=None, note="")
            loss = f"loss {view.loss:.3f}" if view.loss is not None else view.state.lower()
            note = f"step {view.step or 0:,} of {view.total_steps or 0:,}, {loss}"
            self._progress.update(self._tasks[cell.name], completed=view.step or 0, total=view.total_steps, note=note)

    def remove(self, name: str) -> None:
        if self._progress and name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))


def _last_error(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error")), lines[-1] if lines else "")
    return f"{said or f'exit code {code}'} ({log})"


def run_study(cells: Sequence[Cell], out: Path, jobs: int, nproc: int | None, report: Callable[[], str | None]) -> int:
    """Runs what is unfinished, then reports on what is finished. Returns the exit code.

    Raises:
        UserError: some runs failed, after all others have run.
    """
    runner = StudyRunner(cells, out, jobs, nproc)
    code = runner.run()
    table = report()
    if table:
        missing = sum(not c.finished() for c in cells)
        print(f"\n{table}\n" + (f"\n{missing} of {len(cells)} runs are not in it yet\n" if missing else ""), flush=True)
    if runner.failed:
        raise UserError(
            "these runs failed; the same command tries them again:\n" + "\n".join(f"  {f}" for f in runner.failed)
        )
    return code
