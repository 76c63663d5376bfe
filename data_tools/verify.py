"""Is a finished data set what its manifest says? Reads every byte; trusts neither our tar writer nor our
index.

The tars are walked with Python's `tarfile`, images are decoded again, and each is compared with its index
row.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.images import BadImage, check_image
from data_tools.index import key_hash
from data_tools.manifest import DatasetManifest, ShardInfo, load_index

_CHUNK = 1 << 20


class Damage(NamedTuple):
    """One thing that is wrong; `key` is empty where it concerns the whole shard."""

    shard: str
    key: str
    what: str


def verify_dataset(
    folder: Path, decode: bool = True, workers: int = 0, report: Callable[[ShardInfo], None] | None = None
) -> list[Damage]:
    """Checks every shard of the data set in `folder`; an empty list means that all is as written.

    workers: threads, 0 for one a core. `report` is called with each shard that was checked. Raises UserError
    where there is no manifest.
    """
    shards = [s for split in DatasetManifest.load(folder).splits.values() for s in split]
    found: list[Damage] = []
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for shard, damage in zip(shards, pool.map(partial(_verify_shard, folder, decode=decode), shards)):
            found += damage
            if report is not None:
                report(shard)
    return found


def _verify_shard(folder: Path, shard: ShardInfo, decode: bool) -> list[Damage]:
    return [Damage(shard.name, key, what) for key, what in _problems(folder, shard, decode)]


def _problems(folder: Path, shard: ShardInfo, decode: bool) -> Iterator[tuple[str, str]]:
    tar, index = folder / shard.name, folder / shard.index_name
    try:
        if tar.stat().st_size != shard.bytes:
            yield "", f"{tar.stat().st_size} bytes, the manifest says {shard.bytes}"
        elif _file_hash(tar) != shard.hash:
            yield "", "hash differs from the manifest"
        if _file_hash(index) != shard.index_hash:
            yield "", f"hash of {shard.index_name} differs from the manifest"
        rows = load_index(index, mmap=False)
    except (OSError, UserError) as e:
        yield "", str(e)
        return
    if len(rows) != shard.samples:
        yield "", f"the index has {len(rows)} rows, the manifest says {shard.samples}"
    yield from _compare_members(tar, rows, decode)


def _compare_members(tar: Path, rows: np.ndarray, decode: bool) -> Iterator[tuple[str, str]]:
    number = -1
    try:
        with tarfile.open(tar, "r:") as archive, open(tar, "rb") as raw:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                raw.seek(member.offset_data)
                data = raw.read(member.size)
                if suffix == "cls":
                    label = int(rows["label"][number]) if 0 <= number < len(rows) else None
                    if data != b"%d" % (-1 if label is None else label):
                        yield key, f"label {data!r}, the index says {label}"
                    continue
                if suffix == "json":  # extra columns, several labels
                    continue
                number += 1
                if number < len(rows):
                    yield from ((key, what) for what in _compare_row(rows[number], member, key, data, decode))
    except (tarfile.TarError, OSError) as e:
        yield "", f"tar cannot be read to its end: {e}"
    if number + 1 != len(rows):
        yield "", f"{number + 1} images in the tar, {len(rows)} in the index"


def _compare_row(row: np.void, member: tarfile.TarInfo, key: str, data: bytes, decode: bool) -> Iterator[str]:
    if key_hash(key) != row["key"]:
        yield "key differs from the index"
    if (member.offset_data, member.size) != (row["offset"], row["size"]):
        yield (
            f"{member.size} bytes at {member.offset_data}, the index says {row['size']} at {row['offset']}"
        )
    if zlib.crc32(data) != row["crc32"]:
        yield "crc32 differs from the index"
    try:
        info = check_image(data, max_pixels=2**62, decode=decode)
    except BadImage as e:
        yield str(e)
        return
    if row["width"] and (info.width, info.height) != (row["width"], row["height"]):
        yield f"{info.width} x {info.height} pixels, the index says {row['width']} x {row['height']}"


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
