"""Appending members to a tar while its hash is taken."""

from __future__ import annotations

import os
from typing import BinaryIO

import xxhash

from data_tools import ustar
from data_tools.storage import write_all

_BUFFER_BYTES = 1 << 20  # larger writes gain nothing, and the hash likes cached data
_LARGE_PART = 8192  # mean bytes of a part from which joining costs more than many small calls
_MAX_PARTS = 1000  # of one call, the kernel's limit is 1024


class HashedTar:
    """Appends to a file through a buffer and hashes what passes. `offset`: bytes given so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.offset = 0
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._parts: list[bytes] = []
        self._flushed = 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data. Raises ValueError as `ustar.header` does."""
        size = len(data)
        self._parts += (ustar.header(name, size), data, ustar.padding(size))
        begin = self.offset + ustar.BLOCK
        self.offset = begin + size + -size % ustar.BLOCK
        if self.offset - self._flushed >= _BUFFER_BYTES:
            self.flush()
        return begin

    def close(self) -> None:
        """Writes what ends a tar; the file stays open."""
        self._parts.append(ustar.END)
        self.offset += len(ustar.END)
        self.flush()

    def flush(self) -> None:
        parts, size = self._parts, self.offset - self._flushed
        if len(parts) <= _MAX_PARTS and size >= _LARGE_PART * len(parts):
            for part in parts:
                self._hash.update(part)
            if (written := os.writev(self._file.fileno(), parts)) < size:  # a signal, or a disk that fills up
                write_all(self._file, b"".join(parts)[written:])
        else:
            data = b"".join(parts)
            self._hash.update(data)
            write_all(self._file, data)
        self._parts = []
        self._flushed = self.offset

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
