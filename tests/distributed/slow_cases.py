"""What a rank of a pool does in the tests of ranks that differ: slow data, a late file, a folder of its own."""

from __future__ import annotations

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
from pipeline.data.loader import Batch
from pipeline.parallel.world import World
from pipeline.trainer import Trainer


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
    usual, waits = manager.write_pieces, [5.0] if world.rank == world.size - 1 else []

    def write_pieces(*args: Any) -> Any:
        while waits:
            time.sleep(waits.pop())
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
