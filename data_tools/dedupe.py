"""Samples with the same bytes: all but the first are kept out of the plan and listed."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash

from data_tools import scan
from data_tools.errors import UserError
from data_tools.hashing import DIGEST, content_digest, read_digests
from data_tools.manifest import DatasetManifest, ShardInfo
from data_tools.plan_store import DUPLICATES_NAME
from data_tools.scan import Listing
from data_tools.stats import read_index
from data_tools.storage import write_atomic
from data_tools.stores import load_manifest, open_store


@dataclass(frozen=True)
class Dropped:
    """What is kept out: `rows` are positions in the listing, sorted. `unread`: samples that could not be compared."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    duplicates: int = 0
    held_out: int = 0
    digest: str = ""
    unread: int = 0

    def keep(self, part: int, rows: int) -> np.ndarray | None:
        """bool [rows] for one part of the listing, None where all of it is kept."""
        first = part * scan.PART_ROWS
        here = self.rows[np.searchsorted(self.rows, first) : np.searchsorted(self.rows, first + rows)]
        if not len(here):
            return None
        mask = np.ones(rows, np.bool_)
        mask[here - first] = False
        return mask


def find_dropped(listing: Listing, files: list[Path], exact: bool, held_out: np.ndarray, plan_folder: Path) -> Dropped:
    """Compares content hashes, which lie in `files` in listing order, and writes `duplicates.jsonl` beside the plan.

    held_out: content hashes (see `dataset_hashes`) of images that must not enter. Memory: 8 bytes a sample, and 50
    for each that is not alone with its hash.
    """
    rows, digests = _shared(files, exact, np.append(held_out["high"], np.uint64(0)))  # 0: those not read, to count them
    readable = (digests["high"] != 0) | (digests["low"] != 0)
    out = _is_member(digests, held_out) & readable
    first = np.arange(len(digests))
    if exact:
        order = np.lexsort((first, digests["low"], digests["high"]))
        ranked = digests[order]
        same = np.append(False, ranked[1:] == ranked[:-1])[: len(ranked)]
        starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        first[order] = order[starts]
        first[~readable] = np.flatnonzero(~readable)
    twice = (first != np.arange(len(digests))) & ~out
    drop = out | twice
    lines = _describe(listing, rows[drop], rows[first[drop]], out[drop])
    write_atomic(plan_folder / DUPLICATES_NAME, "".join(lines).encode())
    digest = xxhash.xxh3_128_hexdigest("".join(lines).encode()) if lines else ""
    return Dropped(rows[drop], int(twice.sum()), int(out.sum()), digest, int((~readable).sum()))


def _shared(files: list[Path], exact: bool, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position in the listing, content hash) of every sample whose upper 64 bits another one, or `held_out`, has."""
    wanted = held_out
    if exact:
        values = np.concatenate([read_digests(path)["high"] for path in files])
        values.sort()
        wanted = np.union1d(held_out, values[1:][values[1:] == values[:-1]])
        del values
    rows, found, at = [np.zeros(0, np.int64)], [np.zeros(0, DIGEST)], 0
    for path in files:
        digests = read_digests(path)
        here = np.flatnonzero(np.isin(digests["high"], wanted))
        rows.append(here + at)
        found.append(digests[here])
        at += len(digests)
    return np.concatenate(rows), np.concatenate(found)


def _is_member(digests: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    both = set(zip(wanted["high"].tolist(), wanted["low"].tolist()))
    pairs = zip(digests["high"].tolist(), digests["low"].tolist())
    return np.fromiter((pair in both for pair in pairs), np.bool_, len(digests))


def _describe(listing: Listing, rows: np.ndarray, kept: np.ndarray, out: np.ndarray) -> list[str]:
    """One JSON line for each dropped sample: its path, why, and the path of the one that is kept."""
    wanted = np.unique(np.concatenate([rows, kept]))
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
            if held_out
            else {"path": paths[row], "reason": "duplicate", "of": paths[first]}
        )
        + "\n"
        for row, first, held_out in zip(rows.tolist(), kept.tolist(), out.tolist())
    ]


def dataset_hashes(place: str, options: dict[str, Any] | None = None, workers: int = 4) -> tuple[str, np.ndarray]:
    """(digest, content hashes of every image) of a finished data set, here or at a URL.

    Raises UserError where there is none, or its images are not stored as their source holds them.
    """
    store = open_store(place, options)
    manifest = load_manifest(store)
    _refuse_converted(place, manifest)

    def hashes(shard: ShardInfo) -> np.ndarray:
        rows = read_index(store, shard)
        found = np.zeros(len(rows), DIGEST)
        with store.local(shard.name) as path, open(path, "rb") as tar:
            for i, (offset, size) in enumerate(zip(rows["offset"].tolist(), rows["size"].tolist())):
                tar.seek(offset)
                data = tar.read(size)
                if len(data) < size:
                    raise UserError(
                        f"--dedupe-against {place}: {shard.name} is damaged; see `mixer data verify {place}`"
                    )
                found[i] = content_digest(data)
        return found

    try:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(hashes, [s for split in manifest.splits.values() for s in split]))
    except OSError as e:
        raise UserError(f"--dedupe-against {place}: {e}") from e
    digest = xxhash.xxh3_128_hexdigest("\n".join(manifest.split_digest(s) for s in sorted(manifest.splits)).encode())
    return digest, np.concatenate([*parts, np.zeros(0, DIGEST)])


def _refuse_converted(place: str, manifest: DatasetManifest) -> None:
    """Bytes made anew equal no source's: few would be kept out. Sets without a record are taken as they are."""
    packed_with = manifest.source.get("options")
    if isinstance(packed_with, dict) and (packed_with.get("resize", 0) or packed_with.get("encode", "keep") != "keep"):
        raise UserError(
            f"--dedupe-against {place}: it was packed with --resize or --encode, so few images equal a source's.\n"
            "Pack its source without them into another folder, and give that one"
        )
