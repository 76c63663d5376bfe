"""Is a finished data set what its manifest says? Reads every byte; trusts neither our tar writer nor our index.

The tars are walked with Python's `tarfile`, images are decoded again, and each is compared with its index row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_tools.checksum import crc32
from data_tools.errors import UserError
from data_tools.finalize import QUARANTINE_NAME
from data_tools.images import BadImage, check_image
from data_tools.index import key_hash
from data_tools.manifest import DatasetManifest, ShardInfo
from data_tools.parallel import map_processes
from data_tools.stats import read_index
from data_tools.storage import is_url
from data_tools.stores import Store, load_manifest, open_store
from data_tools.tar_samples import BadLabel, Part, TarSample, read_label, walk_tar

_CHUNK = 1 << 20


class Damage(NamedTuple):
    """One thing that is wrong; `key` is empty where it concerns the whole shard, `shard` where the whole set."""

    shard: str
    key: str
    what: str


@dataclass(frozen=True)
class _Job:
    """One shard to check; `bad` are the keys that are known to be left out of its index."""

    place: str
    options: dict[str, Any]
    shard: ShardInfo
    decode: bool
    label: str
    classes: list[str] | None
    bad: frozenset[str] = field(default_factory=frozenset)


def verify_dataset(
    folder: str | Path,
    decode: bool = True,
    workers: int = 0,
    report: Callable[[ShardInfo], None] | None = None,
    storage_options: dict[str, Any] | None = None,
) -> list[Damage]:
    """Checks every shard of the data set in `folder` (or at a URL); an empty list means that all is as written.

    workers: processes, 0 for one a core. `report` is called with each shard that was checked. Raises UserError
    where there is no manifest.
    """
    store = open_store(folder, storage_options)
    manifest = load_manifest(store)
    shards = [s for split in manifest.splits.values() for s in split]
    bad = _known_bad(store)
    label = manifest.source.get("label", "cls")
    jobs = [
        _Job(str(folder), storage_options or {}, s, decode, label, manifest.classes, bad.get(s.name, frozenset()))
        for s in shards
    ]
    found: list[Damage] = []
    keys: list[np.ndarray] = []
    for shard, (damage, hashes) in zip(shards, map_processes(_verify_shard, jobs, workers)):
        found += damage
        keys.append(hashes)
        if report is not None:
            report(shard)
    return found + list(_set_problems(store, manifest, shards, keys))


def _known_bad(store: Store) -> dict[str, frozenset[str]]:
    try:
        lines = [json.loads(line) for line in store.read(QUARANTINE_NAME).splitlines()]
    except (FileNotFoundError, ValueError):
        return {}
    shards = {line.get("shard", "") for line in lines}
    return {s: frozenset(str(line.get("path")) for line in lines if line.get("shard") == s) for s in shards}


def _set_problems(
    store: Store, manifest: DatasetManifest, shards: list[ShardInfo], keys: list[np.ndarray]
) -> Iterator[Damage]:
    listed = {s.name for s in shards} | {s.index_name for s in shards}
    if len({s.name for s in shards}) < len(shards):
        yield Damage("", "", "the manifest lists a shard twice")
    for name in sorted(store.list()):
        if name.endswith((".tar", ".idx.npy")) and name not in listed:
            yield Damage(name, "", "is not in the manifest")
    hashes = np.concatenate([*keys, np.zeros(0, np.uint64)])
    owner = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for at in same[:100].tolist():
        one, two = (shards[owner[order[i]]].name for i in (at, at + 1))
        yield Damage(two, "", f"a key is also in {one}" if one != two else "a key occurs twice")
    for split, infos in manifest.splits.items():
        counted = manifest.stats.get(split, {}).get("samples")
        if counted is not None and counted != sum(s.samples for s in infos):
            yield Damage("", "", f"split {split}: {counted} samples in the statistics, not the sum of its shards")


# --- one shard ----------------------------------------------------------------------------------------------


def _verify_shard(job: _Job) -> tuple[list[Damage], np.ndarray]:
    """(what is wrong, the key hashes of its index)."""
    store = open_store(job.place, job.options)
    found: list[Damage] = []
    rows: np.ndarray | None = None

    def problem(what: str, key: str = "") -> None:
        found.append(Damage(job.shard.name, key, what))

    try:
        index = store.read(job.shard.index_name)
        if xxhash.xxh3_128_hexdigest(index) != job.shard.index_hash:
            problem(f"hash of {job.shard.index_name} differs from the manifest")
        rows = read_index(store, job.shard)
    except FileNotFoundError:
        problem(f"{job.shard.index_name} is missing; run `mixer data index`")
    except UserError as e:
        problem(str(e))
    try:
        with store.local(job.shard.name) as tar:
            for key, what in _tar_problems(tar, job, rows):
                problem(what, key)
    except FileNotFoundError:
        problem("is missing")
    except (OSError, UserError) as e:
        problem(str(e).replace(f"{job.place}/", "") if not is_url(job.place) else str(e))
    return found, np.zeros(0, np.uint64) if rows is None else rows["key"]


def _tar_problems(tar: Path, job: _Job, rows: np.ndarray | None) -> Iterator[tuple[str, str]]:
    shard = job.shard
    if (size := tar.stat().st_size) != shard.bytes:
        yield "", f"{size} bytes, the manifest says {shard.bytes}"
    elif _file_hash(tar) != shard.hash:
        yield "", "hash differs from the manifest"
    if rows is None:
        return
    if len(rows) != shard.samples:
        yield "", f"the index has {len(rows)} rows, the manifest says {shard.samples}"
    unseen = {int(offset): number for number, offset in enumerate(rows["offset"])}
    images = 0
    classes = {name: i for i, name in enumerate(job.classes)} if job.classes is not None else None
    with open(tar, "rb", buffering=0) as raw:

        def read(part: Part) -> bytes:
            return os.pread(raw.fileno(), part.size, part.offset)

        try:
            for sample in walk_tar(tar):
                if sample.image is None or sample.key in job.bad:
                    continue
                images += 1
                number = unseen.pop(sample.parts[sample.image].offset, None)
                if number is None:
                    yield sample.key, "is not in the index"
                    continue
                for what in _sample_problems(sample, rows[number], read, job, classes):
                    yield sample.key, what
        except UserError as e:
            yield "", str(e).replace(f"{tar} ", "")
    if unseen:
        first = min(unseen.values())
        yield (
            "",
            f"{images} images in the tar, {len(rows)} in the index; {len(unseen)} rows point at none (the first is "
            f"row {first})",
        )


def _sample_problems(
    sample: TarSample, row: np.void, read: Callable[[Part], bytes], job: _Job, classes: dict[str, int] | None
) -> Iterator[str]:
    for suffix in sample.repeated:
        yield f"two members .{suffix}"
    assert sample.image is not None
    part = sample.parts[sample.image]
    data = read(part)
    if key_hash(sample.key) != row["key"]:
        yield "key differs from the index"
    if part.size != row["size"]:
        yield f"{part.size} bytes, the index says {row['size']}"
    if crc32(data) != row["crc32"]:
        yield "crc32 differs from the index"
    try:
        label = read_label(sample, read, job.label, classes)
        if label != row["label"]:
            yield f"label {label}, the index says {row['label']}"
        elif job.classes is not None and label >= len(job.classes):
            yield f"label {label}, there are {len(job.classes)} classes"
    except BadLabel as e:
        yield str(e)
    try:
        info = check_image(data, max_pixels=2**62, decode=job.decode)
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
