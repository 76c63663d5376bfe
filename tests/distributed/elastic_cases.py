"""What a rank of a pool does in the tests of elasticity: trains a real run, and notes what reached the model."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Sequence
from typing import Any

from pipeline.build import build
from pipeline.config import load_config
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
