"""How far a sharding run is: counting, and showing it on a terminal or in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from data_tools.pack import PackedShard
from data_tools.plan import PlannedShard, ShardPlan

REPORT_SECONDS = 0.2
LINE_SECONDS = 5.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `done` counts images written or quarantined, `earlier` those of earlier runs among
    them; `bytes` are source bytes read by this run; `bad` are the quarantined ones of this and earlier
    runs."""

    done: int
    total: int
    earlier: int
    bad: int
    bytes: int
    shards: int
    total_shards: int


class Board:
    """Sums progress over tasks and passes it on, a few times a second."""

    def __init__(
        self, plan: ShardPlan, report: Callable[[Progress], None] | None, part: list[PlannedShard] | None = None
    ) -> None:
        """`part`: the shards that this run is to pack, where it is not the whole plan."""
        self._report = report
        shards = plan.shards if part is None else part
        self._total, self._total_shards = sum(s.samples for s in shards), len(shards)
        self._earlier = self._done = self._bad = self._bytes = self._shards = 0
        self._last = 0.0

    def finished_earlier(self, packed: PackedShard) -> None:
        """Counts a shard that a run before this one committed."""
        self._earlier += packed.samples + len(packed.bad)
        self.finished(packed, 0)

    def finished(self, packed: PackedShard, source_bytes: int) -> None:
        """Counts a shard that this run committed."""
        self._done += packed.samples + len(packed.bad)
        self._bad += len(packed.bad)
        self._bytes += source_bytes
        self._shards += 1

    def show(self, done: int = 0, bad: int = 0, source_bytes: int = 0, now: bool = False) -> None:
        """Reports unless it just did (`now`: in any case); the counts are those of tasks still running."""
        if self._report is None or (time.monotonic() - self._last < REPORT_SECONDS and not now):
            return
        self._last = time.monotonic()
        self._report(
            Progress(
                self._done + done, self._total, self._earlier, self._bad + bad, self._bytes + source_bytes,
                self._shards, self._total_shards,
            )
        )  # fmt: skip


class PlanPrinter:
    """Lines on stderr while a large corpus is listed and planned; quiet where that takes a few seconds."""

    def __init__(self) -> None:
        self._line = time.monotonic()

    def __call__(self, what: str, done: int, of: int) -> None:
        """`done` of `of` tasks; with `of` 0, images so far."""
        now = time.monotonic()
        if now - self._line >= LINE_SECONDS:
            self._line = now
            print(f"{what}: {done:,}" + (f" of {of:,} pieces" if of else " images"), file=sys.stderr, flush=True)


class ProgressPrinter(AbstractContextManager["ProgressPrinter"]):
    """A bar on a terminal, a line every few seconds elsewhere; on stderr. Call it with every `Progress`."""

    def __init__(self) -> None:
        self._begin: float | None = None
        self._line = 0.0
        self._bar = None
        self._task = None

    def __call__(self, at: Progress) -> None:
        now = time.monotonic()
        if self._begin is None:
            self._begin = self._line = now
            if at.earlier:
                print(f"going on: {at.earlier:,} of {at.total:,} images were done before", file=sys.stderr)
            if sys.stderr.isatty():
                self._start_bar(at)
        seconds = max(now - self._begin, 1e-3)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=at.done, rate=self._rates(at, seconds))
        elif now - self._line >= LINE_SECONDS:
            self._line = now
            left = (at.total - at.done) * seconds / max(at.done - at.earlier, 1)
            print(
                f"{at.done:,}/{at.total:,} images ({at.done / at.total:.0%}), shard {at.shards:,}/"
                f"{at.total_shards:,}, {self._rates(at, seconds)}, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @staticmethod
    def _rates(at: Progress, seconds: float) -> str:
        rate = (at.done - at.earlier) / seconds
        return f"{rate:,.0f} img/s, {at.bytes / seconds / 1e6:,.1f} MB/s, {at.bad:,} bad"

    def _start_bar(self, at: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("sharding"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=at.total, completed=at.earlier, rate="")
        self._bar.start()
