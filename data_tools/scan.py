"""Listing sources into numbered parts on disk: bounded memory, and a killed listing goes on at its last part.

`scan-00000.parquet` holds the rows of one part in listing order; `scan-00000.json`, written after it, its counts,
digest, labels, and the place to go on from. Parts have exactly PART_ROWS rows except the last, so that the digest of
the corpus does not depend on how it was listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools.errors import UserError
from data_tools.sources import places
from data_tools.sources.rows import SCHEMA, Source
from data_tools.storage import write_atomic
from data_tools.tables import pc, save_table

PART_ROWS = 1 << 19
_GROUP_ROWS = 1 << 14  # what a task that looks at some rows reads at least
_UNIT_THREADS = 16
SCAN_SCHEMA = SCHEMA.append(pa.field("source", pa.int16()))
_DIGEST_COLUMNS = ("path", "size", "label", "labels", "split", "group", "extra")


@dataclass(frozen=True)
class Part:
    """One part of the listing. `then` is (source, unit, rows of the unit) to go on from; None after the last."""

    rows: int
    bytes: int
    digest: str
    mtimes: str
    labels: list[str]
    labelled: int
    multi: int
    splits: list[str]
    missing: int
    ignored: dict[str, int]
    then: tuple[int, int, int] | None


@dataclass(frozen=True)
class Listing:
    """A finished listing in `folder`. `labels` are all label texts, sorted; `labelled`, `multi` and `missing` count
    samples with one label, with a list of them, and those whose file could not be examined."""

    folder: Path
    parts: list[Part]
    kind: str
    roots: tuple[str, ...]
    samples: int
    bytes: int
    digest: str
    mtimes: str
    labels: list[str]
    labelled: int
    multi: int
    missing: int
    splits: list[str]
    ignored: dict[str, int] = field(default_factory=dict)

    def part_path(self, number: int) -> Path:
        return _part_path(self.folder, number)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The parts' rows, in listing order."""
        for number in range(len(self.parts)):
            yield pq.read_table(self.part_path(number), columns=columns)


def scan_sources(sources: list[Source], folder: Path, report: Callable[[int], None] | None = None) -> Listing:
    """Lists all sources into `folder`, going on from the parts that are there. `report` is told the rows so far.

    Raises UserError where a source cannot be listed or there is not one sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = _earlier_parts(folder)
    start = parts[-1].then if parts else (0, 0, 0)
    if start is not None:
        writer = _Writer(folder, parts, report)
        prefixes = _prefixes(sources)
        for number in range(start[0], len(sources)):
            first, skip = (start[1], start[2]) if number == start[0] else (0, 0)
            for unit, batch, ignored in _listed(sources[number], first, skip):
                writer.add(number, unit, _within(batch, number, prefixes[number]) if batch else None, ignored)
        writer.close()
    total = sum(p.rows for p in parts)
    if not total:
        where = ", ".join(s.root for s in sources)
        raise UserError(f"{where}: no images found" + _explain(parts))
    return Listing(
        folder, parts, "+".join(sorted({s.kind for s in sources})), tuple(_absolute(s.root) for s in sources), total,
        sum(p.bytes for p in parts), _join([p.digest for p in parts]), _join([p.mtimes for p in parts]),
        sorted({label for p in parts for label in p.labels}), sum(p.labelled for p in parts),
        sum(p.multi for p in parts), sum(p.missing for p in parts),
        sorted({s for p in parts for s in p.splits}), dict(sorted(parts[-1].ignored.items())),
    )  # fmt: skip


def _absolute(root: str) -> str:
    return root if places.is_url(root) else os.path.abspath(root)


def _explain(parts: list[Part]) -> str:
    return f" (passed over: {', '.join(f'{n} {what}' for what, n in parts[-1].ignored.items())})" if parts else ""


def _join(digests: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(digests).encode())


def fingerprint(sources: list[Source], extra: object = None) -> str:
    """What a listing in progress belongs to."""
    states = [[s.kind, s.root, s.units(), getattr(s, "own_stamp", s.stamp)] for s in sources]
    text = json.dumps([*states, extra], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- the rows of all sources --------------------------------------------------------------------------------


def _prefixes(sources: list[Source]) -> list[bytes]:
    """What tells equal paths of several sources apart: the source's own name, numbered where two share it."""
    if len(sources) == 1:
        return [b""]
    seen: Counter[str] = Counter()
    prefixes = []
    for source in sources:
        stamp = getattr(source, "_files", None) or [getattr(source, "_file", source.root)]
        name = places.base(source.root if len(stamp) > 1 else str(stamp[0])).split(".")[0] or "source"
        seen[name] += 1
        prefixes.append(os.fsencode(name if seen[name] == 1 else f"{name}-{seen[name]}") + b"/")
    return prefixes


def _within(batch: pa.RecordBatch, source: int, prefix: bytes) -> pa.RecordBatch:
    """The batch with its source's number, and the source's prefix before every path (of the identity only)."""
    columns = list(batch.columns)
    if prefix:
        joined = pc.binary_join_element_wise(
            pa.scalar(prefix, pa.large_binary()), columns[0], pa.scalar(b"", pa.large_binary())
        )
        columns[0] = joined
    columns.append(pa.repeat(pa.scalar(source, pa.int16()), batch.num_rows))
    return pa.RecordBatch.from_arrays(columns, schema=SCAN_SCHEMA)


def prefix_bytes(sources: list[Source]) -> list[int]:
    """How many bytes of an identity are the source's prefix, by source."""
    return [len(p) for p in _prefixes(sources)]


_Item = tuple[int, "pa.RecordBatch | None", "Counter[str] | None"]


