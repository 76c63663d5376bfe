"""Proof, from the ledger, that training saw the samples it should have seen: each once an epoch, whatever happened.

Every rank writes, for each completed step, a digest over (slot, sample id, crc32 of the bytes it read, used or not) of
what reached the model. The audit computes the same from the index and the order's formula, follows all restarts,
world sizes, rollbacks and changes of data, and compares, some steps at a time: its memory does not grow with the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pipeline.audit_epochs import EpochReport, Epochs
from pipeline.checkpoint.place import committed_steps
from pipeline.config import Config
from pipeline.data.order import Order, key
from pipeline.data.sets import TrainingData
from pipeline.data.source import SampleSource
from pipeline.inputs import open_training_data
from pipeline.ledger import LedgerReader, Segment, ledger_ranks
from pipeline.run import RunFolder, last_live_steps, resume_points

WINDOW_SLOTS = 1 << 18  # looked at together


@dataclass
class Audit:
    """What was found. `faults` is empty for a run that is as it should be."""

    steps: int = 0
    epochs: list[EpochReport] = field(default_factory=list)
    masked: list[tuple[int, int, int, str]] = field(default_factory=list)  # (step, slot, sample id, why)
    attempts: int = 0
    superseded: int = 0  # ledger entries of steps that a later start repeated
    faults: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Samples passed over after sick steps."""
        return sum(len(e.jumped) for e in self.epochs)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of it, for a file: every sample that was not consumed, and why."""
        yield {"steps": self.steps, "attempts": self.attempts, "superseded": self.superseded, "faults": self.faults}
        for e in self.epochs:
            left_out = None if e.left_out is None else e.left_out.tolist()
            row = {"set": e.name, "epoch": e.epoch, "samples": e.samples, "left_out": left_out}
            yield {**row, "passed_over": e.jumped.tolist()} if len(e.jumped) else row
        for step, slot, sample_id, why in self.masked:
            yield {"masked": sample_id, "step": step, "slot": slot, "why": why}


def audit(config: Config, run: RunFolder, progress: Callable[[int], None] = lambda steps: None) -> Audit:
    """Checks every live step of a run. Raises UserError where there is nothing to check."""
    points = resume_points(run.path)
    if not points:
        raise UserError(f"{run.path} has no start in {run.events.name}: nothing was trained yet")
    unknown = [p["attempt"] for p in points if "order" not in p]
    if unknown:
        raise UserError(
            f"{run.events}: attempt {unknown[0]} was started by a release that did not record where in the order it "
            "began, so it cannot be audited"
        )
    ranks = ledger_ranks(run.ledger)
    if not ranks:
        raise UserError(f"{run.ledger} holds no steps: nothing was trained yet")
    report = Audit(attempts=len(points))
    ledger = _Ledger(run, ranks, [p["attempt"] for p in points], report)
    sets = _Data(config, run, points)
    for era in _eras(points):
        data = sets.of(era[0])
        epochs = Epochs(data, era)
        crcs = _Crc32(data.source)
        for point in era:
            following = points[points.index(point) + 1 :][:1]
            end = following[0]["step"] + 1 if following else None
            order = data.resume(point["order"], global_batch_size=point["global_batch_size"], facts=run.data)
            for window in ledger.windows(point, end, finished=run.finished.exists()):
                _check(window, order, crcs, epochs, report)
                report.steps += window.steps
                progress(window.steps)
        epochs.close()
        report.epochs += epochs.reports
        report.faults += epochs.faults
    ledger.close()
    if not report.steps and not report.faults:
        raise UserError(f"{run.ledger} holds no complete step yet")
    saved = max(committed_steps(run.checkpoints), default=0)
    if saved > ledger.last:
        report.faults.append(f"step {ledger.last + 1} to {saved}: no ledger line, but a checkpoint that includes them")
    return report


def _eras(points: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Runs of starts on the same data."""

    def identity(point: dict[str, Any]) -> list[Any]:
        return [(s["manifest_sha"], s.get("quota")) for s in point["order"].get("sets", [point["order"]])]

    era: list[dict[str, Any]] = []
    for point in points:
        if era and identity(point) != identity(era[-1]):
            yield era
            era = []
        era.append(point)
    yield era


