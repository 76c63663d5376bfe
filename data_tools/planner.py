"""From a listing on disk to a plan on disk, in bounded memory: an external sort in restartable steps.

1. Each part of the listing becomes a *run*: filtered, numbered, hashed, sorted, and laid into cells (row groups) by
   split and by the top bits of the order hash.
2. Each cell is gathered from all runs and sorted: a *partition* of the plan.
3. Shard boundaries are cut over each split's sizes, and the header is written.

Every file appears whole or not at all; a file that is there is not made again. Memory: one cell (about CELL_ROWS
rows), and 8 to 16 bytes for every sample of the corpus.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools import ustar
from data_tools.dedupe import Dropped
from data_tools.errors import UserError
from data_tools.keys import key_hashes, sample_key
from data_tools.plan import (
    CorpusSummary,
    PlannedShard,
    PlanOptions,
    ShardPlan,
    check_split,
    cut,
    in_val,
    order_hashes,
    plan_digest,
    split_names,
    tar_bytes,
)  # fmt: skip
from data_tools.plan_store import partition_path, save_header
from data_tools.scan import Listing
from data_tools.storage import write_atomic
from data_tools.tables import pc, save_table

CELL_ROWS = 1 << 21
SLICE_GROUP_ROWS = 1 << 12  # of a partition: what a packing task reads at least
_HASHES_AT_ONCE = 1 << 28  # samples whose key hashes are compared in one pass: 2 GiB

_RUN_COLUMNS = [
    "path", "size", "mtime_ns", "label", "extra", "source", "container", "offset", "stored", "codec", "cost", "key",
]  # fmt: skip

Report = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class Numbering:
    """What labels mean: the class index by label text, and the names (None where labels are only numbers)."""

    number: dict[str, int]
    classes: list[str] | None


def build_plan(
    listing: Listing, options: PlanOptions, numbering: Numbering, prefixes: tuple[int, ...], dropped: Dropped,
    folder: Path, work: Path, stamp: str | None = None, report: Report | None = None,
) -> ShardPlan:  # fmt: skip
    """Writes the plan of a finished listing into `folder` and returns it.

    work: a folder for the runs, which may hold those of an earlier, killed attempt at the same plan; the caller
    deletes it. Raises UserError where a split would be empty, an image is listed twice, `val_fraction` meets an
    explicit val split.
    """
    runs = _Runs(listing, options, numbering, dropped, work)
    for number in range(len(listing.parts)):
        runs.make(number)
        _tell(report, "sorting", number + 1, len(listing.parts))
    counts = runs.split_counts()
    check_split(counts, options)
    twins = _find_twins(runs)
    shards: list[PlannedShard] = []
    partition = total = size = 0
    groups = runs.groups()
    for number, split in enumerate(runs.splits):
        first = partition
        for cells in (group for group in groups if group[0][0] == number):
            if not partition_path(folder, partition).exists():
                save_table(partition_path(folder, partition), [runs.gather(cells, twins)], SLICE_GROUP_ROWS)
            partition += 1
            _tell(report, "merging", partition, len(groups))
        if partition > first:
            made, images = _cut_split(split, folder, range(first, partition), options)
            shards += made
            total += sum(s.samples for s in made)
            size += images
    if not shards:
        raise UserError("not one image is left to shard: all are duplicates or held out")
    summary = CorpusSummary(
        listing.kind, listing.roots, prefixes, total, size, listing.samples, dropped.duplicates, dropped.held_out,
        listing.digest, listing.mtimes, listing.ignored, stamp,
    )  # fmt: skip
    digest = plan_digest(listing.kind, listing.digest, options, numbering.classes, dropped.digest)
    plan = ShardPlan(summary, options, numbering.classes, shards, digest)
    save_header(plan, folder)
    return plan


def _tell(report: Report | None, what: str, done: int, of: int) -> None:
    if report is not None:
        report(what, done, of)


def clear(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)


# --- runs ---------------------------------------------------------------------------------------------------


class _Runs:
    """The sorted runs of a plan in the making."""

    def __init__(
        self, listing: Listing, options: PlanOptions, numbering: Numbering, dropped: Dropped, work: Path
    ) -> None:
        self.splits = split_names(listing.splits, options)
        self._listing, self._options, self._dropped, self._work = listing, options, dropped, work
        self._numbering = numbering
        self._texts = pa.array(list(numbering.number), pa.string())
        self._indices = pa.array(list(numbering.number.values()), pa.int32())
        self._shuffled = options.order == "shuffled"
        cells = max(1, -(-listing.samples // CELL_ROWS))
        self._bits = (cells - 1).bit_length() if self._shuffled else 0
        self._layout: list[dict[tuple[int, int], tuple[int, int]]] = []  # a run: cell -> (row group, rows)
        work.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        return self._work / f"run-{number:05d}.parquet"

    def make(self, number: int) -> None:
        """Sorts one part of the listing into a run, unless that is there."""
        note = self.path(number).with_suffix(".json")
        if not note.exists():
            cells = self._sorted_cells(number)
            empty = {} if cells else {(-1, 0): self._table(pq.read_table(self._listing.part_path(number)).slice(0, 0))}
            starts = save_table(self.path(number), (cells or empty).values())
            layout = [[s, b, g, t.num_rows] for ((s, b), t), g in zip(cells.items(), starts)]
            write_atomic(note, json.dumps(layout).encode())
        self._layout.append({(s, b): (g, n) for s, b, g, n in json.loads(note.read_bytes())})

    def _sorted_cells(self, number: int) -> dict[tuple[int, int], pa.Table]:
        part = pq.read_table(self._listing.part_path(number))
        keep = self._dropped.keep(number, part.num_rows)
        if keep is not None:
            part = part.filter(pa.array(keep))
        if not part.num_rows:
            return {}
        table = self._table(part)
        split = self._split_numbers(part, table.column("path").to_pylist())
        order = table.column("hash").to_numpy()
        if self._shuffled:
            bucket = (order >> np.uint64(64 - self._bits)).astype(np.int64) if self._bits else np.zeros(len(order), int)
            by = np.argsort(order, kind="stable")
        else:
            bucket = np.full(len(order), number)
            by = np.arange(len(order))
        by = by[np.argsort(split[by], kind="stable")]
        table, split, bucket = table.take(by), split[by], bucket[by]
        ends = np.flatnonzero(np.diff(split) | np.diff(bucket)) + 1
        begins = [0, *ends.tolist()]
        return {
            (int(split[a]), int(bucket[a])): table.slice(a, b - a) for a, b in zip(begins, [*begins[1:], len(split)])
        }

    def _table(self, part: pa.Table) -> pa.Table:
        """The columns of a run, for some rows of the listing, in their order."""
        paths = part.column("path").to_pylist()
        label = pc.fill_null(pc.take(self._indices, pc.index_in(part.column("label"), self._texts)), -1)
        part = part.set_column(part.schema.get_field_index("label"), "label", label.cast(pa.int32()))
        if part.column("labels").null_count < part.num_rows:
            extra = self._with_labels(part.column("extra").to_pylist(), part.column("labels").to_pylist())
            part = part.set_column(part.schema.get_field_index("extra"), "extra", pa.array(extra, pa.large_string()))
        extra_bytes = pc.fill_null(pc.binary_length(part.column("extra")), 0).to_numpy()
        cost = tar_bytes(part.column("size").to_numpy(), part.column("label").to_numpy(), extra_bytes)
        part = part.append_column("cost", pa.array(cost))
        part = part.append_column("key", pa.array(np.array(key_hashes(paths), np.uint64)))
        return part.select(_RUN_COLUMNS).append_column("hash", pa.array(order_hashes(paths, self._options.seed)))

    def _with_labels(self, extra: list[str | None], labels: list[list[str] | None]) -> list[str | None]:
        """Class indices of samples with several labels enter their `.json` member."""
        number = self._numbering.number
        made = []
        for text, several in zip(extra, labels):
            if several is not None:
                record = {"labels": [number[t] for t in several], **json.loads(text or "{}")}
                text = json.dumps(record, separators=(",", ":"))
            made.append(text)
        return made

    def _split_numbers(self, part: pa.Table, paths: list[bytes]) -> np.ndarray:
        named = pc.fill_null(part.column("split"), "train")
        names = pa.array(self.splits, pa.string())
        split = pc.index_in(named, names).to_numpy().astype(np.int64)
        if self._options.val_fraction:
            values = paths
            if self._options.group_by is not None:
                groups = part.column("group").to_pylist()
                values = [p if g is None else os.fsencode(g) for g, p in zip(groups, paths)]
            val = in_val(values, self._options.val_fraction, self._options.seed)
            split[val & (split == 0)] = len(self.splits) - 1
        return split

    def groups(self) -> list[list[tuple[int, int]]]:
        """The cells that hold samples, in plan order, small neighbours of one split together: a partition each."""
        sizes: dict[tuple[int, int], int] = defaultdict(int)
        for layout in self._layout:
            for cell, (_, rows) in layout.items():
                sizes[cell] += rows
        groups: list[list[tuple[int, int]]] = []
        total = 0
        for cell in sorted(sizes):
            if not groups or groups[-1][0][0] != cell[0] or total + sizes[cell] > CELL_ROWS:
                groups.append([])
                total = 0
            groups[-1].append(cell)
            total += sizes[cell]
        return groups

    def split_counts(self) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        for layout in self._layout:
            for (split, _), (_, rows) in layout.items():
                counts[self.splits[split]] += rows
        return counts

    def gather(self, cells: list[tuple[int, int]], twins: np.ndarray) -> pa.Table:
        """The samples of neighbouring cells from all runs, in tar order."""
        pieces = []
        for number, layout in enumerate(self._layout):
            mine = [layout[cell][0] for cell in cells if cell in layout]  # a part's cell is one row group
            if mine:
                with pq.ParquetFile(self.path(number), memory_map=True) as file:
                    pieces.append(file.read_row_groups(mine))
        table = pa.concat_tables(pieces)
        del pieces
        if self._shuffled:
            table = table.take(np.argsort(table.column("hash").to_numpy(), kind="stable"))
        twin = np.isin(table.column("key").to_numpy(), twins)
        return table.drop_columns(["hash", "key"]).append_column("twin", pa.array(twin))

    def key_columns(self, columns: Iterable[str] = ("key",)) -> Iterable[tuple[int, pa.Table]]:
        for number in range(len(self._layout)):
            yield number, pq.read_table(self.path(number), columns=list(columns), memory_map=True)

    @property
    def rows(self) -> int:
        return sum(rows for layout in self._layout for _, rows in layout.values())


# --- samples that would share a key -------------------------------------------------------------------------


def _find_twins(runs: _Runs) -> np.ndarray:
    """The key hashes (sorted, uint64) that more than one sample has: those samples get longer keys.

    Raises UserError where the same image is listed twice.
    """
    passes = max(1, -(-runs.rows // _HASHES_AT_ONCE))
    shared = [_repeated(_collect(runs, number, passes)) for number in range(passes)]
    twins = np.sort(np.concatenate(shared))
    if len(twins):
        _refuse_repeated_paths(runs, twins)
        _refuse_repeated_keys(runs, twins)
    return twins


def _collect(runs: _Runs, number: int, passes: int) -> np.ndarray:
    """The key hashes of one pass, sorted."""
    parts = []
    for _, table in runs.key_columns():
        values = table.column("key").to_numpy()
        parts.append(values if passes == 1 else values[values % np.uint64(passes) == number])
    values = np.concatenate(parts)
    del parts
    values.sort()
    return values


def _repeated(values: np.ndarray) -> np.ndarray:
    return np.unique(values[1:][values[1:] == values[:-1]])


def _refuse_repeated_paths(runs: _Runs, twins: np.ndarray) -> None:
    hashes = [np.zeros(0, np.uint64)]
    for _, table in runs.key_columns(("key", "hash")):
        hashes.append(table.column("hash").to_numpy()[np.isin(table.column("key").to_numpy(), twins)])
    repeated = _repeated(np.sort(np.concatenate(hashes)))
    if not len(repeated):
        return
    seen: set[bytes] = set()
    for _, table in runs.key_columns(("hash", "path")):
        hits = pc.filter(table.column("path"), pa.array(np.isin(table.column("hash").to_numpy(), repeated[:1000])))
        for path in hits.to_pylist():
            if path in seen:
                raise UserError(
                    f"{os.fsdecode(path)!r} is listed twice (as {len(repeated):,} in all are); list every image once"
                )
            seen.add(path)


def _refuse_repeated_keys(runs: _Runs, twins: np.ndarray) -> None:
    """A longer key may still be another sample's own: only where someone tried to make it so."""
    longer: dict[int, bytes] = {}
    for _, table in runs.key_columns(("key", "path")):
        mine = pc.filter(table.column("path"), pa.array(np.isin(table.column("key").to_numpy(), twins))).to_pylist()
        keys = [sample_key(path, twin=True).encode() + b".jpg" for path in mine]
        for path, value in zip(mine, key_hashes(keys)):
            if value in longer:
                raise UserError(f"{os.fsdecode(path)!r} and {os.fsdecode(longer[value])!r} would get the same key")
            longer[value] = path
    values = np.sort(np.array(list(longer), np.uint64))
    for _, table in runs.key_columns(("key", "path")):
        hit = np.isin(table.column("key").to_numpy(), values)
        if hit.any():
            path = table.column("path")[int(np.flatnonzero(hit)[0])].as_py()
            raise UserError(f"the key of {os.fsdecode(path)!r} is needed for another image; rename one of them")


# --- shards -------------------------------------------------------------------------------------------------


def _cut_split(split: str, folder: Path, partitions: range, options: PlanOptions) -> tuple[list[PlannedShard], int]:
    """(shards of one split, bytes of its images)."""
    rows: list[int] = []
    costs = []
    images = 0
    for number in partitions:
        table = pq.read_table(partition_path(folder, number), columns=["cost", "size"])
        costs.append(table.column("cost").to_numpy())
        images += pc.sum(table.column("size")).as_py() or 0
        rows.append(table.num_rows)
    cost = np.concatenate(costs)
    del costs
    ends = cut(cost, options)
    begins = np.append(0, ends[:-1])
    sizes = np.add.reduceat(cost, begins)
    first_rows = np.append(0, np.cumsum(rows)[:-1])
    at = np.searchsorted(first_rows, begins, side="right") - 1
    return [
        PlannedShard(
            f"{split}-{n:06d}.tar", split, int(ends[n] - begins[n]), int(sizes[n]) + len(ustar.END),
            partitions[0] + int(at[n]), int(begins[n] - first_rows[at[n]]),
        )
        for n in range(len(ends))
    ], images  # fmt: skip
