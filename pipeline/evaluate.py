"""Exact accuracy over a split: each sample once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.parallel.world import World


@dataclass(frozen=True)
class EvalResult:
    """top1 and top5 as shares of `samples`; `bad` samples could not be read and count in neither."""

    top1: float
    top5: float
    loss: float
    samples: int
    bad: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def evaluate(
    predict: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    world: World,
    on_batch: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Runs `predict` (logits [m, K]) over this rank's batches and sums over ranks. Collective."""
    total = torch.zeros(5, dtype=torch.float64, device=world.device)  # top1, top5, loss, samples, bad
    for batch in batches:
        logits = predict(batch)
        labels = batch.labels.to(logits.device)
        weights = batch.weights.to(logits.device, torch.float64)
        # The rank of the true class counts the classes that are not behind it: exact top-k without sorting. Ties with
        # lower indices go first, as argmax has it; NaN is behind nothing and nothing is behind it
        truth = logits.gather(1, labels[:, None])
        behind = (logits < truth).sum(1) + ((logits == truth) & (_columns(logits) >= labels[:, None])).sum(1)
        ahead = logits.shape[1] - behind
        total += torch.stack(
            [
                ((ahead < 1) * weights).sum(),
                ((ahead < 5) * weights).sum(),
                (loss_fn(logits, labels).double() * weights).sum(),
                weights.sum(),
                torch.tensor(float(len(batch.errors)), dtype=torch.float64, device=world.device),
            ]
        )
        on_batch()
    top1, top5, loss, samples, bad = world.sum(total.tolist())
    count = max(samples, 1.0)
    return EvalResult(top1 / count, top5 / count, loss / count, int(samples), int(bad))


def _columns(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[1], device=logits.device)[None, :]
