"""Sample order: which sample sits in which slot of which step. Pure arithmetic, numpy only.

The order is a file format: `(seed, epoch, position) -> sample id` must never change for a stored
`ORDER_VERSION`, because runs are resumed by it; `tests/golden/order.json` pins it.

Words: N samples; a *chunk* is a run of at most c consecutive samples inside one shard, K chunks in all; B the
global batch; V *lanes* (V divides B), each reading L = N // V samples of the epoch; w the *window* inside which
a lane shuffles. Position p = t*B + j is slot j of the epoch's step t:

    lane l = p mod V,  q = p // V,  window u = q // w,  n = min(w, L - u*w)
    x = l*L + u*w + perm(q - u*w, n, key(seed, epoch, l, u))
    sample = start[pi[k]] + x - C[k],  k the last index with C[k] <= x

where pi = perm(., K, key(seed, epoch, "chunks")) is the epoch's order of chunks and C the exclusive cumulative sum
of their sizes in that order; neither is ever written out, see `_locate`. Ranks and workers do not appear: rank r of
R takes slots [r*B//R, (r+1)*B//R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data_tools.errors import UserError

ORDER_VERSION = 1
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
    i, k = np.broadcast_arrays(i, k)
    return _perm_small(i, n, k) if n <= SMALL else _perm_feistel(i, n, k)


def _perm_small(i: np.ndarray, n: int, k: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        hashes = mix64(k[..., None] ^ mix64(np.arange(1, n + 1, dtype=np.uint64) * _U64(_GOLDEN)))
    # The low six bits carry the index: no ties, and the i-th smallest hash says itself whose it is.
    hashes = (hashes & _U64(~63 & _MASK)) | np.arange(n, dtype=np.uint64)
    first = int(i.flat[0]) if i.size else 0
    if (i == first).all():  # one batch asks every lane for the same place in its window
        picked = np.partition(hashes, first, axis=-1)[..., first]
    else:
        picked = np.take_along_axis(np.sort(hashes, axis=-1), i[..., None], axis=-1)[..., 0]
    return (picked & _U64(63)).astype(np.int64)


def _perm_feistel(i: np.ndarray, n: int, k: np.ndarray) -> np.ndarray:
    half = ((n - 1).bit_length() + 1) // 2
    mask, shift = _U64((1 << half) - 1), _U64(half)
    with np.errstate(over="ignore"):
        keys = [mix64(k + _U64(_GOLDEN * r & _MASK)) for r in range(1, ROUNDS + 1)]
        x = i.astype(np.uint64).ravel()
        keys = [np.ascontiguousarray(rk).ravel() for rk in keys]
        todo = np.arange(x.size)
        while todo.size:  # the domain is below 4n: a few passes, each over what still lies outside [0, n)
            left, right = x[todo] >> shift, x[todo] & mask
            for rk in keys:
                left, right = right, left ^ (mix64(right ^ rk[todo]) & mask)
            x[todo] = (left << shift) | right
            todo = todo[x[todo] >= n]
    return x.astype(np.int64).reshape(i.shape)


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


def rank_slots(rank: int, world_size: int, global_batch_size: int) -> tuple[int, int]:
    """Half-open range of the global batch's slots that `rank` takes; sizes differ by at most one."""
    return rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size


