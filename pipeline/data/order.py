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

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_tools.errors import UserError
from pipeline.data.permutation import SMALL, key, perm, perm_table, unperm

ORDER_VERSION = 1


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


def changed_data(difference: str) -> UserError:
    return UserError(
        f"data.train has changed since the checkpoint ({difference}): its sample order cannot go on. Point data.train "
        "at the old set, or start anew on this one with `--allow data.train` (a new epoch begins)"
    )


class Drawn(NamedTuple):
    """Sample ids and the epoch that each is seen in, which keys its augmentation; int64, of one shape."""

    ids: np.ndarray
    epochs: np.ndarray


Select = Callable[[np.ndarray], np.ndarray]  # position among the chosen samples of a set -> sample id


class Order(Protocol):
    """What loader, trainer and audit need: of one set (`SampleOrder`) or of a mixture (`mixture.MixtureOrder`)."""

    state: Any  # with seed, epoch, position, skips and to_dict()
    global_batch_size: int

    @property
    def num_samples(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def next_state(self, state: Any) -> Any: ...

    def settle(self, state: Any) -> Any: ...

    def draw(self, epoch: int, positions: np.ndarray) -> Drawn: ...

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray: ...


def pass_skips(state: Any, length: int) -> int:
    """Position of `state`, or the end of the skipped ranges that a step of `length` slots there would touch."""
    end = state.position + length
    past = [b for epoch, a, b in state.skips if epoch == state.epoch and a < end and state.position < b]
    return max(past, default=state.position)


class SampleOrder:
    """The order of one data set under one seed.

    Args:
        shard_sizes: samples of each shard, in manifest order (their sum is N).
        manifest_sha: digest of the split, part of the state.
        global_batch_size: B. N < B is refused: an epoch would have no step.
        lanes: V, a divisor of B; None means B.
        chunk: upper bound of c; c = min(chunk, max(1, N // (4*B))), so that small sets still mix.
        window: w, samples.
        select: for a subset (`subset.Subset`): the sizes count its samples, and this gives their ids in the whole set.

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
        select: Select | None = None,
    ):
        n, b = int(sum(shard_sizes)), global_batch_size
        chunk = min(chunk, max(1, n // (4 * b)))
        self.state = OrderState(seed, 0, 0, lanes or b, chunk, window, manifest_sha)
        self._set_up(shard_sizes, b, select)

    @classmethod
    def resume(
        cls,
        state: dict[str, Any],
        shard_sizes: Sequence[int],
        *,
        manifest_sha: str,
        global_batch_size: int,
        select: Select | None = None,
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
            raise changed_data(f"digest {manifest_sha[:12]}, was {state['manifest_sha'][:12]}")
        order = cls.__new__(cls)
        order.state = OrderState.from_dict(state)
        order._set_up(shard_sizes, global_batch_size, select)
        order.state = order.settle(order.state)  # the batch may have grown beyond the epoch's rest
        return order

    def _set_up(self, shard_sizes: Sequence[int], b: int, select: Select | None) -> None:
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
        self.epoch_length = self.lane_length * s.lanes  # positions that have a sample
        self._select = select
        self._shard_sizes = sizes
        self._shard_start = np.concatenate([[0], np.cumsum(sizes)])
        # First chunk of each shard: a chunk's start and size follow from it, so no table of K rows is kept for them.
        self._shard_chunk = np.concatenate([[0], np.cumsum(-(-sizes // s.chunk))])
        self.num_chunks = int(self._shard_chunk[-1])
        self._short: dict[int, _ShortChunks] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def next_state(self, state: OrderState) -> OrderState:
        """The state one step later; a step that would not fit into the epoch begins the next one."""
        return self.settle(replace(state, position=state.position + self.global_batch_size))

    def settle(self, state: OrderState) -> OrderState:
        """The next state at or after `state` whose step fits into its epoch and touches no skipped range."""
        while True:
            if state.position + self.global_batch_size > self.num_samples:
                state = replace(state, epoch=state.epoch + 1, position=0)
                continue
            position = pass_skips(state, self.global_batch_size)
            if position == state.position:
                return state
            state = replace(state, position=position)

    def draw(self, epoch: int, positions: np.ndarray) -> Drawn:
        ids = self.sample_ids(epoch, positions)
        return Drawn(ids, np.full_like(ids, epoch))

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids at `positions` of an epoch (int64 array, any shape, each in [0, V*L)). O(len(positions))."""
        s = self.state
        p = np.asarray(positions, dtype=np.int64)
        if p.size and (p.min() < 0 or p.max() >= self.epoch_length):
            raise ValueError(f"position outside [0, {self.epoch_length})")
        flat = p.ravel()
        lane, q = flat % s.lanes, flat // s.lanes
        x = np.empty_like(flat)
        window = q // s.window
        for u in np.unique(window).tolist():
            at, base = window == u, u * s.window
            lanes, row = lane[at], q[at] - base
            n = min(s.window, self.lane_length - base)
            if n <= SMALL and 8 * len(lanes) >= s.lanes:  # a table of the window pays for itself
                within = self._window_table(epoch, u, n)[lanes, row].astype(np.int64)
            else:
                within = perm(row if (row != row[0]).any() else row[0], n, key(s.seed, epoch, lanes, u))
            x[at] = lanes * self.lane_length + base + within
        ids = self._locate(epoch, x).reshape(p.shape)
        return ids if self._select is None else self._select(ids)

    def _window_table(self, epoch: int, u: int, n: int) -> np.ndarray:
        """perm(., n, key(seed, epoch, lane, u)) of all lanes, [V, n]; the four latest are kept."""
        if (epoch, u) not in self._windows:
            while len(self._windows) > 3:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, u] = perm_table(n, key(self.state.seed, epoch, np.arange(self.state.lanes), u))
        return self._windows[epoch, u]

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
