"""Appending members to a tar while its hash is taken."""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np
import xxhash

from data_tools import ustar
from data_tools.storage import Writeback, write_all

_BUFFER_BYTES = 1 << 20  # larger writes gain nothing, and the hash likes cached data
_LARGE_MEMBER = 24 << 10  # mean bytes of a member from which joining costs more than many small calls
_MAX_PARTS = 1000  # of one call, the kernel's limit is 1024


class HashedTar:
    """Appends to a file through a buffer and hashes what passes. `offset`: bytes given so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.offset = 0
        self._file = file
        self._writeback = Writeback(file)
        self._hash = xxhash.xxh3_128()
        self._names: list[str] = []
        self._data: list[bytes] = []
        self._flushed = 0
        self._buffer = bytearray()  # kept: fresh memory costs as much as the copying

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data. Now or later raises ValueError as `ustar.headers` does."""
        self._names.append(name)
        self._data.append(data)
        begin = self.offset + ustar.BLOCK
        size = len(data)
        self.offset = begin + size + -size % ustar.BLOCK
        if self.offset - self._flushed >= _BUFFER_BYTES:
            self._flush()
        return begin

    def close(self) -> None:
        """Writes what ends a tar; the file stays open."""
        self._flush()
        self._hash.update(ustar.END)
        write_all(self._file, ustar.END)
        self.offset += len(ustar.END)

    def _flush(self) -> None:
        """Writes the members that wait. Their headers are made together: far cheaper than one by one."""
        names, members, self._names, self._data = self._names, self._data, [], []
        size, self._flushed = self.offset - self._flushed, self.offset
        if not names:
            return
        sizes = [len(data) for data in members]
        heads = ustar.headers(names, sizes)
        if len(names) <= _MAX_PARTS // 3 and size >= _LARGE_MEMBER * len(names):
            self._write_parts(heads, members, size)
        else:
            self._write_joined(heads, members, sizes, size)
        self._writeback.reached(self._flushed)

    def _write_parts(self, heads: np.ndarray, members: list[bytes], size: int) -> None:
        parts = [part for head, data in zip(heads, members) for part in (head.data, data, ustar.padding(len(data)))]
        for part in parts:
            self._hash.update(part)
        if (written := os.writev(self._file.fileno(), parts)) < size:  # a signal, or a disk that fills up
            write_all(self._file, b"".join(parts)[written:])

    def _write_joined(self, heads: np.ndarray, members: list[bytes], sizes: list[int], size: int) -> None:
        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        blocks = np.frombuffer(self._buffer, np.uint8).reshape(-1, ustar.BLOCK)
        blocks[:] = 0
        lengths = np.array(sizes)
        ends = np.cumsum(ustar.BLOCK + lengths + -lengths % ustar.BLOCK)
        begins = np.append(0, ends[:-1])
        blocks[begins // ustar.BLOCK] = heads
        joined = self._buffer
        for begin, n, data in zip((begins + ustar.BLOCK).tolist(), sizes, members):
            joined[begin : begin + n] = data
        self._hash.update(joined)
        write_all(self._file, joined)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
