"""A plan on disk: `plan/plan.json` (the header) and `plan/samples-00000.parquet`, ... (the samples in tar order).

Each shard knows where its samples begin, so that a packing task reads its own slice and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import UserError
from data_tools.keys import sample_key
from data_tools.plan import PLAN_VERSION, CorpusSummary, PlannedSample, PlannedShard, PlanOptions, ShardPlan
from data_tools.storage import write_atomic

PLAN_FOLDER = "plan"
DUPLICATES_NAME = "duplicates.jsonl"
SLICE_COLUMNS = [
    "path", "size", "mtime_ns", "label", "extra", "source", "container", "offset", "stored", "codec", "twin",
]  # fmt: skip


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
    """The samples of one shard, in tar order. Raises UserError where the tables do not fit the plan.

    prefixes: those of the plan's corpus, where it has several sources; only `place` needs them.
    """
    samples: list[PlannedSample] = []
    partition, row = shard.partition, shard.row
    while len(samples) < shard.samples:
        path = partition_path(folder, partition)
        try:
            table = _rows(path, row, shard.samples - len(samples))
        except (OSError, pa.ArrowInvalid) as e:
            raise UserError(f"{path} does not fit its plan ({e}); delete {folder.parent}") from e
        if not table.num_rows:
            raise UserError(f"{path} does not fit its plan; delete {folder.parent}")
        samples += _samples(table, prefixes)
        partition, row = partition + 1, 0
    return samples


def _rows(path: Path, start: int, length: int) -> pa.Table:
    """Rows [start, start + length) of a table, fewer at its end; reads only the row groups that hold them."""
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ends = np.cumsum(groups)
        first = int(np.searchsorted(ends, start, side="right"))
        last = min(int(np.searchsorted(ends, start + length)), len(groups) - 1)
        if first >= len(groups):
            return file.schema_arrow.empty_table()
        table = file.read_row_groups(list(range(first, last + 1)), columns=SLICE_COLUMNS)
        return table.slice(start - (int(ends[first - 1]) if first else 0), length)


def _samples(table: pa.Table, prefixes: tuple[int, ...]) -> list[PlannedSample]:
    columns = [_values(table.column(name)) for name in SLICE_COLUMNS]
    found: list[PlannedSample] = []
    for path, size, mtime, label, extra, source, container, offset, stored, codec, twin in zip(*columns):
        text = path.decode("utf-8", "surrogateescape")
        if container:
            place = os.fsdecode(container)
        else:
            place = os.fsdecode(path[prefixes[source] :]) if prefixes and prefixes[source] else text
        found.append(
            PlannedSample(
                sample_key(path, twin), text, size, mtime, label, extra or "", source, place, offset, stored, codec
            )
        )
    return found


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The column's values; numbers by way of numpy, which is several times as fast."""
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy().tolist()
    return column.to_pylist()


def iter_samples(folder: Path) -> Iterator[PlannedSample]:
    """All samples of the plan in `folder`, in tar order, one table after the other."""
    for path in sorted(folder.glob("samples-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=SLICE_COLUMNS):
                yield from _samples(pa.Table.from_batches([batch]), ())
