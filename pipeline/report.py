"""What a training shows to others: lines or a bar, metrics and curves, events, STATUS.json, pictures.

Rank 0 alone writes. Where the numbers of all ranks are summed first, every rank calls.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointError, CheckpointReader
from pipeline.checkpoint.manager import step_folder
from pipeline.data.loader import Batch, Share
from pipeline.health import slowest_rank
from pipeline.logs import StartLogs
from pipeline.metrics import Display, MetricWriter
from pipeline.parallel.engine import WEIGHT, StepStats
from pipeline.parts import Parts
from pipeline.pictures import tile_grid
from pipeline.weights.filters import training_pictures


@dataclass
class Clock:
    """Wall time of the steps since the last log line, and the parts of it that were not computation."""

    since: float
    steps: int = 0
    data_wait: float = 0.0
    last_wait: float = 0.0  # of the last step, for this rank's own data
    stall: float = 0.0  # saving

    @staticmethod
    def now() -> Clock:
        return Clock(time.perf_counter())


class Report:
    """The report of one training, from start to end. It changes nothing that is trained."""

    def __init__(self, parts: Parts, logs: StartLogs, quiet: bool):
        self._parts, self._logs = parts, logs
        self._main, self._quiet = parts.world.is_main, quiet or not parts.world.is_main
        self.attempt = -1
        self.saved_at = -1  # step of the newest checkpoint
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.clock = Clock.now()
        self.own_seconds: list[float] = []  # of the steps since the last log line, before this rank met the others
        self._display = Display(0, 0, quiet=True)
        self._writer: MetricWriter | None = None
        self._show_next_batch = False
        self._pictures_at: tuple[int, float] | None = None  # step and clock of the last pictures of the weights

    # -- start and end ----------------------------------------------------------------------------------------

    def begin(self, attempt: int, step: int) -> None:
        """From now on this attempt, at this step, is told of; what earlier ones wrote beyond it leaves the curves."""
        self.attempt, self._pictures_at = attempt, None
        if self._writer:
            self._writer.close()
        if self._main:
            c = self._parts.config
            self._writer = MetricWriter(
                self._parts.run,
                attempt=attempt,
                first_step=step,
                to=c.logging.to,
                run_name=c.run.name,
                config=asdict(c),
            )

    def show(self, step: int, running: str, previous: dict[str, Any] | None) -> None:
        """The first lines: `running` says what the engine found, `previous` who wrote the checkpoint, if any."""
        self._display = Display(self._parts.schedule.total_steps, step, self._quiet)
        self.say(summary(self._parts, running, step, previous))
        self._show_next_batch = True

    def end(self, text: str) -> None:
        self._display.close()
        self.say(text)
        if self._writer:
            self._writer.close()

    def close(self) -> None:
        """Gives the terminal back."""
        self._display.close()

    def start_clock(self) -> None:
        """What went before (loading, a rollback) is no step's time."""
        self.clock = Clock.now()

    # -- words ------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """On rank 0's output."""
        self._display.say(text)

    def say_of_rank(self, text: str) -> None:
        print(f"rank {self._parts.world.rank}: {text}", flush=True)

    def record(self, event: str, **details: Any) -> None:
        """Into events.jsonl."""
        if self._main:
            self._parts.run.record(event, attempt=self.attempt, **details)

    def warn_damage(self, text: str) -> None:
        self._parts.run.record("damaged", why=text)
        print(f"warning: {text}", flush=True)

    def status(self, state: str, step: int, **values: Any) -> None:
        """Into STATUS.json."""
        if not self._main:
            return
        self._parts.run.write_status(
            state=state,
            step=step,
            total_steps=self._parts.schedule.total_steps,
            attempt=self.attempt,
            logs=self._logs.name,
            **self._parts.written_by(),
            last_checkpoint=self.saved_at if self.saved_at >= 0 else None,
            metrics=self.metrics,
            **values,
        )

    # -- numbers ----------------------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """A step that is not logged: the bar moves."""
        self._display.step(step)

    def log(self, step: int, samples: int, lr: float, stats: StepStats, norm: Tensor) -> None:
        """Collective. The loss is this step's, not an average: so that it is the same after a resume in between."""
        world, clock = self._parts.world, self.clock
        loss, weight, correct, wait = world.sum(
            [stats.loss.item(), stats.weight.item(), stats.correct.item(), clock.data_wait]
        )
        elapsed = time.perf_counter() - clock.since
        slow = slowest_rank(self.own_seconds, world)
        self.own_seconds.clear()
        if slow:
            self.say(slow)
        rate = clock.steps * self._parts.config.train.global_batch_size / elapsed
        values = {
            "loss": loss / max(weight, 1.0),
            "accuracy": correct / max(weight, 1.0),
            "lr": lr,
            "grad_norm": float(norm),
            "img_per_s": rate,
            "img_per_s_per_device": rate / world.size,
            "data_wait": wait / world.size / elapsed,
            "checkpoint_stall": clock.stall,
            "epoch": samples / self._parts.order.num_samples,
            "samples_seen": samples,
        }
        if self._parts.peak_flops:
            values["mfu"] = rate / world.size * self._parts.train_flops / self._parts.peak_flops
        if self._writer:
            self._writer.scalars(step, values)
            remaining = (self._parts.schedule.total_steps - step) * elapsed / max(clock.steps, 1)
            self.status("training", step, eta_s=round(remaining), **values)
            self._display.step(step, self._note(values), remaining)
        self.clock = Clock.now()

    def _note(self, v: dict[str, float]) -> str:
        saved = "none" if self.saved_at < 0 else f"{self.saved_at}"
        mfu = f" MFU {v['mfu']:.1%}" if "mfu" in v else ""
        return (
            f"loss {v['loss']:.4f} lr {v['lr']:.1e} {v['img_per_s']:,.0f} img/s{mfu} "
            f"data-wait {v['data_wait']:.0%} saved {saved}"
        )

    def evaluated(self, step: int, samples: int, metrics: dict[str, float]) -> None:
        """What an evaluation at this step, after so many samples, found."""
        self.metrics = metrics
        if self._writer:
            self._writer.scalars(step, metrics | {"samples_seen": samples}, split="val")
        self.record("eval", step=step, **metrics)
        few = {k.removeprefix("fewshot_"): v for k, v in metrics.items() if k.startswith("fewshot_")}
        shots = "".join(f", {name}-shot {top1:.2%}" for name, top1 in few.items())
        self.say(
            f"step {step}: val top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, "
            f"loss {metrics['loss']:.4f} on {metrics['samples']:,.0f} samples{shots}"
        )

    # -- pictures ---------------------------------------------------------------------------------------------

    def batch(self, step: int, batch: Batch) -> None:
        """The first augmented batch of a start."""
        if self._show_next_batch and self._writer:
            self._writer.image(step, "train/batch", tile_grid(batch.images[:32].permute(0, 2, 3, 1).numpy(), 8))
        self._show_next_batch = False

    def weights(self, step: int) -> None:
        """Weights, read from the checkpoint just written: no rank has to gather, or to wait."""
        schedule, last, now = self._parts.schedule, self._pictures_at, time.monotonic()
        every = schedule.pictures_every
        if self._writer is None or every is None:
            return
        passed = math.inf if last is None else step - last[0] if isinstance(every, int) else now - last[1]
        if passed < every and step < schedule.total_steps:
            return
        self._pictures_at = step, now
        # Pruned, out of reach, or of tokens that are no square: it is only a picture
        with contextlib.suppress(CheckpointError, OSError, UserError):
            reader = CheckpointReader(step_folder(self._parts.run.checkpoints, step))
            names = self._parts.engine.names
            for name, picture in training_pictures(names, lambda n: reader.tensor(n, WEIGHT).numpy()):
                self._writer.image(step, name, picture)


