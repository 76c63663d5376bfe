"""What a rank of a pool does in the tests of elasticity: trains a real run, and notes what reached the model."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from pipeline.build import build
from pipeline.checkpoint import manager
from pipeline.checkpoint.manager import CheckpointManager, Retention
from pipeline.config import load_config
from pipeline.data.feed import Feed
from pipeline.data.loader import PADDING, Batch, Share
from pipeline.parallel.world import World
from pipeline.run import RunFolder
from pipeline.trainer import Trainer

Seen = dict[int, dict[int, tuple[int, str]]]  # step -> slot -> (sample id, digest of all that makes up its row)


class RecordingTrainer(Trainer):
    """A trainer that keeps, for each slot of each step, a digest of pixels, partner, weights, label and masks."""

    seen: Seen

    def _step(self, batches: list[Batch], end: int) -> bool:
        self.seen[self.step + 1] = slots_of(self.parts.share, batches)
        return super()._step(batches, end)


def slots_of(share: Share, batches: list[Batch]) -> dict[int, tuple[int, str]]:
    rows: dict[int, tuple[int, str]] = {}
    slot = share.first
    for b in batches:
        for row in range(len(b.ids)):
            if b.ids[row] == PADDING:
                continue
            partner = int(b.partners[row]) if len(b.partners) else row
            digest = hashlib.sha256()
            for part in (b.images[[row, partner]], b.labels[[row, partner]], b.keep[row], b.weights[row], b.crc32[row]):
                digest.update(part.numpy().tobytes())
            digest.update(b.mix[row].numpy().tobytes() if len(b.mix) else b"")
            rows[slot] = int(b.ids[row]), digest.hexdigest()
            slot += 1
    assert slot == share.last
    return rows


class SpikeTrainer(Trainer):
    """A trainer on whose last rank the loss of some samples is far too large: they are bad, wherever they are met."""

    bad: Sequence[int]  # positions

    def _step(self, batches: list[Batch], end: int) -> bool:
        engine = self.parts.engine
        usual = engine.loss_fn
        if self.parts.order.state.position in self.bad and self.world.rank == self.world.size - 1:
            engine.loss_fn = lambda logits, labels: 30 * usual(logits, labels)
        try:
            return super()._step(batches, end)
        finally:
            engine.loss_fn = usual


def train_with_spikes(world: World, run_dir: str, overrides: Sequence[str], bad: Sequence[int]) -> None:
    """A whole run, with spikes of the loss at the steps that begin at the positions `bad`."""
    trainer = SpikeTrainer(build(load_config(None, [*overrides, f"run.dir={run_dir}"]).config, world), quiet=True)
    trainer.bad = bad
    trainer.train()


class SlowTrainer(Trainer):
    """A trainer whose last rank waits 60 ms longer for each of its batches."""

    def _next(self, feed: Feed) -> list[Batch] | None:
        if self.world.rank == self.world.size - 1:
            usual = feed.next
            feed.next = lambda *args, **options: time.sleep(0.06) or usual(*args, **options)  # type: ignore[method-assign]
            try:
                return super()._next(feed)
            finally:
                feed.next = usual  # type: ignore[method-assign]
        return super()._next(feed)


def train_with_slow_data(world: World, run_dir: str, overrides: Sequence[str]) -> list[str]:
    """A whole run; what it said."""
    trainer = SlowTrainer(build(load_config(None, [*overrides, f"run.dir={run_dir}"]).config, world), quiet=True)
    said: list[str] = []
    trainer.report.say = said.append  # type: ignore[method-assign]
    trainer.train()
    return said


def train_with_a_late_file(world: World, run_dir: str, overrides: Sequence[str]) -> None:
    """A whole run; the last rank's file of the first save comes later than a collective waits."""
    hasty = replace(world, timeout_s=2.0)
    usual, late = manager.write_pieces, [world.rank == world.size - 1]

    def write_pieces(*args: Any) -> Any:
        if late.pop() if late else False:
            time.sleep(5)
        return usual(*args)

    manager.write_pieces = write_pieces
    try:
        Trainer(build(load_config(None, [*overrides, f"run.dir={run_dir}"]).config, hasty), quiet=True).train()
    finally:
        manager.write_pieces = usual
        world.set_timeouts()


def look_for_shared(world: World, folders: Sequence[str]) -> str | None:
    """What this rank is told of its checkpoint folder, one for each rank."""
    try:
        CheckpointManager(Path(folders[world.rank]), world, Retention()).check_shared()
    except UserError as e:
        return str(e)
    return None


def train_part(world: World, run_dir: str, overrides: Sequence[str], stop_at: int | None) -> Seen:
    """Goes on with a run, from wherever it stands, up to `stop_at` completed steps."""
    config = load_config(None, [*overrides, f"run.dir={run_dir}"]).config
    # The ranks of a pool are daemons, so that none outlives a test; those may not start a loader's workers by default
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if world.is_main:
        RunFolder(run_dir).path.mkdir(parents=True, exist_ok=True)
    world.barrier()
    trainer: Any = RecordingTrainer(build(config, world), quiet=True)
    trainer.seen = {}
    trainer.train(stop_at)
    return trainer.seen
