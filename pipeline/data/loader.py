"""Micro-batches of this rank, from the resumed position on, and the digest that says which samples they hold.

A torch DataLoader over a map-style data set whose items are whole micro-batches; its sampler asks the `SampleOrder`
which samples sit in this rank's slots. Nothing here keeps state between steps: the order's few integers are the
loader's whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_tools.errors import UserError
from pipeline.data.augment import EvalTransform, TrainTransform, keep_mask
from pipeline.data.mixup import MixUp
from pipeline.data.order import Order, key, rank_slots
from pipeline.data.source import BadSample, SampleSource
from pipeline.data.workers import MAX_RESTARTS, is_lost_worker, make_loader, silence_lost_workers, start

PADDING = -1


class Batch(NamedTuple):
    """One micro-batch of m slots of one rank; short ranks are padded with slots of weight 0.

    images uint8 [n, C, size, size] and labels int64 [n]: n = m, with MixUp up to two more rows for partners that sit in
    no slot of this micro-batch; weights float32 [m], 0 for padding and for bad samples; keep float32 [m, 2L]
    stochastic-depth masks, or [m, 0]; ids int64 [m], -1 for padding; crc32 int64 [m] of the bytes that were read;
    errors: why a sample is bad, one text a bad slot; partners int64 [m]: the row that each slot is mixed with, and mix
    float32 [m]: the slot's own share; both empty without MixUp. failure: what kept the data away that is no fault of
    single samples; all rows are of weight 0 then.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    keep: torch.Tensor
    ids: torch.Tensor
    crc32: torch.Tensor
    errors: list[str]
    partners: torch.Tensor = torch.empty(0, dtype=torch.int64)
    mix: torch.Tensor = torch.empty(0)
    failure: UserError | None = None


class Request(NamedTuple):
    """What a worker needs to know to make one micro-batch: epoch and id of each row's sample, int64 [n]; `partners`
    and `mix` as in `Batch`."""

    epochs: np.ndarray
    ids: np.ndarray
    partners: np.ndarray = np.empty(0, dtype=np.int64)
    mix: np.ndarray = np.empty(0, dtype=np.float32)
    buffer: int | None = None  # of the loader's `BufferPool`: where the images go


class Row(NamedTuple):
    """One sample as the model will see it."""

    image: torch.Tensor
    label: int
    crc32: int


class TrainSamples(Dataset):
    """Map-style view: `Request` -> `Batch`. A bad sample becomes a zero image of weight 0."""

    def __init__(
        self,
        source: SampleSource,
        transform: TrainTransform | EvalTransform,
        *,
        channels: int,
        num_classes: int,
        drop_rates: list[float] | None = None,
        seed: int = 0,
    ):
        self.source, self.transform, self.channels, self.num_classes = source, transform, channels, num_classes
        # None where nothing is dropped, so that the model skips the multiplication
        self.drop_rates = np.asarray(drop_rates) if drop_rates and max(drop_rates) > 0 else None
        self.seed = seed
        self.failure: UserError | None = None  # of an earlier batch: the next one is not waited for as long again

    def image_shape(self, rows: int) -> tuple[int, int, int, int]:
        return rows, self.channels, self.transform.size, self.transform.size

    def __getitem__(self, request: Request) -> Batch:
        return self.make(request, torch.empty(self.image_shape(len(request.ids)), dtype=torch.uint8))

    def make(self, request: Request, images: torch.Tensor) -> Batch:
        """`images` becomes part of the batch; whatever it holds is overwritten."""
        epochs, ids = request.epochs.tolist(), request.ids.tolist()
        n, m = len(ids), len(request.partners) or len(ids)
        labels, crcs, good = [0] * n, [0] * n, [False] * n
        errors: list[str] = []
        for i, (epoch, sample_id) in enumerate(zip(epochs, ids)):
            row = None
            try:
                if sample_id != PADDING and not self.failure:
                    row = self.row(epoch, sample_id, images[i])
            except UserError as e:  # raised here it would lose its kind on the way out of a worker
                self.failure, good = e, [False] * n
            except (BadSample, ValueError, RuntimeError) as e:  # whatever this one image did to a transform
                if i < m:  # a partner's own rank tells of it
                    errors.append(str(e))
            if row is None:
                images[i] = 0
            else:
                labels[i], crcs[i], good[i] = row.label, row.crc32, True
        partners = torch.from_numpy(request.partners)
        used = torch.tensor(good)
        mix = torch.from_numpy(request.mix)
        return Batch(
            images,
            torch.tensor(labels),
            used[:m].float(),
            torch.stack([self.keep(epoch, i) for epoch, i in zip(epochs[:m], ids)]),
            torch.from_numpy(request.ids[:m]),
            torch.tensor(crcs[:m]),
            errors,
            partners,
            torch.where(used[partners], mix, 1.0) if len(mix) else mix,  # nothing is mixed with a bad sample
            self.failure,
        )

    def row(self, epoch: int, sample_id: int, out: torch.Tensor | None = None) -> Row:
        """The image is `out` where given, uint8 [C, size, size].

        Raises BadSample, UserError for the store's faults, or whatever this one image does to a transform."""
        transform = self.transform
        if isinstance(transform, TrainTransform):
            u = transform.draw(epoch, sample_id)
            choose = partial(transform.choose, u)
            finish: Callable[..., torch.Tensor] = partial(
                transform.finish, u=u, epoch=epoch, sample_id=sample_id, out=out
            )
        else:
            choose, finish = None, transform
        pixels, label, crc = self.source.read(sample_id, self.channels, choose)
        if not 0 <= label < self.num_classes:
            why = ": it has no single class (several labels, or none), and training takes one" if label < 0 else ""
            raise BadSample(f"sample {sample_id}: label {label} outside [0, {self.num_classes}){why}")
        image = finish(pixels)
        return Row(image if out is None or image is out else out.copy_(image), label, crc)

    def keep(self, epoch: int, sample_id: int) -> torch.Tensor:
        """Stochastic-depth mask of a sample, [2L] or [0]."""
        if self.drop_rates is None:
            return torch.empty(0)
        if sample_id == PADDING:
            return torch.ones(len(self.drop_rates))
        return keep_mask(self.drop_rates, self.seed, epoch, sample_id)