def _listed(source: Source, first: int, skip: int) -> Iterator[_Item]:
    """(unit, batch, None)... then (unit, None, what was ignored) for each unit from `first` on, less `skip` rows."""
    units = source.units()
    if not source.many_units:
        for number in range(first, len(units)):
            ignored: Counter[str] = Counter()
            yield from _skipping(number, source.batches(units[number], ignored), skip if number == first else 0)
            yield number, None, ignored
        return

    def work(number: int) -> tuple[list[pa.RecordBatch], Counter[str]]:
        ignored: Counter[str] = Counter()
        return list(source.batches(units[number], ignored)), ignored

    with ThreadPoolExecutor(_UNIT_THREADS) as pool:
        ahead: deque[tuple[int, Future[tuple[list[pa.RecordBatch], Counter[str]]]]] = deque()
        rest = iter(range(first, len(units)))
        try:
            for number in rest:
                ahead.append((number, pool.submit(work, number)))
                if len(ahead) >= 2 * _UNIT_THREADS:
                    yield from _taken(ahead, first, skip)
            while ahead:
                yield from _taken(ahead, first, skip)
        finally:
            for _, future in ahead:
                future.cancel()


def _taken(ahead: deque, first: int, skip: int) -> Iterator[_Item]:
    number, future = ahead.popleft()
    batches, ignored = future.result()
    yield from _skipping(number, iter(batches), skip if number == first else 0)
    yield number, None, ignored


def _skipping(number: int, batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[_Item]:
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        yield number, batch.slice(skip), None
        skip = 0


# --- parts --------------------------------------------------------------------------------------------------


class _Writer:
    """Cuts the stream of batches into parts and commits each."""

    def __init__(self, folder: Path, parts: list[Part], report: Callable[[int], None] | None) -> None:
        self._folder, self._parts, self._report = folder, parts, report
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0
        self._ignored: Counter[str] = Counter(parts[-1].ignored if parts else {})
        self._at = parts[-1].then if parts and parts[-1].then else (0, 0, 0)

    def add(self, source: int, unit: int, batch: pa.RecordBatch | None, ignored: Counter[str] | None) -> None:
        if ignored is not None:
            self._ignored.update(ignored)
            self._at = (source, unit + 1, 0)
        if (source, unit) != self._at[:2] and batch is not None:
            self._at = (source, unit, 0)
        while batch is not None and batch.num_rows:
            take = min(PART_ROWS - self._rows, batch.num_rows)
            self._waiting.append(batch.slice(0, take))
            self._rows += take
            self._at = (source, unit, self._at[2] + take)
            batch = batch.slice(take)
            if self._rows == PART_ROWS:
                self._commit(self._at)

    def close(self) -> None:
        self._commit(None)

    def _commit(self, then: tuple[int, int, int] | None) -> None:
        number = len(self._parts)
        table = pa.Table.from_batches(self._waiting, schema=SCAN_SCHEMA).combine_chunks()
        self._waiting, self._rows = [], 0
        part = _describe(table, dict(self._ignored), then)
        save_table(_part_path(self._folder, number), [table], _GROUP_ROWS)
        write_atomic(_part_path(self._folder, number).with_suffix(".json"), json.dumps(asdict(part)).encode())
        self._parts.append(part)
        if self._report is not None:
            self._report(sum(p.rows for p in self._parts))


def _describe(table: pa.Table, ignored: dict[str, int], then: tuple[int, int, int] | None) -> Part:
    label, labels = table.column("label"), table.column("labels")
    texts = set(pc.unique(label).to_pylist()) | set(pc.unique(pc.list_flatten(labels)).to_pylist())
    splits = {s or "train" for s in pc.unique(table.column("split")).to_pylist()}
    lost = pc.and_(pc.equal(table.column("size"), 0), pc.equal(table.column("mtime_ns"), 0))
    digest = xxhash.xxh3_128()
    for name in _DIGEST_COLUMNS:
        _update(digest, _one_array(table.column(name)))
    mtimes = table.column("mtime_ns").to_numpy()
    return Part(
        rows=table.num_rows,
        bytes=pc.sum(table.column("size")).as_py() or 0,
        digest=digest.hexdigest(),
        mtimes=xxhash.xxh3_128_hexdigest(np.ascontiguousarray(mtimes).tobytes()),
        labels=sorted(t for t in texts if t is not None),
        labelled=table.num_rows - label.null_count,
        multi=table.num_rows - labels.null_count,
        splits=sorted(splits),
        missing=pc.sum(lost).as_py() or 0,
        ignored=ignored,
        then=then,
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _update(digest: xxhash.xxh3_128, array: pa.Array | pa.ChunkedArray) -> None:
    """Feeds values to a hash, independent of how Arrow laid them out."""
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of nothing
        array = pa.array([], array.type)
    if pa.types.is_list(array.type):
        digest.update(pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False).tobytes())
        _update(digest, pc.list_flatten(array))
    elif pa.types.is_integer(array.type):
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        lengths = pc.fill_null(pc.binary_length(array), -1).cast(pa.int64())
        digest.update(lengths.to_numpy(zero_copy_only=False).tobytes())
        if array.null_count == len(array):
            return
        wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
        dense = pc.drop_null(array) if array.null_count else array
        _, offsets, data = cast("list[pa.Buffer]", dense.buffers())
        ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[dense.offset : dense.offset + len(dense) + 1]
        digest.update(memoryview(data)[int(ends[0]) : int(ends[-1])])


def _earlier_parts(folder: Path) -> list[Part]:
    parts: list[Part] = []
    for number in count():
        try:
            raw = json.loads(_part_path(folder, number).with_suffix(".json").read_bytes())
            parts.append(Part(**{**raw, "then": None if raw["then"] is None else tuple(raw["then"])}))
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return parts
    return parts


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"scan-{number:05d}.parquet"
