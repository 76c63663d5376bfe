"""Packing tasks as every engine runs them: which are missing, and one of them from start to end.

An engine is a way to call `run_task` for each task, somewhere. What it writes depends on the task alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.manifest import index_name
from data_tools.output import Output
from data_tools.pack import BadSample, PackedShard, PackTask, marker_path, pack_shard, read_marker
from data_tools.plan import ShardPlan
from data_tools.plan_store import PLAN_FOLDER
from data_tools.reading import Inputs
from data_tools.stores import Store, read_many


@dataclass(frozen=True)
class Task:
    """One shard: pack it into `output.folder`, then publish it."""

    pack: PackTask
    output: Output

    @property
    def name(self) -> str:
        return self.pack.shard.name


def run_task(task: Task, progress: Callable[[int, int, int], bool] | None = None) -> PackedShard:
    """Packs and publishes one shard; raises what `pack_shard` raises, UserError where a store stays out of reach."""
    packed = None
    if task.output.url is not None:  # packed by a run that ended before the upload did
        packed = read_marker(task.output.folder, task.pack.shard, task.pack.digest)
    if packed is None or not all(b.content for b in packed.bad):
        packed = pack_shard(task.pack, progress)
    task.output.publish(packed)
    return packed


def make_tasks(plan: ShardPlan, inputs: Inputs, output: Output) -> list[Task]:
    """All tasks of a plan, in its order."""
    return [Task(PackTask(output.folder, inputs, plan.digest, s, plan.options), output) for s in plan.shards]


def read_markers(store: Store, plan: ShardPlan) -> list[PackedShard | None]:
    """What the done marker of every planned shard says; None where the shard must be packed (again).

    A marker of another plan, a tar of another size or a missing index count as not done. Two listings and one
    small read a marker.
    """
    here, markers = store.list(), store.list(PLAN_FOLDER)
    names = [marker_path(Path(), s.name).name for s in plan.shards]
    there = [f"{PLAN_FOLDER}/{name}" for name in names if name in markers]
    found = dict(zip(there, map(decode_marker, read_many(store, there))))
    packed = [found.get(f"{PLAN_FOLDER}/{name}") for name in names]
    return [p if p is not None and p.digest == plan.digest and _is_there(p, here) else None for p in packed]


def decode_marker(data: bytes) -> PackedShard | None:
    """What a marker says; None for one that is damaged."""
    try:
        raw = json.loads(data)
        return PackedShard(**{**raw, "bad": [BadSample(**b) for b in raw["bad"]]})
    except (ValueError, KeyError, TypeError):
        return None


def _is_there(packed: PackedShard, files: dict[str, int]) -> bool:
    return not packed.samples or (files.get(packed.name) == packed.bytes and index_name(packed.name) in files)
