"""Micro-batches of this rank, from the resumed position on, and the digest that says which samples they hold.

A torch DataLoader over a map-style data set; its batch sampler asks the `SampleOrder` which samples sit in this
rank's slots. Nothing here keeps state between steps: the order's few integers are the loader's whole state.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.data.augment import EvalTransform, TrainTransform, keep_mask
from pipeline.data.order import Order, key, rank_slots
from pipeline.data.source import BadSample, SampleSource

PADDING = -1


class Batch(NamedTuple):
    """One micro-batch of m slots of one rank; short ranks are padded with slots of weight 0.

    images uint8 [m, C, size, size]; labels int64 [m]; weights float32 [m], 0 for padding and for bad samples;
    keep float32 [m, 2L] stochastic-depth masks, or [m, 0]; ids int64 [m], -1 for padding; crc32 int64 [m] of the
    bytes that were read; errors: why a sample is bad, one text a bad slot.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    keep: torch.Tensor
    ids: torch.Tensor
    crc32: torch.Tensor
    errors: list[str]


class Request(NamedTuple):
    """What a worker needs to know to make one slot's sample."""

    epoch: int
    sample_id: int


class TrainSamples(Dataset):
    """Map-style view: `Request` -> one slot's tensors. A bad sample becomes a zero image of weight 0."""

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

    def __getitem__(self, request: Request) -> tuple[torch.Tensor, int, float, torch.Tensor, int, int, str | None]:
        epoch, sample_id = request
        error = None
        if sample_id != PADDING:
            try:
                pixels, label, crc = self.source.read(sample_id, self.channels)
                if not 0 <= label < self.num_classes:
                    raise BadSample(f"sample {sample_id}: label {label} outside [0, {self.num_classes})")
                if isinstance(self.transform, TrainTransform):
                    image = self.transform(pixels, epoch, sample_id)
                else:
                    image = self.transform(pixels)
                return image, label, 1.0, self._keep(epoch, sample_id), sample_id, crc, None
            except (BadSample, ValueError, RuntimeError) as e:  # whatever this one image did to a transform
                error = str(e)
        size = self.transform.size
        image = torch.zeros(self.channels, size, size, dtype=torch.uint8)
        return image, 0, 0.0, self._keep(epoch, sample_id), sample_id, 0, error

    def _keep(self, epoch: int, sample_id: int) -> torch.Tensor:
        if self.drop_rates is None:
            return torch.empty(0)
        if sample_id == PADDING:
            return torch.ones(len(self.drop_rates))
        return keep_mask(self.drop_rates, self.seed, epoch, sample_id)


def collate(rows: list) -> Batch:
    images, labels, weights, keep, ids, crcs, errors = zip(*rows)
    return Batch(
        torch.stack(images),
        torch.tensor(labels),
        torch.tensor(weights),
        torch.stack(keep),
        torch.tensor(ids),
        torch.tensor(crcs),
        [e for e in errors if e],
    )


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


class MicroBatches(Sampler):
    """Endless batch sampler: one list of `Request`s a micro-batch, beginning at `state`."""

    def __init__(self, order: Order, state: Any, share: Share):
        self.order, self.state, self.share = order, state, share

    def __iter__(self) -> Iterator[list[Request]]:
        state, share = self.state, self.share
        size = share.micro_batch_size * share.micro_steps
        while True:
            slots = np.arange(share.first, share.last)
            drawn = self.order.draw(state.epoch, state.position + slots)
            requests = [Request(e, s) for e, s in zip(drawn.epochs.tolist(), drawn.ids.tolist())]
            requests += [Request(state.epoch, PADDING)] * (size - len(requests))
            for i in range(0, size, share.micro_batch_size):
                yield requests[i : i + share.micro_batch_size]
            state = self.order.next_state(state)


def _start_worker(worker: int) -> None:
    """Signals for a training reach its whole process group; when to end is the training process' to decide."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def train_batches(
    samples: TrainSamples, order: Order, share: Share, *, num_workers: int, pin_memory: bool = False
) -> Iterator[list[Batch]]:
    """The micro-batches of one step after another, for ever, from `order.state` on."""
    loader = DataLoader(
        samples,
        batch_sampler=MicroBatches(order, order.state, share),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=max(2, share.micro_steps) if num_workers else None,
    )
    batches = iter(loader)
    while True:
        yield [next(batches) for _ in range(share.micro_steps)]


def eval_batches(samples: TrainSamples, *, rank: int, world_size: int, batch_size: int, num_workers: int) -> DataLoader:
    """Each sample of the split exactly once over all ranks, and as many batches on every rank (padded)."""
    total = sum(samples.source.shard_sizes)
    first, last = rank_slots(rank, world_size, total)
    per_rank = -(-total // world_size)
    padded = -(-per_rank // batch_size) * batch_size
    ids = [*range(first, last), *[PADDING] * (padded - (last - first))]
    requests = [[Request(0, s) for s in ids[i : i + batch_size]] for i in range(0, padded, batch_size)]
    # Short splits do not pay for starting workers
    workers = min(num_workers, len(requests) // 4)
    return DataLoader(
        samples, batch_sampler=requests, collate_fn=collate, num_workers=workers, worker_init_fn=_start_worker
    )


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
