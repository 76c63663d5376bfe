"""What a run writes for people: metrics.jsonl, TensorBoard, Weights & Biases, and the lines on the terminal.

Only rank 0 has one. Scalars are filed under the number of completed steps; after a resume TensorBoard is told to
purge what lies beyond the resumed step (`purge_step`), so that curves go on without overlap.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pipeline.run import RunFolder, append_line


class MetricWriter:
    """Scalars and pictures of one attempt, from `first_step` (completed steps at its start) on."""

    def __init__(
        self, run: RunFolder, *, attempt: int, first_step: int, to: list[str], run_name: str, config: dict[str, Any]
    ):
        self._run, self._attempt = run, attempt
        self._board = self._wandb = None
        if "tensorboard" in to:
            from torch.utils.tensorboard.writer import SummaryWriter

            purge = first_step + 1 if attempt else None
            self._board = SummaryWriter(str(run.tensorboard), purge_step=purge)
        if "wandb" in to:
            try:
                import wandb  # pyright: ignore[reportMissingImports] - an extra
            except ImportError:
                raise UserError(
                    "logging.to names wandb, which is not installed: "
                    "pip install 'mixer-pretraining[wandb]', or logging.to=[tensorboard]"
                ) from None
            identity = run.path / "wandb_id"
            if not identity.exists():
                identity.write_text(wandb.util.generate_id())
            self._wandb = wandb.init(
                project="mixer-pretraining",
                id=identity.read_text(),
                resume="allow",
                name=run_name,
                dir=str(run.path),
                config=config,
            )
            self._wandb.define_metric("*", step_metric="step")  # its own counter refuses to go back

    def scalars(self, step: int, values: dict[str, float], split: str = "train") -> None:
        """One line in metrics.jsonl; the same under `split/` elsewhere."""
        append_line(self._run.metrics, {"step": step, "attempt": self._attempt, "split": split, **values})
        with self._harmless():
            for name, value in values.items():
                if isinstance(value, (int, float)) and self._board:
                    self._board.add_scalar(f"{split}/{name}", value, step)
            if self._wandb:
                self._wandb.log({f"{split}/{k}": v for k, v in values.items()} | {"step": step})

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels: uint8 [H, W, 3]."""
        with self._harmless():
            if self._board:
                self._board.add_image(name, pixels, step, dataformats="HWC")
            if self._wandb:
                import wandb  # pyright: ignore[reportMissingImports]

                self._wandb.log({name: wandb.Image(pixels), "step": step})

    def close(self) -> None:
        with self._harmless():
            if self._board:
                self._board.close()
            if self._wandb:
                self._wandb.finish()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Curves must not end a training: what fails (a full disk, a server) is said once and then left alone."""
        try:
            yield
        except Exception as e:
            print(
                f"warning: no more curves from this attempt ({type(e).__name__}: {e}); metrics.jsonl goes on",
                flush=True,
            )
            self._board = self._wandb = None


class Display:
    """Progress on a terminal: a bar that stays in place. Elsewhere (log files, pipes): one plain line a log step."""

    def __init__(self, total: int, start: int, quiet: bool = False):
        self._quiet = quiet
        self._progress = None
        self._total = total
        self._restore: list[tuple[Any, Any]] = []
        if not quiet and sys.stdout.isatty():
            from rich.console import Console
            from rich.file_proxy import FileProxy
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            split = hasattr(sys.stdout, "terminal")  # a log is kept too, which should not see a bar being drawn
            console = Console(file=sys.stdout.terminal if split else None)  # type: ignore[attr-defined]
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                # on a narrow terminal the figures matter more than a bar
                *([BarColumn(bar_width=None)] if console.width >= 110 else []),
                TextColumn("{task.fields[note]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                expand=True,
                console=console,
                redirect_stdout=not split,
                redirect_stderr=not split,
            )
            self._task = self._progress.add_task("train", total=total, completed=start, note="")
            self._progress.start()
            for stream in (sys.stdout, sys.stderr) if split else ():
                terminal = stream.terminal  # type: ignore[attr-defined]
                self._restore.append((stream, terminal))
                stream.terminal = FileProxy(console, terminal)  # type: ignore[attr-defined] - above the bar

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, flush=True)

    def step(self, step: int, note: str | None = None, eta_s: float | None = None) -> None:
        """`note` is given on log steps only."""
        if self._progress:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._progress.update(self._task, completed=step, **fields)
        if note is not None and not self._quiet:
            eta = "" if eta_s is None else f"  ETA {clock(eta_s)}"
            line = f"step {step:>{len(str(self._total))}}/{self._total}  {note}{eta}"
            if not self._progress:
                print(line, flush=True)
            elif self._restore:
                sys.stdout.log.write(line + "\n")  # type: ignore[attr-defined]

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        for stream, terminal in self._restore:
            stream.terminal = terminal
        self._restore = []


def clock(seconds: float) -> str:
    """Seconds as 1:02:03."""
    return time.strftime("%H:%M:%S" if seconds < 86400 else f"{int(seconds // 86400)}d %H:%M:%S", time.gmtime(seconds))
