"""A plan on disk: `plan/plan.json` (the header) and `plan/samples-00000.parquet`, ... (the samples in tar order).

Each shard knows where its samples begin, so that a packing task reads its own slice and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import UserError
from data_tools.keys import sample_keys
from data_tools.plan import PLAN_VERSION, CorpusSummary, PlannedSample, PlannedShard, PlanOptions, ShardPlan
from data_tools.storage import write_atomic
from data_tools.tables import read_rows

PLAN_FOLDER = "plan"
DUPLICATES_NAME = "duplicates.jsonl"
SLICE_COLUMNS = [
    "path", "size", "mtime_ns", "label", "extra", "source", "container", "offset", "stored", "codec", "twin",
]  # fmt: skip
_OBJECTS = 1024  # samples that exist as objects at once


def partition_path(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.parquet"


def save_header(plan: ShardPlan, folder: Path) -> None:
    """Writes plan.json, which makes the plan exist."""
    write_atomic(folder / "plan.json", (json.dumps(asdict(plan), indent=1) + "\n").encode())


def remove_plan(folder: Path) -> None:
    """Deletes the plan in `folder`; plan.json last, so that a kill in between is safe."""
    for path in (*folder.glob("samples-*.parquet"), folder / DUPLICATES_NAME, folder / "plan.json"):
        path.unlink(missing_ok=True)


def load_plan(folder: Path) -> ShardPlan | None:
    """The plan in `folder`, None where there is none. Raises UserError for one of another version or damaged."""
    try:
        return decode_plan((folder / "plan.json").read_bytes(), str(folder.parent))
    except FileNotFoundError:
        return None


def decode_plan(header: bytes, out: str) -> ShardPlan:
    """The plan of the set at `out` from its header. Raises UserError as `load_plan` does."""
    try:
        raw: dict[str, Any] = json.loads(header)
    except ValueError as e:
        raise UserError(f"{out}/{PLAN_FOLDER}/plan.json is damaged ({e}); delete {out}") from e
    if raw.get("version") != PLAN_VERSION:
        raise UserError(
            f"{out} was planned by another release (version {raw.get('version')}, now {PLAN_VERSION}); "
            "finish it with that release, or give another output folder"
        )
    corpus = raw["corpus"]
    return ShardPlan(
        **{
            **raw,
            "corpus": CorpusSummary(
                **{**corpus, "roots": tuple(corpus["roots"]), "prefixes": tuple(corpus["prefixes"])}
            ),
            "options": PlanOptions(**raw["options"]),
            "shards": [PlannedShard(**s) for s in raw["shards"]],
        }
    )


def read_slice(folder: Path, shard: PlannedShard, prefixes: tuple[int, ...] = ()) -> list[PlannedSample]:
    """All of `iter_slice`."""
    return list(iter_slice(folder, shard, prefixes))


def iter_slice(folder: Path, shard: PlannedShard, prefixes: tuple[int, ...] = ()) -> Iterator[PlannedSample]:
    """The samples of one shard, in tar order. Raises UserError where the tables do not fit the plan.

    prefixes: those of the plan's corpus, where it has several sources; only `place` needs them.
    """
    left, partition, row = shard.samples, shard.partition, shard.row
    while left:
        path = partition_path(folder, partition)
        try:
            table = read_rows(path, row, left, SLICE_COLUMNS)
        except (OSError, pa.ArrowInvalid) as e:
            raise UserError(f"{path} does not fit its plan ({e}); delete {folder.parent}") from e
        if not table.num_rows:
            raise UserError(f"{path} does not fit its plan; delete {folder.parent}")
        for batch in table.to_batches(_OBJECTS):
            yield from _samples(batch, prefixes)
        left, partition, row = left - table.num_rows, partition + 1, 0


def _samples(batch: pa.RecordBatch, prefixes: tuple[int, ...]) -> Iterator[PlannedSample]:
    columns = dict(zip(SLICE_COLUMNS, map(_values, batch.columns)))
    paths, sources = columns.pop("path"), columns["source"]
    texts = [path.decode("utf-8", "surrogateescape") for path in paths]
    places = texts
    if any(prefixes):
        places = [os.fsdecode(path[prefixes[source] :]) for path, source in zip(paths, sources)]
    if any(columns["container"]):
        places = [os.fsdecode(inside) if inside else place for inside, place in zip(columns["container"], places)]
    return map(
        PlannedSample, sample_keys(texts, columns["twin"]), texts, columns["size"], columns["mtime_ns"],
        columns["label"], columns["extra"], sources, places, columns["offset"], columns["stored"], columns["codec"],
    )  # fmt: skip


def _values(column: pa.Array) -> list[Any]:
    """The column's values, "" for missing ones; several times as fast as `to_pylist`."""
    kind = column.type
    if column.null_count == len(column):
        return [""] * len(column)
    if column.null_count:
        return ["" if value is None else value for value in column.to_pylist()]
    if not pa.types.is_binary(kind):
        return column.to_numpy(zero_copy_only=False).tolist()
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].tolist()
    text = b"" if data is None else data.slice(ends[0], ends[-1] - ends[0]).to_pybytes()
    first = ends[0]
    return [text[a - first : b - first] for a, b in pairwise(ends)]


def iter_samples(folder: Path) -> Iterator[PlannedSample]:
    """All samples of the plan in `folder`, in tar order, one table after the other."""
    for path in sorted(folder.glob("samples-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_OBJECTS, columns=SLICE_COLUMNS):
                yield from _samples(batch, ())
