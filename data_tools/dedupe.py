"""Samples with the same bytes: found by content hash, all but the first kept out of the plan and listed.

Hashing is cut into tasks of BLOCK_ROWS samples, each a file that appears whole or not at all, so that a killed run
goes on. A content hash is xxh3_128 of the encoded bytes, as they lie in the source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import xxhash

from data_tools import scan
from data_tools.errors import UserError
from data_tools.manifest import DatasetManifest, load_index
from data_tools.plan_store import DUPLICATES_NAME
from data_tools.scan import Listing
from data_tools.storage import atomic_file, write_all, write_atomic

BLOCK_ROWS = 4096
_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])  # both 0: could not be read, so it cannot be compared


@dataclass(frozen=True)
class Dropped:
    """What is kept out: `rows` are positions in the listing, sorted."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    duplicates: int = 0
    held_out: int = 0
    digest: str = ""

    def keep(self, part: int, rows: int) -> np.ndarray | None:
        """bool [rows] for one part of the listing, None where all of it is kept."""
        first = part * scan.PART_ROWS
        here = self.rows[np.searchsorted(self.rows, first) : np.searchsorted(self.rows, first + rows)]
        if not len(here):
            return None
        mask = np.ones(rows, np.bool_)
        mask[here - first] = False
        return mask


@dataclass(frozen=True)
class HashTask:
    """One block of samples whose content is hashed: rows [start, stop) of one part, into `out`."""

    part: Path
    start: int
    stop: int
    out: Path


def hash_tasks(listing: Listing, folder: Path) -> list[HashTask]:
    """All blocks, in listing order."""
    return [
        HashTask(listing.part_path(n), at, min(at + BLOCK_ROWS, part.rows), folder / f"hash-{n:05d}-{at:07d}.npy")
        for n, part in enumerate(listing.parts)
        for at in range(0, part.rows, BLOCK_ROWS)
    ]


def run_hash_task(task: HashTask, read: Callable[[dict], bytes | None]) -> None:
    """Hashes one block. `read` gives the bytes of one row of the listing, None where it cannot."""
    rows = pq.read_table(task.part).slice(task.start, task.stop - task.start).to_pylist()
    digests = np.zeros(len(rows), _DTYPE)
    for i, row in enumerate(rows):
        data = read(row)
        if data is not None:
            digests[i] = _split_digest(xxhash.xxh3_128_intdigest(data))
    with atomic_file(task.out) as file:
        write_all(file, digests.tobytes())


def _split_digest(value: int) -> tuple[int, int]:
    return value >> 64, value & 0xFFFFFFFFFFFFFFFF


def find_dropped(listing: Listing, folder: Path, exact: bool, held_out: np.ndarray, plan_folder: Path) -> Dropped:
    """Compares the hashes that the tasks left in `folder` and writes `duplicates.jsonl` beside the plan.

    held_out: content hashes (see `dataset_hashes`) of images that must not enter.
    """
    digests = np.concatenate([np.fromfile(t.out, _DTYPE) for t in hash_tasks(listing, folder)])
    readable = (digests["high"] != 0) | (digests["low"] != 0)
    out = _is_member(digests, held_out) & readable if len(held_out) else np.zeros(len(digests), np.bool_)
    first = np.arange(len(digests))
    if exact:
        order = np.lexsort((np.arange(len(digests)), digests["low"], digests["high"]))
        ranked = digests[order]
        same = np.append(False, ranked[1:] == ranked[:-1])
        starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        first[order] = order[starts]
        first[~readable] = np.flatnonzero(~readable)
    twice = (first != np.arange(len(digests))) & ~out
    rows = np.flatnonzero(out | twice)
    lines = _describe(listing, rows, first, out)
    write_atomic(plan_folder / DUPLICATES_NAME, "".join(lines).encode())
    digest = xxhash.xxh3_128_hexdigest("".join(lines).encode()) if len(rows) else ""
    return Dropped(rows, int(twice.sum()), int(out.sum()), digest)


def _is_member(digests: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    candidates = np.isin(digests["high"], wanted["high"])
    both = set(zip(wanted["high"].tolist(), wanted["low"].tolist()))
    for i in np.flatnonzero(candidates):
        candidates[i] = (int(digests["high"][i]), int(digests["low"][i])) in both
    return candidates


def _describe(listing: Listing, rows: np.ndarray, first: np.ndarray, out: np.ndarray) -> list[str]:
    """One JSON line for each dropped sample: its path, why, and the path of the one that is kept."""
    wanted = np.unique(np.concatenate([rows, first[rows]]))
    paths: dict[int, str] = {}
    for number in range(len(listing.parts)):
        here = wanted[(wanted >= number * scan.PART_ROWS) & (wanted < (number + 1) * scan.PART_ROWS)]
        if len(here):
            column = pq.read_table(listing.part_path(number), columns=["path"]).column("path")
            for row, path in zip(here.tolist(), column.take(here - number * scan.PART_ROWS).to_pylist()):
                paths[row] = os.fsdecode(path)
    return [
        json.dumps(
            {"path": paths[row], "reason": "held out"}
            if out[row]
            else {"path": paths[row], "reason": "duplicate", "of": paths[int(first[row])]}
        )
        + "\n"
        for row in rows.tolist()
    ]


def dataset_hashes(folder: Path, workers: int = 4) -> tuple[str, np.ndarray]:
    """(digest, content hashes of every image) of a finished data set. Raises UserError where it is none."""
    manifest = DatasetManifest.load(folder)
    shards = [s for split in manifest.splits.values() for s in split]

    def hashes(name: str, index: str) -> list[tuple[int, int]]:
        rows = load_index(folder / index)
        with open(folder / name, "rb") as tar:
            found = []
            for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist()):
                tar.seek(offset)
                found.append(_split_digest(xxhash.xxh3_128_intdigest(tar.read(size))))
        return found

    try:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(lambda s: hashes(s.name, s.index_name), shards))
    except OSError as e:
        raise UserError(f"--dedupe-against {folder}: {e}") from e
    digest = xxhash.xxh3_128_hexdigest("\n".join(manifest.split_digest(s) for s in sorted(manifest.splits)).encode())
    return digest, np.array([h for part in parts for h in part], _DTYPE)
