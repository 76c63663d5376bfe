"""One packing task: a slice of the plan in, one committed shard out.

The bytes of a shard are a pure function of its slice and of the images, so it does not matter which process,
on which machine, at which attempt, packs it. Commit order: tar, index, done marker; a shard exists if and
only if its marker does. Memory: one image, a write buffer, and the slice.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from data_tools import ustar
from data_tools.errors import UserError
from data_tools.images import BadImage, check_image
from data_tools.index import index_bytes, key_hash
from data_tools.manifest import ShardInfo, index_name
from data_tools.plan import PlannedSample, PlannedShard, PlanOptions
from data_tools.plan_store import PLAN_FOLDER, read_slice
from data_tools.storage import atomic_file, write_all, write_atomic

MAX_FILE_BYTES = 1 << 30  # an image is read whole; more than this is no training image
_BUFFER_BYTES = 1 << 20  # larger writes gain nothing, and the hash likes cached data
# The file itself is the trouble, not the disk or the network: retrying does not help.
_UNREADABLE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


@dataclass(frozen=True)
class PackTask:
    """One shard to pack into `out`; images lie below `root`."""

    out: Path
    root: Path
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
    slice_ = read_slice(task.out / PLAN_FOLDER, task.shard)
    rows: list[tuple[int, int, int, int, int, int, int]] = []
    bad: list[BadSample] = []
    read = 0
    tar_path = task.out / task.shard.name
    with atomic_file(tar_path) as file:
        tar = _HashedWriter(file)
        for number, sample in enumerate(slice_, 1):
            try:
                data = read_image(task.root, sample)
                read += len(data)
                rows.append(_append(tar, sample, data, task.options))
            except BadImage as e:
                bad.append(BadSample(sample.path, str(e), content=not isinstance(e, UnreadableImage)))
            if progress is not None and not progress(number, len(bad), read):
                raise Stopped
        tar.write(ustar.END)
        tar.flush()
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


class _HashedWriter:
    """Appends to a file through a buffer and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.offset = 0
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._parts: list[bytes] = []
        self._pending = 0

    def write(self, *parts: bytes) -> None:
        size = sum(map(len, parts))
        self._parts += parts
        self.offset += size
        self._pending += size
        if self._pending >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        data = b"".join(self._parts)
        self._hash.update(data)
        write_all(self._file, data)
        self._parts.clear()
        self._pending = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _append(
    tar: _HashedWriter, sample: PlannedSample, data: bytes, options: PlanOptions
) -> tuple[int, int, int, int, int, int, int]:
    """Writes the image member and, with a label, its `.cls`; returns the index row. Raises BadImage first."""
    info = check_image(data, options.max_pixels, options.verify)
    size = len(data)
    offset = tar.offset + ustar.BLOCK
    tar.write(ustar.header(f"{sample.key}.{info.suffix}", size), data, ustar.padding(size))
    if sample.label >= 0:
        label = b"%d" % sample.label
        tar.write(ustar.header(f"{sample.key}.cls", len(label)), label, ustar.padding(len(label)))
    return key_hash(sample.key), offset, size, zlib.crc32(data), sample.label, info.width, info.height


# --- reading ------------------------------------------------------------------------------------------------


class UnreadableImage(BadImage):
    """The file is there but cannot be opened, or is missing since before the plan."""


def read_image(root: Path, sample: PlannedSample) -> bytes:
    """The bytes of one image.

    Raises UnreadableImage where the file cannot be opened or is no ordinary file, UserError where it changed
    or went away since the plan was made.
    """
    path = os.path.join(root, sample.path)
    try:
        # O_NONBLOCK: opening a pipe that someone named .jpg must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        if e.errno not in _UNREADABLE:
            raise
        if e.errno == errno.ENOENT and sample.mtime_ns:
            raise _changed(path, "is gone") from e
        raise UnreadableImage(f"unreadable: {e.strerror}") from e
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise UnreadableImage("not an ordinary file")
        if (info.st_size, info.st_mtime_ns) != (sample.size, sample.mtime_ns):
            raise _changed(path, "was written again")
        if info.st_size > MAX_FILE_BYTES:
            raise BadImage(f"{info.st_size} bytes, more than the limit of {MAX_FILE_BYTES}")
        data = os.read(fd, sample.size)
        while len(data) < sample.size:
            more = os.read(fd, sample.size - len(data))
            if not more:
                raise _changed(path, "was cut short")
            data += more
        return data
    finally:
        os.close(fd)


def _changed(path: str, what: str) -> UserError:
    return UserError(
        f"{path} {what} while the corpus was being sharded; let nothing write there, "
        "then start again with --overwrite or into another folder"
    )


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
