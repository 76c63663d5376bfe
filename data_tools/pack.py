"""One packing task: a slice of the plan in, one committed shard out.

The bytes of a shard are a pure function of its slice and of the images, so it does not matter which process,
on which machine, at which attempt, packs it. Commit order: tar, index, done marker; a shard exists if and
only if its marker does. Memory: one image, a write buffer, and the slice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from data_tools.checksum import crc32
from data_tools.images import BadImage, check_image
from data_tools.index import index_bytes, key_hash
from data_tools.manifest import ShardInfo, index_name
from data_tools.plan import PlannedSample, PlannedShard, PlanOptions
from data_tools.plan_store import PLAN_FOLDER, read_slice
from data_tools.reading import Inputs, SampleReader, UnreadableImage
from data_tools.storage import atomic_file, write_atomic
from data_tools.tar_writer import HashedTar
from data_tools.transform import convert, converts


@dataclass(frozen=True)
class PackTask:
    """One shard to pack into `out`; `inputs` says how to reach its images."""

    out: Path
    inputs: Inputs
    digest: str
    shard: PlannedShard
    options: PlanOptions


@dataclass(frozen=True)
class BadSample:
    """A quarantined image. `content` is False where the file could not be read: permissions may be mended."""

    path: str
    reason: str
    content: bool = True


@dataclass(frozen=True)
class PackedShard:
    """The done marker. Without a single good image there is no tar, and `samples` is 0."""

    digest: str
    name: str
    split: str
    samples: int
    bytes: int
    hash: str
    index_hash: str
    bad: list[BadSample]

    def info(self) -> ShardInfo:
        return ShardInfo(self.name, self.samples, self.bytes, self.hash, self.index_hash)


class Stopped(Exception):
    """The run was asked to stop; what this task had written is removed."""


def pack_shard(task: PackTask, progress: Callable[[int, int, int], bool] | None = None) -> PackedShard:
    """Packs and commits one shard; returns what its marker says.

    `progress(samples, bad, source bytes)` is called after every image, with the counts of this task; when it
    returns False the task ends with Stopped. Raises UserError where an image is not what was planned (its
    size or change time differs), OSError for trouble with the disk. Either way nothing of the shard is
    visible.
    """
    slice_ = read_slice(task.out / PLAN_FOLDER, task.shard, task.inputs.prefixes)
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    bad: list[BadSample] = []
    read = 0
    tar_path = task.out / task.shard.name
    with atomic_file(tar_path, sync_name=False) as file, SampleReader(task.inputs) as reader:
        tar = HashedTar(file)
        for number, (sample, data) in enumerate(reader.read_all(slice_), 1):
            try:
                if isinstance(data, BadImage):
                    raise data
                read += len(data)
                rows.append(_append(tar, sample, data, task.options))
            except BadImage as e:
                bad.append(BadSample(sample.path, str(e), content=not isinstance(e, UnreadableImage)))
            if progress is not None and not progress(number, len(bad), read):
                raise Stopped
        tar.close()
    index = index_bytes(rows)
    if rows:
        write_atomic(task.out / index_name(task.shard.name), index)
    else:
        tar_path.unlink()
    packed = PackedShard(
        task.digest, task.shard.name, task.shard.split, len(rows), tar.offset if rows else 0, tar.hexdigest(),
        xxhash.xxh3_128_hexdigest(index), bad,
    )  # fmt: skip
    write_atomic(marker_path(task.out, packed.name), (json.dumps(asdict(packed)) + "\n").encode())
    return packed


def _append(
    tar: HashedTar, sample: PlannedSample, data: bytes, options: PlanOptions
) -> tuple[int, int, int, int, int, int, int]:
    """Writes the image member, with a label its `.cls`, with extra columns its `.json`; returns the index row.

    Raises BadImage before anything is written.
    """
    converting = converts(options)
    info = check_image(data, options.max_pixels, options.verify and not converting)
    if converting:
        data, info = convert(data, info, options)
    offset = tar.add(f"{sample.key}.{info.suffix}", data)
    if sample.label >= 0:
        tar.add(f"{sample.key}.cls", b"%d" % sample.label)
    if sample.extra:
        tar.add(f"{sample.key}.json", sample.extra.encode())
    return key_hash(sample.key), offset, len(data), crc32(data), sample.label, info.width, info.height


# --- markers ------------------------------------------------------------------------------------------------


def marker_path(out: Path, shard_name: str) -> Path:
    return out / PLAN_FOLDER / (shard_name.removesuffix(".tar") + ".done.json")


def read_marker(out: Path, shard: PlannedShard, digest: str) -> PackedShard | None:
    """What the shard's done marker says; None where the shard must be packed (again).

    A marker of another plan, a tar of another size or a missing index count as not done.
    """
    try:
        raw = json.loads(marker_path(out, shard.name).read_bytes())
        packed = PackedShard(**{**raw, "bad": [BadSample(**b) for b in raw["bad"]]})
        if packed.samples:
            if (out / packed.name).stat().st_size != packed.bytes:
                return None
            (out / index_name(packed.name)).stat()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return packed if packed.digest == digest else None