class _Data:
    """What each attempt trained on: where the configuration says, else where it was when the attempt began."""

    def __init__(self, config: Config, run: RunFolder, points: list[dict[str, Any]]):
        self._config, self._run = config, run
        self._opened: dict[str, TrainingData | UserError] = {}
        self._said = {"train": config.data.train, "subset": config.data.subset}
        now = self._open(self._said)
        if isinstance(now, TrainingData) and not any(now.matches(p["order"]) for p in points):
            raise self._refusal(points[-1], now)

    def of(self, point: dict[str, Any]) -> TrainingData:
        """Raises UserError where neither holds what the attempt's order speaks of."""
        now = self._open(self._said)
        for data in (now, self._open(point.get("data", self._said))):
            if isinstance(data, TrainingData) and data.matches(point["order"]):
                return data
        raise self._refusal(point, now)

    def _open(self, where: dict[str, Any]) -> TrainingData | UserError:
        name = json.dumps(where)
        if name not in self._opened:
            try:
                config = replace(self._config, data=replace(self._config.data, **where))
                self._opened[name] = open_training_data(config)
            except UserError as e:
                self._opened[name] = e
        return self._opened[name]

    def _refusal(self, point: dict[str, Any], now: TrainingData | UserError) -> UserError:
        why = now if isinstance(now, UserError) else now.difference(point["order"], self._run.data)
        return UserError(
            f"attempt {point['attempt']} trained on other data than data.train names now ({why}); audit it with "
            "data.train pointing at that data"
        )


class _Crc32:
    """What the bytes of samples should have; the index of a shard is read when the first of its samples comes up."""

    def __init__(self, source: SampleSource):
        self._source = source
        self._starts = np.cumsum([0, *source.shard_sizes])
        self._table = np.empty(self._starts[-1], dtype=np.uint32)
        self._read = np.zeros(len(source.shard_sizes), dtype=bool)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        for shard in np.unique(shards[~self._read[shards]]):
            first, last = int(self._starts[shard]), int(self._starts[shard + 1])
            self._table[first:last] = self._source.crc32(np.arange(first, last))
            self._read[shard] = True
        return self._table[ids].astype(np.int64)


@dataclass
class Window:
    """What all ranks say of some consecutive steps: arrays [ranks, steps]; `masked` by column."""

    first_step: int
    have: np.ndarray
    digest: np.ndarray
    epoch: np.ndarray
    position: np.ndarray
    first: np.ndarray
    last: np.ndarray
    masked: dict[int, list[tuple[int, int, str]]]

    @property
    def steps(self) -> int:
        return self.have.shape[1]

    def cut(self, steps: int) -> Window:
        arrays = {name: getattr(self, name)[:, :steps] for name in _ARRAYS}
        return replace(self, masked={c: m for c, m in self.masked.items() if c < steps}, **arrays)


_ARRAYS = ("have", "digest", "epoch", "position", "first", "last")


class _Cursor:
    """One rank's live segments, taken in order."""

    def __init__(self, reader: LedgerReader, live: dict[int, int]):
        self.rank, self._segments, self._live = reader.rank, iter(reader), live
        self._held: Segment | None = None
        self.superseded = 0

    def peek(self) -> Segment | None:
        while self._held is None:
            segment = next(self._segments, None)
            if segment is None:
                return None
            self.put(segment.part(segment.step, self._live.get(segment.attempt, sys.maxsize - 1) + 1))
            self.superseded += len(segment.digests) - (len(self._held.digests) if self._held else 0)
        return self._held

    def put(self, segment: Segment | None) -> None:
        self._held = segment if segment is not None and len(segment.digests) else None


