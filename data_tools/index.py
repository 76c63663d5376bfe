"""Writing a shard's index: one row a sample, numpy without pickle (the format is `manifest.INDEX_DTYPE`)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import xxhash

from data_tools.keys import raw_path
from data_tools.manifest import INDEX_DTYPE

IndexRow = tuple[int, int, int, int, int, int, int]  # in the order of INDEX_DTYPE's fields


def key_hash(key: str) -> int:
    """The 64-bit hash of a sample key that the index stores; others' tars have keys that are not valid UTF-8."""
    return xxhash.xxh3_64_intdigest(raw_path(key))


def index_bytes(rows: Sequence[IndexRow]) -> bytes:
    """The `.npy` file of `rows`, each in the order of INDEX_DTYPE's fields; the same rows give the same
    bytes."""
    table = np.empty(len(rows), INDEX_DTYPE)
    for name, column in zip(INDEX_DTYPE.names or (), zip(*rows)):  # by column: several times as fast as by row
        table[name] = np.array(column, INDEX_DTYPE[name])
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()
