"""Appending members to a tar while its hash is taken."""

from __future__ import annotations

from typing import BinaryIO

import xxhash

from data_tools.storage import write_all

_BUFFER_BYTES = 1 << 20  # larger writes gain nothing, and the hash likes cached data


class HashedTar:
    """Appends to a file through a buffer and hashes what passes. `offset`: bytes given so far."""

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