def summary(parts: Parts, running: str, step: int, previous: dict[str, Any] | None) -> str:
    """The first block of a training's output: what is run, on what, and from where it goes on."""
    c, share, world = parts.config, parts.share, parts.world
    count = sum(torch.Size(s).numel() for s in parts.engine.shapes.values())
    device = f"{world.size} x {torch.cuda.get_device_name() if world.device.type == 'cuda' else 'CPU process'}"
    start = "a fresh start"
    if previous is not None:
        start = (
            f"RESUMED from step {step}, written by {previous.get('strategy')} on "
            f"{previous.get('world_size')} ranks; now {c.train.strategy} on {world.size}"
        )
    val = f"; val: {sum(parts.val_samples.source.shard_sizes):,} samples" if parts.val_samples else "; no val split"
    rows = [
        (
            "model",
            f"{c.model.name}, {count / 1e6:.2f}M parameters, {c.model.image_size} px, "
            f"{parts.train_samples.num_classes} classes, {c.train.precision}" + _elasticity(parts.engine.buffer_shapes),
        ),
        ("strategy", running),
        ("devices", device),
        (
            "batch",
            f"{c.train.global_batch_size} = {share.micro_batch_size} x {world.size} ranks x "
            f"{share.micro_steps} accumulated" + _padding(share, world.size, c.train.global_batch_size),
        ),
        ("data", parts.data.describe(parts.schedule.total_steps * c.train.global_batch_size) + val),
        (
            "length",
            f"{parts.schedule.total_steps:,} steps ({c.train.duration}), {parts.order.steps_per_epoch:,} an epoch",
        ),
        ("run", f"{parts.run.path}: {start}"),
    ]
    return "\n".join(f"{name:>9}  {text}" for name, text in rows)


def _elasticity(buffers: Iterable[str]) -> str:
    """BatchNorm computes with the statistics of a micro-batch: other ranks or micro-batches, another function."""
    norm = any(name.endswith("running_mean") for name in buffers)
    return "; BatchNorm: elastic in its data only" if norm else ""


def _padding(share: Share, ranks: int, batch: int) -> str:
    spare = share.micro_batch_size * share.micro_steps * ranks - batch
    return f" - {spare} of weight 0" if spare else ""
