"""Looking at checkpoints without a training: list, verify, show, compare, prune. One process, no torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from pipeline.checkpoint.layout import CheckpointError, CheckpointReader, CheckpointUnreadable, Key
from pipeline.checkpoint.manager import Retention, best_step, committed_steps, remove_checkpoint, step_folder


@dataclass(frozen=True)
class Listed:
    """One line of a list of checkpoints."""

    step: int
    bytes: int
    files: int
    strategy: str
    world_size: int
    metrics: dict[str, float]
    best: bool
    damage: str | None  # of what can be seen without reading the data: the manifest and the files' sizes


def listing(root: Path) -> list[Listed]:
    """Every checkpoint of a run, ascending."""
    best = None
    with contextlib.suppress(CheckpointUnreadable):  # its line says why
        best = best_step(root)
    rows = []
    for step in committed_steps(root):
        folder = step_folder(root, step)
        try:
            reader = CheckpointReader(folder)
            m = reader.manifest
            rows.append(
                Listed(
                    step, sum(f.bytes for f in m.files), len(m.files), str(m.written_by.get("strategy")),
                    int(m.written_by.get("world_size", 0)), m.metrics, step == best,
                    reader.damage(m.files, content=False),
                )
            )  # fmt: skip
        except CheckpointError as e:
            rows.append(Listed(step, 0, 0, "?", 0, {}, False, str(e)))
    return rows


def verify(folder: Path) -> str | None:
    """Reads every byte; what is wrong, or None. A damaged manifest is reported, not raised."""
    try:
        reader = CheckpointReader(folder)
        reader.state()
        return reader.damage(reader.manifest.files)
    except CheckpointError as e:
        return str(e)


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between two checkpoints: `largest` absolute and `relative` (to the norm of the first)."""

    name: str
    kind: str
    largest: float
    relative: float
    note: str = ""


def differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[Difference]:
    """Tensors that are not equal bit for bit, one after the other in the order of their names."""
    keys: set[Key] = {*a.manifest.tensors, *b.manifest.tensors}
    for name, kind in sorted(keys):
        if not a.has(name, kind) or not b.has(name, kind):
            yield Difference(name, kind, 0.0, 0.0, f"only in {(a if a.has(name, kind) else b).folder.name}")
            continue
        if a.shape(name, kind) != b.shape(name, kind):
            shapes = f"{list(a.shape(name, kind))} and {list(b.shape(name, kind))}"
            yield Difference(name, kind, 0.0, 0.0, f"shapes {shapes}")
            continue
        x, y = (r.read(name, kind, 0, prod(r.shape(name, kind))) for r in (a, b))
        if not torch.equal(x, y):
            gap = (x.double() - y.double()).abs()
            yield Difference(name, kind, float(gap.max()), float(gap.norm() / x.double().norm().clamp(min=1e-30)))


def prune(root: Path, retention: Retention, dry_run: bool) -> list[int]:
    """Removes what `retention` does not keep, and returns those steps. The newest whole one always stays."""
    steps = committed_steps(root)
    good = next((s for s in reversed(steps) if verify(step_folder(root, s)) is None), None)
    obsolete = [s for s in retention.obsolete(steps, best_step(root)) if s != good]
    if good is None:
        raise CheckpointError(f"no checkpoint in {root} is whole: nothing is removed. See `mixer checkpoint verify`")
    if not dry_run:
        for step in obsolete:
            remove_checkpoint(step_folder(root, step))
    return obsolete
