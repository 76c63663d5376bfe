"""The order of a weighted mixture of data sets: blocks of M slots in which every set has its quota. Numpy only.

A file format like `order.py`, with its own version; `tests/golden/mixture.json` pins it. Position p counts the slots
of the whole run; it lies in block p // M, and y = perm(p mod M, M, key(seed, "block", p // M)) says whose it is: set
i owns the q_i slots whose y lies in [Q_i, Q_i + q_i), Q_i the quotas before it. The set's own position is block*q_i
plus the number of its slots before this one in the block. Each set is a `SampleOrder` with a seed of its own and
epochs of V_i*L_i samples, one after the other: set i is through its epoch number e when its own position passes
(e+1)*V_i*L_i, whatever the others do.

So the whole state is one position, and the quotas; batch size, ranks and workers do not enter. By default M is the
first multiple of the batch size that is at least 1000: from a batch of 1000 on, every batch has the same make-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pipeline.data.order import Drawn, SampleOrder, Select, key, pass_skips, perm

MIXTURE_VERSION = 2  # in a state's `version`, where a single set has order.ORDER_VERSION
SMALLEST_BLOCK = 1000


@dataclass(frozen=True)
class SetState:
    """What of one set is part of the order."""

    quota: int
    lanes: int
    chunk: int
    window: int
    manifest_sha: str
    samples: int


@dataclass(frozen=True)
class MixtureState:
    """All that is needed to go on; `epoch` is the number of every set's first epoch: 0, unless a run changed its data.

    `position` is that of the next step's slot 0, counted from the mixture's beginning; `skips` as in `OrderState`.
    """

    seed: int
    epoch: int
    position: int
    sets: tuple[SetState, ...]
    version: int = MIXTURE_VERSION
    skips: tuple[tuple[int, int, int], ...] = ()

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> MixtureState:
        sets = tuple(SetState(**s) for s in raw["sets"])
        return MixtureState(**{**raw, "sets": sets, "skips": tuple((e, a, b) for e, a, b in raw.get("skips", ()))})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MixedSet:
    """One set as it goes into a mixture; `shard_sizes` and `select` as in `SampleOrder`; `size` is that of the id range
    it takes, at least the sum of `shard_sizes`."""

    name: str
    weight: float
    shard_sizes: Sequence[int]
    manifest_sha: str
    size: int
    select: Select | None = None


def quotas(weights: Sequence[float], block: int) -> list[int]:
    """round(weight * block) slots for each set by largest remainder; weights need not add up to 1."""
    shares = [Fraction(str(w)) for w in weights]
    exact = [s * block / sum(shares) for s in shares]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: block - sum(counts)]:
        counts[i] += 1
    return counts


class MixtureOrder:
    """The order of several data sets under one seed. Sample ids count through the sets, one after the other.

    Args:
        sets: at least one, each with a weight above 0.
        global_batch_size: B, the slots of a step.
        lanes: of the whole mixture, None means B; each set takes its share of them, so that a batch draws from as many
            places as a single set's would.
        chunk, window: as in `SampleOrder`, for every set.
        block: M; None: the first multiple of B that is at least 1000.

    Raises:
        UserError: a set without a slot in a block, or without samples.
    """

    def __init__(
        self,
        sets: Sequence[MixedSet],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
        chunk: int = 16,
        window: int = 64,
        block: int | None = None,
    ):
        block = block or global_batch_size * -(-SMALLEST_BLOCK // global_batch_size)
        states = []
        for s, quota in zip(sets, quotas([s.weight for s in sets], block)):
            samples = int(sum(s.shard_sizes))
            if not quota:
                least = sum(other.weight for other in sets) / block
                raise UserError(
                    f"data.train: with weight {s.weight:g} {s.name} would get no slot in a block of {block}; give it "
                    f"at least {least:.2g}, or leave it out"
                )
            if not samples:
                raise UserError(f"data.train: {s.name} has no samples")
            own = min(samples, max(1, round(Fraction(quota, block) * (lanes or global_batch_size))))
            c = min(chunk, max(1, samples // (4 * own)))
            states.append(SetState(quota, own, c, window, s.manifest_sha, samples))
        self.state = MixtureState(seed, 0, 0, tuple(states))
        self._set_up(sets, global_batch_size)

    @classmethod
    def resume(cls, state: dict[str, Any], sets: Sequence[MixedSet], *, global_batch_size: int) -> MixtureOrder:
        """The order at a stored state, whose sets these are (`differences` says if not). O(1) in the position."""
        order = cls.__new__(cls)
        order.state = MixtureState.from_dict(state)
        order._set_up(sets, global_batch_size)
        order.state = order.settle(order.state)
        return order

    def _set_up(self, sets: Sequence[MixedSet], global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.block = sum(s.quota for s in self.state.sets)
        self._first_place = np.cumsum([0, *(s.quota for s in self.state.sets)])
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.first_ids = np.cumsum([0, *(s.size for s in sets)])
        self.orders = [
            SampleOrder(
                s.shard_sizes, manifest_sha=s.manifest_sha, seed=int(key(self.state.seed, "set", i)),
                global_batch_size=st.lanes, chunk=st.chunk, window=st.window, select=s.select,
            )
            for i, (s, st) in enumerate(zip(sets, self.state.sets))
        ]  # fmt: skip

    @property
    def num_samples(self) -> int:
        """Of all sets together: what a duration counts as one epoch."""
        return sum(s.samples for s in self.state.sets)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def next_state(self, state: MixtureState) -> MixtureState:
        return self.settle(replace(state, position=state.position + self.global_batch_size))

    def settle(self, state: MixtureState) -> MixtureState:
        """The next state at or after `state` whose step touches no skipped range. A mixture has no end."""
        while (position := pass_skips(state, self.global_batch_size)) != state.position:
            state = replace(state, position=position)
        return state

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(set, the set's own position) of flat positions."""
        block, slot = np.divmod(np.asarray(positions, dtype=np.int64), self.block)
        owner, own = np.empty_like(slot), np.empty_like(slot)
        for number in np.unique(block):
            here = block == number
            owners, places = self._of_block(int(number))
            owner[here], own[here] = owners[slot[here]], places[slot[here]]
        return owner, own

    def own_positions(self, position: int) -> np.ndarray:
        """How many samples of each set lie before `position`."""
        block, slot = divmod(position, self.block)
        before = np.bincount(self._of_block(block)[0][:slot], minlength=len(self.orders))
        return block * np.diff(self._first_place) + before

    def _of_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """`places` of all slots of a block; the two latest are kept."""
        if block not in self._blocks:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            y = perm(np.arange(self.block), self.block, key(self.state.seed, "block", block))
            owner = np.searchsorted(self._first_place, y, side="right") - 1
            own = np.empty_like(owner)
            for i, quota in enumerate(np.diff(self._first_place)):
                own[owner == i] = block * quota + np.arange(quota)
            self._blocks[block] = owner, own
        return self._blocks[block]

    def draw(self, epoch: int, positions: np.ndarray) -> Drawn:
        """Sample ids and their sets' epochs at `positions` (int64, any shape). O(M + len(positions))."""
        p = np.asarray(positions, dtype=np.int64)
        owner, own = self.places(p.ravel())
        ids, epochs = np.empty_like(own), np.empty_like(own)
        for i, order in enumerate(self.orders):
            mine = np.flatnonzero(owner == i)
            number, at = np.divmod(own[mine], order.epoch_length)
            for e in np.unique(number):  # one or two; more where a set is smaller than its share of a batch
                here = number == e
                ids[mine[here]] = order.sample_ids(epoch + int(e), at[here]) + self.first_ids[i]
            epochs[mine] = epoch + number
        return Drawn(ids.reshape(p.shape), epochs.reshape(p.shape))

    def sample_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        return self.draw(epoch, positions).ids
