"""A plan on disk: `plan/plan.json` (the header) and `plan/samples.jsonl` (one line a sample, in tar order).

Each shard knows its byte range of samples.jsonl, so that a packing task reads its own slice and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.plan import PLAN_VERSION, CorpusSummary, PlannedSample, PlannedShard, PlanOptions, ShardPlan
from data_tools.storage import atomic_file, write_all, write_atomic

PLAN_FOLDER = "plan"


def save_plan(plan: ShardPlan, samples: Iterable[PlannedSample], folder: Path) -> ShardPlan:
    """Writes the plan into `folder` (plan.json last) and returns it with the shards' slices filled in."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(samples)
    shards: list[PlannedShard] = []
    offset = 0
    with atomic_file(folder / "samples.jsonl") as file:
        for shard in plan.shards:
            data = b"".join(_line(next(rest)) for _ in range(shard.samples))
            write_all(file, data)
            shards.append(replace(shard, offset=offset, length=len(data)))
            offset += len(data)
    plan = replace(plan, shards=shards)
    write_atomic(folder / "plan.json", (json.dumps(asdict(plan), indent=1) + "\n").encode())
    return plan


def _line(sample: PlannedSample) -> bytes:
    return json.dumps(list(sample), separators=(",", ":")).encode() + b"\n"


def load_plan(folder: Path) -> ShardPlan | None:
    """The plan in `folder`, None where there is none. Raises UserError for one of another version or
    damaged."""
    try:
        raw: dict[str, Any] = json.loads((folder / "plan.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{folder / 'plan.json'} is damaged ({e}); delete {folder.parent}") from e
    if raw.get("version") != PLAN_VERSION:
        raise UserError(
            f"{folder} was planned by another release (version {raw.get('version')}, now {PLAN_VERSION}); "
            "finish it with that release, or give another output folder"
        )
    return ShardPlan(
        **{
            **raw,
            "corpus": CorpusSummary(**raw["corpus"]),
            "options": PlanOptions(**raw["options"]),
            "shards": [PlannedShard(**s) for s in raw["shards"]],
        }
    )


def read_slice(folder: Path, shard: PlannedShard) -> list[PlannedSample]:
    """The samples of one shard, in tar order. Raises UserError where samples.jsonl does not fit the plan."""
    with open(folder / "samples.jsonl", "rb") as file:
        file.seek(shard.offset)
        lines = file.read(shard.length).splitlines()
    if len(lines) != shard.samples:
        raise UserError(f"{folder / 'samples.jsonl'} does not fit its plan; delete {folder.parent}")
    return [PlannedSample(*json.loads(line)) for line in lines]


def iter_samples(folder: Path) -> Iterator[PlannedSample]:
    """All samples of the plan in `folder`, in tar order."""
    with open(folder / "samples.jsonl", "rb") as file:
        for line in file:
            yield PlannedSample(*json.loads(line))


# --- continuing ---------------------------------------------------------------------------------------------


def describe_change(old: ShardPlan, new: ShardPlan, samples: list[PlannedSample], folder: Path) -> str | None:
    """What keeps a run with plan `new` from continuing `old`; None where it can go on."""
    before, now = asdict(old.options), asdict(new.options)
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
    if old.corpus.digest != new.corpus.digest or old.classes != new.classes:
        changed.append(_corpus_change(samples, folder))
    elif old.corpus.mtimes != new.corpus.mtimes:
        changed.append(f"files were written again since ({_first_rewritten(samples, folder)})")
    elif old.digest != new.digest and not changed:
        changed.append("the kind of corpus")
    return "; ".join(changed) or None


def _corpus_change(samples: list[PlannedSample], folder: Path) -> str:
    before = {s.path: (s.size, s.label) for s in iter_samples(folder)}
    now = {s.path: (s.size, s.label) for s in samples}
    groups = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "of another size or label": sorted(p for p in before.keys() & now.keys() if before[p] != now[p]),
    }
    parts = [f"{len(paths)} {what} (first: {paths[0]!r})" for what, paths in groups.items() if paths]
    return "the corpus changed: " + (", ".join(parts) or "its order, its splits or its classes")


def _first_rewritten(samples: list[PlannedSample], folder: Path) -> str:
    before = {s.path: s.mtime_ns for s in iter_samples(folder)}
    paths = [s.path for s in samples if before.get(s.path) != s.mtime_ns]
    return f"{len(paths)}, the first is {min(paths)!r}"
