"""One packing task: a slice of the plan in, one committed shard out.

The bytes of a shard are a pure function of its slice and of the images, so it does not matter which process,
on which machine, at which attempt, packs it. Commit order: tar, index, done marker; a shard exists if and
only if its marker does. Memory: one image, a write buffer, and the slice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from data_tools.checksum import crc32
from data_tools.images import BadImage, ImageInfo, check_images
from data_tools.index import IndexRow, index_bytes, key_hash
from data_tools.manifest import ShardInfo, index_name
from data_tools.plan import PlannedSample, PlannedShard, PlanOptions
from data_tools.plan_store import PLAN_FOLDER, iter_slice
from data_tools.reading import Inputs, SampleReader, UnreadableImage
from data_tools.storage import atomic_file, write_atomic
from data_tools.tar_writer import HashedTar
from data_tools.transform import convert, converts

Progress = Callable[[int, int, int], bool]

_BATCH_BYTES, _BATCH_IMAGES = 1 << 20, 1024  # what is read before it is looked at


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


def pack_shard(task: PackTask, progress: Progress | None = None) -> PackedShard:
    """Packs and commits one shard; returns what its marker says.

    `progress(samples, bad, bytes of good images)` is called after every image (after a few of them where nothing is
    decoded), with the counts of this task; when it returns False the task ends with Stopped. Raises UserError where
    an image is not what was planned (its size or change time differs), OSError for trouble with the disk. Either way
    nothing of the shard is visible.
    """
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps up to 40 MB for these few small reads
    slice_ = iter_slice(task.out / PLAN_FOLDER, task.shard, task.inputs.prefixes)
    progress = progress or (lambda *_: True)
    rows: list[IndexRow] = []
    bad: list[BadSample] = []
    options = task.options
    converting = converts(options)
    decode = options.verify and not converting
    number = read = 0
    tar_path = task.out / task.shard.name
    with atomic_file(tar_path, sync_name=False) as file, SampleReader(task.inputs) as reader:
        tar = HashedTar(file)
        for samples, images in _batches(reader.read_all(slice_)):
            last = number + len(samples)
            for sample, data, info in zip(samples, images, check_images(images, options.max_pixels, decode)):
                number += 1
                try:
                    if isinstance(data, BadImage):
                        raise data
                    if isinstance(info, BadImage):
                        raise info
                    read += len(data)
                    if converting:
                        data, info = convert(data, info, options)
                    rows.append(_append(tar, sample, data, info))
                except BadImage as e:
                    bad.append(BadSample(sample.path, str(e), content=not isinstance(e, UnreadableImage)))
                # With decoding, after every image: it may be the next one that kills this process.
                if (decode or converting or number == last) and not progress(number, len(bad), read):
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


def _batches(
    read: Iterable[tuple[PlannedSample, bytes | BadImage]],
) -> Iterator[tuple[list[PlannedSample], list[bytes | BadImage]]]:
    """Neighbours, as far as a few of them cost little memory: small images are cheaper together than one by one."""
    samples: list[PlannedSample] = []
    images: list[bytes | BadImage] = []
    size = 0
    for sample, data in read:
        samples.append(sample)
        images.append(data)
        size += len(data) if isinstance(data, bytes) else 0
        if size >= _BATCH_BYTES or len(samples) == _BATCH_IMAGES:
            yield samples, images
            samples, images, size = [], [], 0
    yield samples, images


def _append(tar: HashedTar, sample: PlannedSample, data: bytes, info: ImageInfo) -> IndexRow:
    """Writes the image member, with a label its `.cls`, with extra columns its `.json`; returns the index row."""
    key, label = sample.key, sample.label
    offset = tar.add(f"{key}.{info.suffix}", data)
    if label >= 0:
        tar.add(f"{key}.cls", b"%d" % label)
    if sample.extra:
        tar.add(f"{key}.json", sample.extra.encode())
    return key_hash(key), offset, len(data), crc32(data), label, info.width, info.height


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
