"""Saving as the training loop sees it: begun at a step, booked when it has ended, tried again where it failed.

What is written and how is `pipeline.checkpoint`'s; that a failed or slow save does not end a training is this file's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from pipeline.checkpoint.layout import CheckpointError
from pipeline.checkpoint.manager import best_score, score
from pipeline.checkpoint.stager import BackgroundSaver, SaveResult
from pipeline.health import Watchdog
from pipeline.parts import Parts
from pipeline.report import Report

RETRY_SAVE_SECONDS = 60.0
LONGEST_SAVE = 4  # times a collective's timeout: so many stages of a save wait for each other. Then it hangs


class Saves:
    """The saves of one start of a training. Collective: every rank calls the same methods at the same steps."""

    def __init__(self, parts: Parts, report: Report, watchdog: Watchdog):
        self._parts, self._report, self._watchdog = parts, report, watchdog
        self.saver = BackgroundSaver(parts.checkpoints, parts.world, background=parts.config.checkpoint.background)
        self._begun_at = -1
        self._last, self._retry_at = time.monotonic(), math.inf

    def stand_at(self, step: int) -> None:
        """The state is that of a checkpoint; -1: of none."""
        self._report.saved_at = self._begun_at = step

    def prepare(self) -> None:
        """Takes the staging memory, once the state is in place."""
        self.saver.prepare([*self._parts.engine.owned(), *self._parts.average.pieces()])

    def start_clock(self) -> None:
        self._last = time.monotonic()

    def overdue(self) -> bool:
        """Whether a clock says to save: that of checkpoint.every, or of the retry of a failed save."""
        now, every = time.monotonic(), self._parts.schedule.save_every
        return now >= self._retry_at or (isinstance(every, float) and now - self._last >= every)

    def has(self, step: int) -> bool:
        """Whether this step is saved, or being saved."""
        return self._begun_at == step

    def begin(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Saves this step; what is written is a copy, so training goes on meanwhile.

        `state`: all that a checkpoint holds besides tensors; `metrics`: of an evaluation at this very step.
        """
        started = time.perf_counter()
        self._begun_at = step
        engine, average, report = self._parts.engine, self._parts.average, self._report
        slow = self.saver.busy
        previous, written = self._until_written(), None
        with self._watchdog.busy("saving"):
            self.saver.save(
                step,
                [*engine.owned(), *average.pieces()],
                tensors=engine.tensors() | average.tensors(),
                state=state,
                metrics=metrics,
                written_by={
                    **self._parts.written_by(),
                    "attempt": report.attempt,
                    "best": self._parts.config.checkpoint.best,
                },
            )
        if not self._parts.config.checkpoint.background:
            written = self._until_written()
        self._last, self._retry_at = time.monotonic(), math.inf
        stall = time.perf_counter() - started
        report.clock.stall += stall
        if slow and previous:
            report.record("slow_save", step=previous.step, seconds=round(previous.seconds, 3))
            report.say(
                f"warning: saving step {previous.step} took {previous.seconds:.1f} s, until after the next was due; "
                f"training waited {stall:.1f} s: save less often, or to a faster disk"
            )
        self._book(previous)
        self._book(written)

    def look(self) -> None:
        """Takes note of a save that has ended since the last look."""
        self._book(self.saver.poll())

    def wait(self) -> None:
        """Until no save is in flight; how the last one ended is noted."""
        self._book(self._until_written())

    def _until_written(self) -> SaveResult | None:
        """Waits until no rank's save is in flight; the next one has a group whose connections stand."""
        world, watchdog = self._parts.world, self._watchdog
        with watchdog.busy("saving"):
            for _ in watchdog.rounds(LONGEST_SAVE * world.timeout_s):
                ended = self.saver.ended_within(watchdog.round_s)
                writing, lost = world.sum([not ended, self.saver.lost_group])
                if not writing:
                    break
            if lost:
                self.saver.renew_group()
        return self.saver.wait()

    def finish(self, step: int, save: Callable[[], None]) -> None:
        """Waits for the save of this step; has `save` called again where it failed.

        Raises:
            CheckpointError: it could not be saved in three more tries.
        """
        for _ in range(3):
            self.wait()
            if self.has(step):
                return
            save()
        self.wait()
        if not self.has(step):
            run = self._parts.run
            raise CheckpointError(
                f"step {step} could not be saved; {run.path} stands at step {self._report.saved_at}. See "
                f"save_failed in {run.events}, then `mixer resume {run.path}`"
            )

    def is_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether these metrics beat every saved checkpoint's: such a step is worth keeping."""
        world, metric = self._parts.world, self._parts.config.checkpoint.best
        if not world.is_main:
            return world.broadcast(None)
        mine = score(metrics, metric)
        try:
            best = best_score(self._parts.run.checkpoints, metric)
        except (OSError, CheckpointError) as e:  # the others wait for an answer: not known to be the best
            self._report.say(f"warning: step {step} is not compared with the saved checkpoints: {e}")
            return world.broadcast(False)
        return world.broadcast(mine is not None and (best is None or mine > best[0]))

    def _book(self, result: SaveResult | None) -> None:
        """A failed save warns and is tried again; the last good checkpoint stays."""
        if result is None:
            return
        report = self._report
        if result.error:
            self._retry_at = time.monotonic() + RETRY_SAVE_SECONDS
            if self._begun_at == result.step:
                self._begun_at = -1
            report.record("save_failed", step=result.step, why=result.error)
            report.say(f"warning: checkpoint at step {result.step} failed, the previous one stays: {result.error}")
            return
        report.saved_at = result.step
        if result.warning:
            report.record("mirror_failed", step=result.step, why=result.warning)
            report.say(f"warning: {result.warning}")
        seconds = {"seconds": round(result.seconds, 3), "stall": round(result.stall, 4)}
        report.record("save", step=result.step, **seconds, **self._parts.written_by())
        report.weights(result.step)