@dataclass(frozen=True)
class OrderState:
    """All that is needed to go on: a few integers and the digest of the data they refer to."""

    seed: int
    epoch: int
    position: int  # of the next step's slot 0, within the epoch
    lanes: int
    chunk: int
    window: int
    manifest_sha: str
    version: int = ORDER_VERSION
    skips: tuple[tuple[int, int, int], ...] = ()  # (epoch, first, last): ranges [first, last) to jump over

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> OrderState:
        return OrderState(**{**raw, "skips": tuple((e, a, b) for e, a, b in raw.get("skips", ()))})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SampleOrder:
    """The order of one data set under one seed.

    Args:
        shard_sizes: samples of each shard, in manifest order (their sum is N).
        manifest_sha: digest of the split, part of the state.
        global_batch_size: B. N < B is refused: an epoch would have no step.
        lanes: V, a divisor of B; None means B.
        chunk: upper bound of c; c = min(chunk, max(1, N // (4*B))), so that small sets still mix.
        window: w, samples.

    Raises:
        UserError: N < B, or V does not divide B.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        manifest_sha: str,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
        chunk: int = 16,
        window: int = 64,
    ):
        n, b = int(sum(shard_sizes)), global_batch_size
        chunk = min(chunk, max(1, n // (4 * b)))
        self.state = OrderState(seed, 0, 0, lanes or b, chunk, window, manifest_sha)
        self._set_up(shard_sizes, b)

    @classmethod
    def resume(
        cls, state: dict[str, Any], shard_sizes: Sequence[int], *, manifest_sha: str, global_batch_size: int
    ) -> SampleOrder:
        """The order at a stored state. Costs O(1) in the position.

        Raises:
            UserError: another order version, other data, N < B, or a batch the stored lanes do not divide.
        """
        if state.get("version") != ORDER_VERSION:
            raise UserError(
                f"the checkpoint's sample order has version {state.get('version')}, this release has "
                f"{ORDER_VERSION}; resume with the release that wrote it"
            )
        if state["manifest_sha"] != manifest_sha:
            raise UserError(
                f"data.train has changed since the checkpoint (digest {manifest_sha[:12]}, was "
                f"{state['manifest_sha'][:12]}): its sample order cannot go on. Point data.train at the old set, or "
                "start anew on this one with `--allow data.train` (a new epoch begins)"
            )
        order = cls.__new__(cls)
        order.state = OrderState.from_dict(state)
        order._set_up(shard_sizes, global_batch_size)
        order.state = order.settle(order.state)  # the batch may have grown beyond the epoch's rest
        return order

    def _set_up(self, shard_sizes: Sequence[int], b: int) -> None:
        s = self.state
        if s.lanes < 1 or b % s.lanes:
            raise UserError(
                f"data.lanes={s.lanes} must divide train.global_batch_size={b}: choose a multiple of {s.lanes} as the "
                "batch size" + ("" if s.lanes > b else ", or other lanes (only possible at the start of a run)")
            )
        self.global_batch_size = b
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = n = int(sizes.sum())
        if n < b:
            raise UserError(
                f"the training split has {n:,} samples, fewer than train.global_batch_size={b:,}: "
                f"lower it to at most {n:,}, or shard more data"
            )
        self.lane_length = self.num_samples // s.lanes
        self._shard_sizes = sizes
        self._shard_start = np.concatenate([[0], np.cumsum(sizes)])
        # First chunk of each shard: a chunk's start and size follow from it, so no table of K rows is kept for them.
        self._shard_chunk = np.concatenate([[0], np.cumsum(-(-sizes // s.chunk))])
        self.num_chunks = int(self._shard_chunk[-1])
        self._short: dict[int, _ShortChunks] = {}

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def next_state(self, state: OrderState) -> OrderState:
        """The state one step later; a step that would not fit into the epoch begins the next one."""
        return self.settle(replace(state, position=state.position + self.global_batch_size))

    def settle(self, state: OrderState) -> OrderState:
        """The next state at or after `state` whose step fits into its epoch and touches no skipped range."""
        while True:
            end = state.position + self.global_batch_size
            if end > self.num_samples:
                state = replace(state, epoch=state.epoch + 1, position=0)
                continue
            past = [
                last
                for epoch, first, last in state.skips
                if epoch == state.epoch and first < end and state.position < last
            ]
            if not past:
                return state
            state = replace(state, position=max(past))

    def shard_of(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard number, row inside the shard) of each sample id."""
        shard = np.searchsorted(self._shard_start, sample_ids, side="right") - 1
        return shard, sample_ids - self._shard_start[shard]

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids at `positions` of an epoch (int64 array, any shape, each in [0, V*L)). O(len(positions))."""
        s = self.state
        p = np.asarray(positions, dtype=np.int64)
        if p.size and (p.min() < 0 or p.max() >= s.lanes * self.lane_length):
            raise ValueError(f"position outside [0, {s.lanes * self.lane_length})")
        flat = p.ravel()
        lane, q = flat % s.lanes, flat // s.lanes
        x = np.empty_like(flat)
        for row in np.unique(q):  # one row where V == B; B/V of them else
            at = q == row
            u = int(row) // s.window
            base = u * s.window
            n = min(s.window, self.lane_length - base)
            within = perm(int(row) - base, n, key(s.seed, epoch, lane[at], u))
            x[at] = lane[at] * self.lane_length + base + within
        return self._locate(epoch, x).reshape(p.shape)

    def _locate(self, epoch: int, x: np.ndarray) -> np.ndarray:
        """Sample ids at places x of the epoch's line of chunks.

        All chunks have c samples, except for at most one a shard, its last. So only the places of those *short* ones
        are kept, found by the inverse permutation; between them the line is regular. No table has K rows.
        """
        c, short = self.state.chunk, self._short_chunks(epoch)
        i = np.searchsorted(short.start, x, side="right") - 1  # the last short chunk that begins at or before x
        past = x - short.end[i]  # negative: inside it
        inside = past < 0
        k = short.place[i] + np.where(inside, 0, 1 + past // c)
        within = np.where(inside, x - short.start[i], past % c)
        chunk = perm(k, self.num_chunks, key(self.state.seed, epoch, "chunks"))
        shard = np.searchsorted(self._shard_chunk, chunk, side="right") - 1
        return self._shard_start[shard] + (chunk - self._shard_chunk[shard]) * c + within

    def _short_chunks(self, epoch: int) -> _ShortChunks:
        """Of an epoch; the two latest are kept, because loaders read ahead. O(shards)."""
        if epoch not in self._short:
            while len(self._short) > 1:
                del self._short[min(self._short)]
            s, c = self.state, self.state.chunk
            shards = np.flatnonzero(self._shard_sizes % c)
            last = self._shard_chunk[shards + 1] - 1
            place = unperm(last, self.num_chunks, int(key(s.seed, epoch, "chunks")))
            by_place = np.argsort(place)
            # A chunk of no samples in front, so that every x has a short chunk at or before it
            place = np.concatenate([[-1], place[by_place]])
            size = np.concatenate([[0], self._shard_sizes[shards][by_place] % c])
            missing = np.concatenate([[0], np.cumsum(c - size[1:])[:-1]]) if len(size) > 1 else np.zeros(0, np.int64)
            start = np.concatenate([[0], place[1:] * c - missing])
            self._short[epoch] = _ShortChunks(place, start, start + size)
        return self._short[epoch]


class _ShortChunks(NamedTuple):
    """Of one epoch, in its order: places among the K chunks, first samples and ends in the line of samples."""

    place: np.ndarray
    start: np.ndarray
    end: np.ndarray
