"""Writing a shard's index: one row a sample, numpy without pickle (the format is `manifest.INDEX_DTYPE`)."""

from __future__ import annotations

import io

import numpy as np
import xxhash

from data_tools.manifest import INDEX_DTYPE


def key_hash(key: str) -> int:
    """The 64-bit hash of a sample key that the index stores."""
    return xxhash.xxh3_64_intdigest(key.encode())


def index_bytes(rows: list[tuple[int, int, int, int, int, int, int]]) -> bytes:
    """The `.npy` file of `rows`, each in the order of INDEX_DTYPE's fields; the same rows give the same
    bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=INDEX_DTYPE), allow_pickle=False)
    return buffer.getvalue()
