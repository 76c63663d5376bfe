"""A node's cache of chunks, as its readers see it: one file a chunk, in a folder on a local disk.

A file holds the index rows of its samples and the bytes of the tar that they lie in:

    hash u64 (xxh3 of what follows, up to the data) | base u64 | count u32 | rows INDEX_DTYPE[count] | data

`base` is the tar offset at which `data` begins. A file appears whole, by rename. An empty one says that the chunk is on
its way (`pipeline.data.prefetch` brings it); no file says that nobody is fetching it. Whatever is missing, late or
damaged here is read from the store itself: the cache makes reading quick, it is never needed to read. Imports no torch.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import xxhash

from data_tools.manifest import INDEX_DTYPE

BEAT = "beat"  # touched by the prefetcher whenever a chunk has arrived
_HEAD = struct.Struct("<QQI")
_PATIENCE = 5.0  # seconds without any chunk arriving, after which a reader no longer waits for one
_LONGEST_WAIT = 60.0
_POLL = 0.004
_FIRST_READ = _HEAD.size + 64 * INDEX_DTYPE.itemsize


def chunk_name(digest: str, chunk: int, shard: int, number: int) -> str:
    """File name of chunk `number` of a shard, where chunks have `chunk` samples and `digest` names the data set."""
    return f"{digest[:16]}.{chunk}.{shard}.{number}"


def pack_chunk(rows: np.ndarray, base: int, data: bytes) -> bytes:
    """The content of a chunk's file."""
    body = _HEAD.pack(0, base, len(rows))[8:] + rows.tobytes()
    return xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body + data


def packed_size(rows: np.ndarray, length: int) -> int:
    """Bytes that `pack_chunk` makes of these rows and `length` bytes of data."""
    return _HEAD.size + rows.nbytes + length


class CacheReader:
    """Looks samples up in the cache's folder. Used by loader workers; holds nothing open."""

    def __init__(self, folder: str | Path):
        self.folder = str(folder)

    def sample(self, name: str, row: int) -> tuple[bytes, int, int] | None:
        """(bytes, label, crc32 that they should have) of one row of a chunk; None where it must be read elsewhere."""
        path = f"{self.folder}/{name}"
        end = time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            try:
                head = os.pread(fd, _FIRST_READ, 0)
                if head:
                    return _sample(fd, head, row)
            except OSError:  # the disk under the cache
                return None
            finally:
                os.close(fd)
            if time.monotonic() > end or not self._arriving():
                return None
            time.sleep(_POLL)

    def _arriving(self) -> bool:
        """Has a chunk arrived lately? Else the prefetcher is dead, or its store is away."""
        try:
            return time.time() - os.stat(f"{self.folder}/{BEAT}").st_mtime < _PATIENCE
        except OSError:
            return False


def _sample(fd: int, head: bytes, row: int) -> tuple[bytes, int, int] | None:
    if len(head) < _HEAD.size:
        return None
    digest, base, count = _HEAD.unpack_from(head)
    length = _HEAD.size + count * INDEX_DTYPE.itemsize
    if len(head) < length:
        head += os.pread(fd, length - len(head), len(head))
    if row >= count or xxhash.xxh3_64_intdigest(head[8:length]) != digest:
        return None
    entry = np.frombuffer(head, INDEX_DTYPE, count=count, offset=_HEAD.size)[row]
    data = os.pread(fd, int(entry["size"]), length + int(entry["offset"]) - base)
    return data, int(entry["label"]), int(entry["crc32"])
