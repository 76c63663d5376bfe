"""The bytes of planned samples, from wherever they lie: files, objects, archives, Parquet columns.

A sample that cannot be had is one bad sample; a source that changed since the plan, or an archive that is gone, ends
the run. Memory: one image (remote files: a few, read ahead), one row group of a Parquet file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, BinaryIO

from data_tools.errors import UserError
from data_tools.images import BadImage
from data_tools.plan import CorpusSummary, PlannedSample
from data_tools.sources import places
from data_tools.sources.members import inflate_member, is_compressed, open_stream
from data_tools.sources.rows import Codec

MAX_FILE_BYTES = 1 << 30  # an image is read whole; more than this is no training image
_FILE = int(Codec.FILE)
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_AHEAD = 32  # remote files being read at once
_SKIP_BYTES = 1 << 20
_MAX_OPEN = 64  # containers at once
# The file itself is the trouble, not the disk or the network: retrying does not help.
_UNREADABLE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
}  # fmt: skip


class UnreadableImage(BadImage):
    """The file is there but cannot be opened, or is missing since before the plan."""


@dataclass(frozen=True)
class Inputs:
    """What a packing task needs to reach its images: the sources' roots, their prefixes in samples' paths, and
    fsspec's arguments, which no plan stores."""

    roots: tuple[str, ...]
    prefixes: tuple[int, ...] = (0,)
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(corpus: CorpusSummary, storage_options: dict[str, Any] | None = None) -> Inputs:
        return Inputs(corpus.roots, corpus.prefixes, storage_options or {})


