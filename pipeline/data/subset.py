"""A share of a data set, chosen by the hash of each sample's key: 3% lies inside 10% lies inside 30%.

A sample is in when key("subset", its key's hash in the index) < share * 2**64: adding, removing or reordering other
samples never changes whether it is in. What is kept is one number a chosen sample; a training writes them into a
file once and maps it into memory, so that the ranks of a node share it and a resume need not read all indices again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.data.permutation import key


class _Keyed(Protocol):
    digest: str
    shard_sizes: list[int]

    def keys(self, shard: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Subset:
    """`ids`: the chosen sample ids of the whole set, ascending. Called with positions among them, it gives ids."""

    ids: np.ndarray
    shard_sizes: list[int]  # chosen samples of each shard
    digest: str

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return self.ids[positions].astype(np.int64)

    def __reduce__(self) -> tuple:
        """A mapped file goes to another process by its path."""
        if isinstance(self.ids, np.memmap):
            return _mapped, (self.ids.filename, self.ids.dtype, self.shard_sizes, self.digest)
        return Subset, (self.ids, self.shard_sizes, self.digest)

    @staticmethod
    def of(source: _Keyed, share: Fraction, folder: Path | None = None) -> Subset:
        """Reads the keys of all samples, shard by shard.

        With `folder`, the ids lie in a file there, which is made if it is not there yet; several processes may do so
        at once.
        """
        digest = subset_digest(source.digest, share)
        dtype = np.dtype("<u4" if sum(source.shard_sizes) < 2**32 else "<u8")
        chosen = (ids.astype(dtype) for ids in _chosen(source, share))
        if folder is None:
            ids = np.concatenate([np.zeros(0, dtype), *chosen])
        else:
            path = folder / f"subset-{digest}.ids"
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
                with open(temporary, "wb") as f:
                    for part in chosen:
                        part.tofile(f)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, path)
            ids = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        starts = np.concatenate([[0], np.cumsum(source.shard_sizes)])
        sizes = np.diff(np.searchsorted(ids, starts.astype(dtype)))
        return Subset(ids, sizes.tolist(), digest)


def _mapped(path: Path, dtype: np.dtype, shard_sizes: list[int], digest: str) -> Subset:
    return Subset(np.memmap(path, dtype, mode="r"), shard_sizes, digest)


def subset_digest(digest: str, share: Fraction) -> str:
    """Names the samples of a subset, as the manifest's digest names those of the set."""
    return hashlib.sha256(f"{digest} subset {share}".encode()).hexdigest()[:32]


def _chosen(source: _Keyed, share: Fraction) -> Iterator[np.ndarray]:
    limit = np.uint64(min(int(share * 2**64), 2**64 - 1))
    start = 0
    for shard, size in enumerate(source.shard_sizes):
        yield start + np.flatnonzero(key("subset", source.keys(shard)) < limit)
        start += size
