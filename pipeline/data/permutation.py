"""Keyed hashes and permutations: the arithmetic under the sample order and everything random about a sample.

Part of a file format: `tests/golden/order.json` pins every function here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SMALL = 64  # up to here perm() sorts keyed hashes; a Feistel network is visibly non-uniform on small domains
ROUNDS = 8

_GOLDEN = 0x9E3779B97F4A7C15
_U64 = np.uint64
_MASK = (1 << 64) - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """Bijective 64-bit finaliser (splitmix64's, Steele et al. 2014), element-wise on uint64 arrays."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _u64(part: Any) -> np.ndarray:
    if isinstance(part, str):
        raw = part.encode()
        if len(raw) > 8:
            raise ValueError(f"key domain {part!r} is longer than 8 bytes")
        part = int.from_bytes(raw, "little")
    if isinstance(part, int):
        return np.array(part & _MASK, dtype=np.uint64)
    return np.asarray(part).astype(np.uint64)


def key(*parts: Any) -> np.ndarray:
    """64-bit hash of a tuple of integers, short strings or integer arrays (which broadcast). uint64."""
    h = np.array(_GOLDEN, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i, part in enumerate(parts, start=1):
            h = mix64((h ^ mix64(_u64(part) + _U64(_GOLDEN * i & _MASK))) + _U64(_GOLDEN))
    return h


def perm(i: Any, n: int, k: Any) -> np.ndarray:
    """Keyed bijection on [0, n): the image of `i` under key `k`. `i` and `k` broadcast; int64.

    n <= 64 takes the argsort of n keyed hashes; above, a balanced Feistel network of 8 rounds with cycle walking.
    """
    i = np.asarray(i, dtype=np.int64)
    k = np.asarray(k, dtype=np.uint64)
    if n < 1 or (i.size and (i.min() < 0 or i.max() >= n)):
        raise ValueError(f"perm: index outside [0, {n})")
    if n > SMALL:
        return _perm_feistel(i, n, k)
    i, k = np.broadcast_arrays(i, k)
    return _perm_small(i, n, k)


def perm_table(n: int, k: np.ndarray) -> np.ndarray:
    """All of `perm` for n <= 64: uint8 [*k.shape, n]."""
    return (np.sort(_small_hashes(n, k), axis=-1) & _U64(63)).astype(np.uint8)


def _small_hashes(n: int, k: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        hashes = mix64(k[..., None] ^ mix64(np.arange(1, n + 1, dtype=np.uint64) * _U64(_GOLDEN)))
    # The low six bits carry the index: no ties, and the i-th smallest hash says itself whose it is.
    return (hashes & _U64(~63 & _MASK)) | np.arange(n, dtype=np.uint64)


def _perm_small(i: np.ndarray, n: int, k: np.ndarray) -> np.ndarray:
    hashes = _small_hashes(n, k)
    first = int(i.flat[0]) if i.size else 0
    if (i == first).all():  # one batch asks every lane for the same place in its window
        picked = np.partition(hashes, first, axis=-1)[..., first]
    else:
        picked = np.take_along_axis(np.sort(hashes, axis=-1), i[..., None], axis=-1)[..., 0]
    return (picked & _U64(63)).astype(np.int64)


def _perm_feistel(i: np.ndarray, n: int, k: np.ndarray) -> np.ndarray:
    half = ((n - 1).bit_length() + 1) // 2
    mask, shift = _U64((1 << half) - 1), _U64(half)
    shape = np.broadcast_shapes(i.shape, k.shape)
    with np.errstate(over="ignore"):
        keys = [mix64(k + _U64(_GOLDEN * r & _MASK)) for r in range(1, ROUNDS + 1)]
        if k.ndim:
            keys = [np.broadcast_to(rk, shape).ravel() for rk in keys]
        x = np.broadcast_to(i, shape).astype(np.uint64).ravel()
        todo: Any = slice(None)
        while True:  # the domain is below 4n: a few passes, each over what still lies outside [0, n)
            left, right = x[todo] >> shift, x[todo] & mask
            for rk in keys:
                left, right = right, left ^ (mix64(right ^ (rk[todo] if k.ndim else rk)) & mask)
            x[todo] = (left << shift) | right
            todo = np.flatnonzero(x >= n)
            if not todo.size:
                return x.astype(np.int64).reshape(shape)


def unperm(image: np.ndarray, n: int, k: int) -> np.ndarray:
    """The inverse of `perm(., n, k)` for one key: the indices whose images these are; int64."""
    image = np.asarray(image, dtype=np.int64)
    if n <= SMALL:
        return np.argsort(_perm_small(np.arange(n), n, np.asarray(k, dtype=np.uint64)[None]))[image]
    half = ((n - 1).bit_length() + 1) // 2
    mask, shift = _U64((1 << half) - 1), _U64(half)
    with np.errstate(over="ignore"):
        keys = [mix64(_u64(k) + _U64(_GOLDEN * r & _MASK)) for r in range(ROUNDS, 0, -1)]
        x = image.astype(np.uint64)
        todo = np.arange(x.size)
        while todo.size:
            left, right = x[todo] >> shift, x[todo] & mask
            for rk in keys:
                left, right = right ^ (mix64(left ^ rk) & mask), left
            x[todo] = (left << shift) | right
            todo = todo[x[todo] >= n]
    return x.astype(np.int64)