class SampleReader:
    """Reads samples of a plan; best in plan order. Use as a context manager: its end checks that no archive changed
    meanwhile."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._roots = [places.join(root, "") for root in inputs.roots]
        self._containers: dict[str, _Container] = {}

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                for container in self._containers.values():
                    container.check()
        finally:
            for container in self._containers.values():
                container.close()
            self._containers.clear()

    def read_all(self, samples: Iterable[PlannedSample]) -> Iterator[tuple[PlannedSample, bytes | BadImage]]:
        """Each sample with its bytes, or with the reason why there are none. Raises what `read` raises besides."""
        rest = iter(samples)
        first = next(rest, None)
        if first is None:
            return
        rest = chain([first], rest)
        if first.codec != Codec.FILE or not places.is_remote(self._where(first)):
            yield from self._read_here(rest)
            return
        with ThreadPoolExecutor(_AHEAD) as pool:
            waiting: deque[tuple[PlannedSample, Future[bytes | BadImage] | None]] = deque()

            def ask(some: Iterable[PlannedSample]) -> None:
                for sample in some:
                    # Other sources' samples wait for their turn: an open archive is for one thread
                    ahead = sample.codec == _FILE and places.is_remote(self._where(sample))
                    waiting.append((sample, pool.submit(self._or_reason, sample) if ahead else None))

            try:
                ask(islice(rest, _AHEAD))
                while waiting:
                    sample, future = waiting.popleft()
                    yield sample, self._or_reason(sample) if future is None else future.result()
                    ask(islice(rest, 1))
            finally:
                for _, future in waiting:
                    if future is not None:
                        future.cancel()

    def _read_here(self, samples: Iterable[PlannedSample]) -> Iterator[tuple[PlannedSample, bytes | BadImage]]:
        """One after the other. Files below a local root take a short way: for small ones every call is felt."""
        local = [None if places.is_url(root) else root for root in self._roots]
        for sample in samples:
            root, place = local[sample.source], sample.place
            if sample.codec != _FILE or root is None or place[:1] == "/" or "://" in place:
                yield sample, self._or_reason(sample)
            elif sample.size > MAX_FILE_BYTES:
                yield sample, _too_large(sample)
            else:
                try:
                    data = _read_local(root + place, sample.size, sample.mtime_ns)
                except BadImage as e:
                    data = e
                yield sample, data

    def _or_reason(self, sample: PlannedSample) -> bytes | BadImage:
        try:
            return self.read(sample)
        except BadImage as e:
            return e

    def read(self, sample: PlannedSample) -> bytes:
        """The encoded bytes of one image.

        Raises UnreadableImage where the file cannot be opened or is no ordinary file, BadImage where an archive
        breaks off or the image is too large to be one, UserError where something changed or went away since the
        plan was made.
        """
        if sample.size > MAX_FILE_BYTES:
            raise _too_large(sample)
        where = self._where(sample)
        if sample.codec == Codec.FILE:
            if places.is_remote(where):
                return _read_remote(where, sample, self._inputs.storage_options)
            return _read_local(places.local_path(where), sample.size, sample.mtime_ns)
        if sample.codec == Codec.BROKEN:
            raise BadImage(str(json.loads(sample.extra)))
        container = self._containers.get(where)
        if container is None:
            if len(self._containers) >= _MAX_OPEN:
                self.__exit__(None)
            container = self._containers[where] = _open_container(where, sample, self._inputs.storage_options)
        return container.read(sample)

    def _where(self, sample: PlannedSample) -> str:
        place = sample.place
        if "://" in place or place.startswith("/"):
            return places.join(self._inputs.roots[sample.source], place)
        return self._roots[sample.source] + place  # what `join` does, without asking for every image


# --- files of their own -------------------------------------------------------------------------------------


def _read_local(path: str, size: int, mtime_ns: int) -> bytes:
    try:
        # O_NONBLOCK: opening a pipe that someone named .jpg must not wait for its other end.
        fd = os.open(path, _OPEN)
    except OSError as e:
        if e.errno not in _UNREADABLE:
            raise
        if e.errno == errno.ENOENT and mtime_ns:
            raise _changed(path, "is gone") from e
        raise UnreadableImage(f"unreadable: {e.strerror}") from e
    try:
        data = os.read(fd, size)
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
        # Looked at once, after reading: what is still as planned now was so while it was read.
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImage("not an ordinary file")
        if found.st_size != size or (mtime_ns and found.st_mtime_ns != mtime_ns):
            raise _changed(path, "was written again")
        if len(data) < size:
            raise _changed(path, "was cut short")
        return data
    except (IsADirectoryError, BlockingIOError):
        raise UnreadableImage("not an ordinary file") from None
    finally:
        os.close(fd)


def _read_remote(url: str, sample: PlannedSample, options: dict[str, Any]) -> bytes:
    try:
        data = places.read_file(url, options)
    except PermissionError as e:
        raise UnreadableImage(f"unreadable: {e}") from e
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UnreadableImage(f"unreadable: {type(e).__name__}") from e
    except UserError as e:
        if places.is_web(url):  # one server among many is no reason to end a run
            raise UnreadableImage(f"unreadable: {e}".split(" (tried")[0]) from e
        raise
    if sample.size and len(data) != sample.size:
        raise _changed(url, f"has {len(data)} bytes instead of {sample.size}: it was written again")
    return data


def _too_large(sample: PlannedSample) -> BadImage:
    return BadImage(f"{sample.size} bytes, more than the limit of {MAX_FILE_BYTES}")


def _changed(path: str, what: str) -> UserError:
    return UserError(
        f"{path} {what} while the corpus was being sharded; let nothing write there, "
        "then start again with --overwrite or into another folder"
    )


# --- containers ---------------------------------------------------------------------------------------------


class _Container:
    """An open archive or Parquet file; `read` is given samples that lie in it."""

    def __init__(self, path: str, sample: PlannedSample, options: dict[str, Any]) -> None:
        self.path, self._mtime, self._options = path, sample.mtime_ns, options
        self.check()
        self.file: BinaryIO = places.open_binary(path, options)

    def check(self) -> None:
        """Raises UserError where the file is not as it was when it was listed."""
        seen = places.info(self.path, self._options)
        if seen is None:
            raise _changed(self.path, "is gone")
        if self._mtime and seen.mtime_ns != self._mtime:
            raise _changed(self.path, "was written again")

    def close(self) -> None:
        self.file.close()

    def read(self, sample: PlannedSample) -> bytes:
        self.file.seek(sample.offset)
        if sample.codec == Codec.ZIP:
            try:
                return inflate_member(self.file.read, sample.size, sample.stored)
            except ValueError as e:
                raise BadImage(f"damaged archive member: {e}") from e
        data = self.file.read(sample.size)
        if len(data) < sample.size:
            raise BadImage("the archive ends within this image")
        return data


class _Stream(_Container):
    """A compressed tar. Only forward: going back begins again, so keep it open from slice to slice."""

    def __init__(self, path: str, sample: PlannedSample, options: dict[str, Any]) -> None:
        super().__init__(path, sample, options)
        self._restart()

    def _restart(self) -> None:
        self.file.seek(0)
        self._plain = open_stream(self.path, self.file)
        self._at = 0

    def close(self) -> None:
        """Stays open for the next slice: see `_open_container`."""

    def read(self, sample: PlannedSample) -> bytes:
        try:
            if sample.offset < self._at:
                self._restart()
            while self._at < sample.offset:
                skipped = len(self._plain.read(min(_SKIP_BYTES, sample.offset - self._at)))
                if not skipped:
                    raise EOFError
                self._at += skipped
            data = self._plain.read(sample.size)
            self._at += len(data)
        except (EOFError, OSError, ValueError) as e:
            self._restart()
            raise BadImage(f"damaged archive: {e or 'it ends early'}") from e
        if len(data) < sample.size:
            raise BadImage("the archive ends within this image")
        return data


class _Table(_Container):
    """A Parquet file with images in a column; one row group in memory."""

    def __init__(self, path: str, sample: PlannedSample, options: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        super().__init__(path, sample, options)
        self._table = pq.ParquetFile(self.file)
        self._column = sample.stored
        self._group = -1
        self._images: Any = None

    def read(self, sample: PlannedSample) -> bytes:
        group, row = sample.offset >> 32, sample.offset & 0xFFFFFFFF
        if group != self._group:
            name = self._table.schema_arrow.names[self._column]
            column = self._table.read_row_group(group, columns=[name]).column(0)
            self._images, self._group = column, group
        value = self._images[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if not value:
            raise BadImage("no image bytes in this row")
        return value


_stream: dict[tuple[str, int], _Stream] = {}  # of this process: at most one compressed tar, where its last slice ended


def _open_container(path: str, sample: PlannedSample, options: dict[str, Any]) -> _Container:
    if sample.codec == Codec.PARQUET:
        return _Table(path, sample, options)
    if sample.codec == Codec.STREAM and is_compressed(path):
        this = path, sample.mtime_ns
        if this not in _stream:
            for old in _stream.values():
                old.file.close()
            _stream.clear()
            _stream[this] = _Stream(path, sample, options)
        _stream[this].check()
        return _stream[this]
    return _Container(path, sample, options)
