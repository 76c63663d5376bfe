"""Proof, from the ledger, that training saw the samples it should have seen: each once an epoch, whatever happened.

Every rank writes, for each completed step, a digest over (slot, sample id, crc32 of the bytes it read, used or not) of
what reached the model. The audit computes the same from the index and the order's formula, follows all restarts,
world sizes and rollbacks, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pipeline.config import Config
from pipeline.data.order import OrderState, SampleOrder, key
from pipeline.data.source import Access, SampleSource, open_source
from pipeline.run import RunFolder, read_ledger, resume_points


@dataclass
class Audit:
    """What was found. `faults` is empty for a run that is as it should be."""

    steps: int = 0
    epochs: dict[int, int] = field(default_factory=dict)  # epoch -> samples consumed
    masked: int = 0
    left_out: dict[int, int] = field(default_factory=dict)  # epoch -> samples of a finished epoch that no step took
    skipped: int = 0  # positions jumped over after sick steps
    attempts: int = 0
    superseded: int = 0  # ledger lines of steps that a later start repeated
    faults: list[str] = field(default_factory=list)


def audit(config: Config, run: RunFolder, progress: Callable[[], None] = lambda: None) -> Audit:
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
    lines, superseded = read_ledger(run.path)
    if not lines:
        raise UserError(f"{run.path / 'ledger'} holds no steps: nothing was trained yet")
    source = open_source(
        config.data.train,
        "train",
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        access=Access.of(config),
    )
    last = max(lines)
    starts = sum(p["step"] < last for p in points)
    if len(lines[last]) < max(len(rows) for rows in lines.values()) and starts and not run.finished.exists():
        del lines[last]  # killed, or still running: not all ranks have written this step yet
    if not lines:
        raise UserError(f"{run.path / 'ledger'} holds no complete step yet")
    report = Audit(steps=len(lines), attempts=len(points), superseded=superseded)
    seen: dict[int, np.ndarray] = {}
    expected = _expected_steps(points, source, max(lines))
    for step, order, state, batch in expected:
        progress()
        rows = lines.pop(step, None)
        if rows is None:
            report.faults.append(f"step {step}: no rank has a ledger line for it")
            continue
        _check_step(report, step, rows, order, state, batch, source, seen)
    for step in sorted(lines):
        report.faults.append(f"step {step}: it is in the ledger, but no start of the run leads to it")
    _check_epochs(report, seen, source, points)
    return report


def _expected_steps(
    points: list[dict[str, Any]], source: SampleSource, last: int
) -> Iterator[tuple[int, SampleOrder, OrderState, int]]:
    """(step, order, its state before the step, global batch size) of every step that is live, in order."""
    for point, following in zip(points, [*points[1:], {"step": last}]):
        batch = point["global_batch_size"]
        stored = point["order"]
        if stored["manifest_sha"] != source.digest:
            raise UserError(
                f"attempt {point['attempt']} trained on other data (digest {stored['manifest_sha'][:12]}) than "
                f"{source.name} has now; audit it with data.train pointing at that set"
            )
        order = SampleOrder.resume(stored, source.shard_sizes, manifest_sha=source.digest, global_batch_size=batch)
        state = order.state
        for step in range(point["step"] + 1, following["step"] + 1):
            yield step, order, state, batch
            state = order.next_state(state)


def _check_step(
    report: Audit, step: int, rows: list[dict[str, Any]], order: SampleOrder, state: OrderState, batch: int,
    source: SampleSource, seen: dict[int, np.ndarray],
) -> None:  # fmt: skip
    where = f"step {step}"
    positions = {(r["epoch"], r["position"]) for r in rows}
    if positions != {(state.epoch, state.position)}:
        report.faults.append(
            f"{where}: ranks were at (epoch, position) {sorted(positions)}, the order says "
            f"{(state.epoch, state.position)}"
        )
        return
    ends = sorted(tuple(r["slots"]) for r in rows)
    if [a for a, _ in ends] + [batch] != [0] + [b for _, b in ends]:
        report.faults.append(f"{where}: the ranks' slots {ends} do not cover the batch of {batch} exactly once")
        return
    ids = order.sample_ids(state.epoch, state.position + np.arange(batch))
    used = np.ones(batch, dtype=bool)
    crcs = source.crc32(ids)
    for row in rows:
        for slot, sample_id, _ in row.get("masked", []):
            if ids[slot] != sample_id:
                report.faults.append(
                    f"{where}: slot {slot} is masked as sample {sample_id}, the order says {ids[slot]}"
                )
            used[slot], crcs[slot] = False, 0
    report.masked += int((~used).sum())
    for row in rows:
        first, last = row["slots"]
        slots = np.arange(first, last)
        digest = (
            key(state.position + slots, ids[slots], crcs[slots], used[slots]).sum(dtype=np.uint64)
            if last > first
            else 0
        )
        if f"{int(digest):016x}" != row["digest"]:
            report.faults.append(
                f"{where}: slots {first} to {last - 1} did not hold the samples, or the bytes, that "
                f"the order and the index say"
            )
    counts = seen.setdefault(state.epoch, np.zeros(order.num_samples, dtype=np.uint8))
    np.add.at(counts, ids, 1)
    report.epochs[state.epoch] = report.epochs.get(state.epoch, 0) + batch


def _check_epochs(
    report: Audit, seen: dict[int, np.ndarray], source: SampleSource, points: list[dict[str, Any]]
) -> None:
    """Nothing twice in an epoch; in finished ones at most B-1 left out, besides what was jumped over on purpose."""
    skips = points[-1]["order"].get("skips", [])
    for epoch, counts in sorted(seen.items()):
        twice = np.flatnonzero(counts > 1)
        if twice.size:
            report.faults.append(
                f"epoch {epoch}: {twice.size} samples were seen more than once, the first is {twice[0]}"
            )
        if epoch < max(seen):
            jumped = sum(last - first for e, first, last in skips if e == epoch)
            report.skipped += jumped
            missing = int((counts == 0).sum()) - jumped
            report.left_out[epoch] = missing
            allowed = max(p["global_batch_size"] for p in points) - 1
            if missing > allowed:
                report.faults.append(
                    f"epoch {epoch}: {missing} samples were never seen; at most {allowed} may be left out"
                )
