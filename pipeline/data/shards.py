"""The shards of a data set as a process keeps them: columns, not a hundred thousand objects.

Loader workers are forked. Whatever Python object one looks at is written to (its reference count), and its page becomes
the worker's own: lists of objects would be copied into every worker of every rank, bit by bit. Columns are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from data_tools.manifest import ShardInfo


class ShardTable(Sequence[ShardInfo]):
    """Reads like the list of `ShardInfo` that it was made of. `samples` and `bytes`: int64 [shards]."""

    def __init__(self, shards: Sequence[ShardInfo]):
        self.samples = np.array([s.samples for s in shards], dtype=np.int64)
        self.bytes = np.array([s.bytes for s in shards], dtype=np.int64)
        self._texts = [np.array([text(s).encode() for s in shards], dtype=np.bytes_) for text in _TEXTS]

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, at: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, at: slice) -> list[ShardInfo]: ...
    def __getitem__(self, at: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        name, tar_hash, index_hash = (bytes(column[at]).decode() for column in self._texts)
        return ShardInfo(name, int(self.samples[at]), int(self.bytes[at]), tar_hash, index_hash)


_TEXTS = (lambda s: s.name, lambda s: s.hash, lambda s: s.index_hash)