@dataclass(frozen=True)
class Share:
    """How the global batch falls on the ranks: slots [first, last) here, in `micro_steps` micro-batches everywhere."""

    first: int
    last: int
    micro_batch_size: int
    micro_steps: int

    @staticmethod
    def of(rank: int, world_size: int, global_batch_size: int, micro_batch_size: int | None) -> Share:
        """`micro_batch_size` None: the largest rank's whole share, no accumulation."""
        first, last = rank_slots(rank, world_size, global_batch_size)
        largest = -(-global_batch_size // world_size)
        micro = min(micro_batch_size or largest, largest)
        return Share(first, last, micro, -(-largest // micro))

    def read_ahead(self, num_workers: int) -> int:
        """Micro-batches that each loader worker has at a time: two steps' over all workers, and at least two."""
        return max(2, -(-2 * self.micro_steps // max(1, num_workers)))


class MicroBatches(Sampler):
    """Endless: one `Request` a micro-batch, beginning at `state`."""

    def __init__(self, order: Order, state: Any, share: Share, mixup: MixUp | None = None):
        self.order, self.state, self.share, self.mixup = order, state, share, mixup

    def __iter__(self) -> Iterator[Request]:
        state = self.state
        while True:
            yield from self._step(state)
            state = self.order.next_state(state)

    def _step(self, state: Any) -> Iterator[Request]:
        share, m = self.share, self.share.micro_batch_size
        mine = np.arange(share.first, share.last)
        partner = mine if self.mixup is None else self.mixup.partners(mine)
        slots = np.union1d(mine, partner)
        drawn = self.order.draw(state.epoch, state.position + slots)  # all at once: one call costs as much as a few
        for first in range(share.first, share.first + share.micro_steps * m, m):
            # None at all where this rank's share has ended before
            own, theirs = mine[first - share.first :][:m], partner[first - share.first :][:m]
            elsewhere = np.setdiff1d(theirs, own)  # partners in other micro-batches: their rows come behind all others
            at = np.searchsorted(slots, np.concatenate([own, elsewhere]))
            n = len(own)
            ids = np.insert(drawn.ids[at], n, np.full(m - n, PADDING))
            epochs = np.insert(drawn.epochs[at], n, np.full(m - n, state.epoch))
            if self.mixup is None:
                yield Request(epochs, ids)
                continue
            rows = np.where(np.isin(theirs, own), theirs - first, m + np.searchsorted(elsewhere, theirs))
            mix = self.mixup.weights(state.epoch, state.position, own)
            yield Request(
                epochs,
                ids,
                np.concatenate([rows, np.arange(n, m)]),
                np.concatenate([mix, np.ones(m - n, dtype=np.float32)]),
            )


def train_batches(
    samples: TrainSamples,
    order: Order,
    share: Share,
    *,
    num_workers: int,
    pin_memory: bool = False,
    mixup: MixUp | None = None,
) -> Iterator[list[Batch]]:
    """The micro-batches of one step after another, for ever, from `order.state` on.

    Raises:
        UserError: a store is out of reach, or a shard is damaged; after it, begin anew.
    """
    samples.failure = None
    requests = MicroBatches(order, order.state, share, mixup)
    rows = share.micro_batch_size + (2 if mixup else 0)
    held = 2 * share.micro_steps  # this step's and, while it is fetched, the last's
    ahead = share.read_ahead(num_workers)
    batches = start(make_loader(samples, requests, rows, held, num_workers, ahead, pin_memory))
    while True:
        step = [next(batches) for _ in range(share.micro_steps)]
        failure = next((b.failure for b in step if b.failure), None)
        if failure:
            raise failure
        yield step


def eval_batches(
    samples: TrainSamples,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    num_workers: int,
    ids: np.ndarray | None = None,
) -> EvalBatches:
    """Each sample of the split (of `ids`, where given) exactly once over all ranks; as many batches on every rank."""
    samples.failure = None
    total = sum(samples.source.shard_sizes) if ids is None else len(ids)
    first, last = rank_slots(rank, world_size, total)
    per_rank = -(-total // world_size)
    padded = -(-per_rank // batch_size) * batch_size
    mine = np.arange(first, last) if ids is None else ids[first:last]
    ids = np.concatenate([mine, np.full(padded - len(mine), PADDING)])
    epochs = np.zeros(batch_size, dtype=np.int64)
    requests = [Request(epochs, ids[i : i + batch_size]) for i in range(0, padded, batch_size)]
    # Short splits do not pay for starting workers
    return EvalBatches(samples, requests, batch_size, min(num_workers, len(requests) // 4))


class EvalBatches:
    """One batch a request, as often as it is iterated over.

    What a lost worker had is made again. Where workers are lost again and again, the batches that are left say so by
    their `failure`: this rank goes on to the end all the same, the others need it in their collectives.
    """

    def __init__(self, samples: TrainSamples, requests: list[Request], rows: int, num_workers: int):
        self._samples, self._requests, self._rows, self._num_workers = samples, requests, rows, num_workers
        self._loader = self._make(0)

    def _make(self, first: int) -> DataLoader:
        workers = 0 if self._samples.failure else self._num_workers
        return make_loader(self._samples, self._requests[first:], self._rows, 2, workers)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        loader, done, losses = self._loader, 0, 0
        while done < len(self):
            try:
                batches = start(loader)
                silence_lost_workers()
                for batch in batches:
                    done += 1
                    yield batch
            except (RuntimeError, OSError, EOFError) as e:
                if not is_lost_worker(e):
                    raise
                losses += 1
                if losses > MAX_RESTARTS:
                    self._samples.failure = UserError(f"{losses} loader workers were lost: {str(e).splitlines()[0]}")
                loader = self._make(done)


def step_digest(position: int, share: Share, batches: list[Batch]) -> int:
    """64-bit digest of what this rank's slots of one step held: slot, sample id, crc32 of its bytes, used or not.

    A sum modulo 2**64 over slots: the ranks' digests add up to the step's digest, which therefore is the same
    for any number of ranks, micro-batches and workers.
    """
    count = share.last - share.first
    ids = torch.cat([b.ids for b in batches]).numpy()[:count]
    crcs = torch.cat([b.crc32 for b in batches]).numpy()[:count]
    used = torch.cat([b.weights for b in batches]).numpy()[:count] > 0
    slots = position + np.arange(share.first, share.last)
    return int(key(slots, ids, crcs, used).sum(dtype=np.uint64)) if count else 0


def masked_slots(share: Share, batches: list[Batch]) -> list[tuple[int, int, str]]:
    """(slot of the global batch, sample id, why) of this rank's samples that could not be used in this step."""
    ids = torch.cat([b.ids for b in batches])
    unused = torch.cat([b.weights for b in batches]) == 0
    reasons = [e for b in batches for e in b.errors]
    rows = torch.nonzero(unused & (ids != PADDING)).flatten().tolist()
    return [(share.first + row, int(ids[row]), why) for row, why in zip(rows, reasons)]