class _Ledger:
    """The ledgers of all ranks, side by side."""

    def __init__(self, run: RunFolder, ranks: list[int], attempts: list[int], report: Audit):
        live = last_live_steps(run.path)
        self._cursors = [_Cursor(LedgerReader(run.ledger, r), live) for r in ranks]
        self._to_come = set(attempts)
        self._report = report
        self.last = 0  # step that some rank has told of

    def windows(self, point: dict[str, Any], end: int | None, finished: bool) -> Iterator[Window]:
        """Steps after `point` and before `end`; None: as far as the ledger goes.

        Where training was killed or is still running, not every rank may have written the last step yet: it is left
        out.
        """
        attempt, start = point["attempt"], point["step"] + 1
        self._to_come.discard(attempt)
        length = max(1, min(1024, WINDOW_SLOTS // point["global_batch_size"]))
        while end is None or start < end:
            window = self._window(attempt, start, min(start + length, end or sys.maxsize))
            if end is None and not any(c.peek() for c in self._cursors):
                told = np.flatnonzero(window.have.any(axis=0))
                steps = int(told[-1]) + 1 if len(told) else 0
                if steps and not finished and window.have[:, steps - 1].sum() < point["world_size"]:
                    steps -= 1
                self.last = max(self.last, start + steps - 1)
                if steps:
                    yield window.cut(steps)
                return
            start += window.steps
            self.last = start - 1
            yield window

    def close(self) -> None:
        for cursor in self._cursors:
            while segment := cursor.peek():
                self._stray(cursor, segment)
                cursor.put(None)
        self._report.superseded = sum(c.superseded for c in self._cursors)

    def _stray(self, cursor: _Cursor, s: Segment) -> None:
        steps = f"step {s.step}" if len(s.digests) == 1 else f"steps {s.step} to {s.end - 1}"
        self._report.faults.append(
            f"{steps}: rank {cursor.rank} tells of attempt {s.attempt}, but no start of the run leads there"
        )

    def _window(self, attempt: int, start: int, end: int) -> Window:
        shape = (len(self._cursors), end - start)
        numbers = [np.zeros(shape, dtype=np.int64) for _ in range(4)]
        w = Window(start, np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.uint64), *numbers, masked={})
        for row, cursor in enumerate(self._cursors):
            while segment := cursor.peek():
                if segment.attempt != attempt:
                    if segment.attempt in self._to_come:
                        break
                    self._stray(cursor, segment)
                    cursor.put(None)
                    continue
                if segment.step >= end:
                    break
                if segment.step < start:
                    self._stray(cursor, segment.part(segment.step, start))
                cursor.put(segment.part(end, segment.end) if segment.end > end else None)
                self._fill(w, row, segment.part(start, end), cursor)
        return w

    def _fill(self, w: Window, row: int, s: Segment, cursor: _Cursor) -> None:
        at = slice(s.step - w.first_step, s.step - w.first_step + len(s.digests))
        if w.have[row, at].any():
            self._report.faults.append(f"step {s.step}: rank {cursor.rank} tells of it twice")
        w.have[row, at] = True
        w.digest[row, at] = s.digests
        w.epoch[row, at] = s.epoch
        w.position[row, at] = s.position + s.batch * np.arange(len(s.digests))
        w.first[row, at], w.last[row, at] = s.first, s.last
        for step, masked in s.masked.items():
            w.masked.setdefault(step - w.first_step, []).extend(masked)


def _check(w: Window, order: Order, crcs: _Crc32, epochs: Epochs, report: Audit) -> None:
    """Compares a window with what the order and the index say. Moves the order's state past it."""
    batch, slots = order.global_batch_size, np.arange(order.global_batch_size)
    states = []
    for _ in range(w.steps):
        states.append(order.state)
        order.state = order.next_state(order.state)
    of_epoch = np.array([s.epoch for s in states])
    positions = np.array([s.position for s in states])[:, None] + slots
    ids, sample_epochs = np.empty_like(positions), np.empty_like(positions)
    for epoch in np.unique(of_epoch):
        rows = of_epoch == epoch
        ids[rows], sample_epochs[rows] = order.draw(int(epoch), positions[rows])
    used, expected_crcs = np.ones(ids.shape, dtype=bool), crcs(ids)
    for column, masked in w.masked.items():
        for slot, sample_id, why in masked:
            if not 0 <= slot < batch or ids[column, slot] != sample_id:
                report.faults.append(
                    f"step {w.first_step + column}: slot {slot} is masked as sample {sample_id}, which the order does "
                    "not have there"
                )
                continue
            used[column, slot], expected_crcs[column, slot] = False, 0
            report.masked.append((w.first_step + column, slot, sample_id, why))
    keys = key(positions, ids, expected_crcs, used)
    sums = np.concatenate([np.zeros((w.steps, 1), dtype=np.uint64), np.cumsum(keys, axis=1, dtype=np.uint64)], axis=1)
    counted = np.zeros(w.steps, dtype=bool)
    for column, state in enumerate(states):
        counted[column] = _check_step(w, column, state, sums[column], batch, report)
    epochs.add(ids[counted], sample_epochs[counted], order.state)


def _check_step(w: Window, column: int, state: Any, sums: np.ndarray, batch: int, report: Audit) -> bool:
    """Whether every slot of the step was taken by one rank, at the right position."""
    where = f"step {w.first_step + column}"
    rows = np.flatnonzero(w.have[:, column])
    if not len(rows):
        report.faults.append(f"{where}: no rank has a ledger line for it")
        return False
    at_epoch, at = w.epoch[rows, column], w.position[rows, column]
    if (at_epoch != state.epoch).any() or (at != state.position).any():
        told = sorted(set(zip(at_epoch.tolist(), at.tolist())))
        report.faults.append(
            f"{where}: ranks were at (epoch, position) {told}, the order says {(state.epoch, state.position)}"
        )
        return False
    first, last = w.first[rows, column], w.last[rows, column]
    if first[0] != 0 or last[-1] != batch or (first[1:] != last[:-1]).any():
        ends = list(zip(first.tolist(), last.tolist()))
        shown = ends if len(ends) < 9 else f"of {len(ends)} ranks"
        report.faults.append(f"{where}: the ranks' slots {shown} do not cover the batch of {batch} exactly once")
        return False
    for row in np.flatnonzero(w.digest[rows, column] != sums[last] - sums[first]):
        report.faults.append(
            f"{where}: slots {first[row]} to {last[row] - 1} did not hold the samples, or the bytes, that the order "
            "and the index say"
        )
    return True
