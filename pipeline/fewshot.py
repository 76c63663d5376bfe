"""The few-shot probe: how well a linear map on frozen features tells classes apart after a few images of each.

big_vision's `evaluators/fewshot_lsr.py`, which the paper's numbers are taken to be from (it says only
"l2-regularised linear regression"): features are the head's input; of every class the first `shots` of a seeded
permutation; z-scores with the few images' mean and standard deviation; one more feature of constant value, instead of
a bias; targets +1 and -1; ridge regression in closed form.

Features are computed batch by batch under whatever holds the model, and those of the test images are never collected:
each batch is scored by all probes at once. Memory: the few training images' features, and the probes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.data.augment import EvalTransform
from pipeline.data.loader import Batch, EvalBatches, TrainSamples, eval_batches
from pipeline.data.source import SampleSource
from pipeline.evaluate import raise_together
from pipeline.parallel.world import World

BIAS = 100.0  # the constant feature: large, so that the penalty hardly holds its weight back
L2 = 1024.0
SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)


class Probe(NamedTuple):
    """scores = features @ weight + bias, with weight [D, K] and bias [K], fp64: z-scores and constant folded in."""

    weight: Tensor
    bias: Tensor


def pick(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of up to `shots` samples of each class, class by class, from one generator as in the original."""
    rng = np.random.default_rng(seed)
    present = range(int(labels.max()) + 1)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:shots] for k in present])


def fit(features: Tensor, labels: Tensor, num_classes: int, l2: float = L2) -> Probe:
    """Ridge regression in closed form. features [N, D], labels int [N]; the smaller of two equal systems is solved.

    With X the z-scores and the constant, Y = 2 onehot - 1: W = (X'X + l2 I)^-1 X'Y = X' (XX' + l2 I)^-1 Y.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0, unbiased=False) + 1e-5
    x = torch.cat([(x - mean) / std, torch.full_like(x[:, :1], BIAS)], 1)
    y = torch.full((len(x), num_classes), -1.0, dtype=x.dtype, device=x.device)
    y[torch.arange(len(x)), labels.long()] = 1.0
    n, d = x.shape
    identity = torch.eye(min(n, d), dtype=x.dtype, device=x.device)
    if d > n:
        w = x.T @ torch.linalg.solve(x @ x.T + l2 * identity, y)
    else:
        w = torch.linalg.solve(x.T @ x + l2 * identity, x.T @ y)
    weight = w[:-1] / std[:, None]
    return Probe(weight, BIAS * w[-1] - mean @ weight)


@dataclass(frozen=True)
class FewShotResult:
    """Top-1 over the test split by (shots, seed), and how many images that is."""

    top1: dict[tuple[int, int], float]
    samples: int

    def mean(self, shots: int) -> float:
        return statistics.fmean(v for (s, _), v in self.top1.items() if s == shots)

    def spread(self, shots: int) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return statistics.pstdev(v for (s, _), v in self.top1.items() if s == shots)

    def shots(self) -> list[int]:
        return sorted({s for s, _ in self.top1})


@dataclass(frozen=True)
class FewShot:
    """The probe's data and settings. `run` is collective and takes any number of ranks."""

    train: TrainSamples
    test: TrainSamples
    labels: np.ndarray  # of `train`, or of its first ones: the pool to choose from
    shots: Sequence[int] = SHOTS
    seeds: Sequence[int] = SEEDS
    l2: float = L2
    batch_size: int = 64
    num_workers: int = 0

    @staticmethod
    def of(
        train: SampleSource, test: SampleSource, *, image_size: int, channels: int, pool: int | None = None,
        order: np.ndarray | None = None, **settings: object,
    ) -> FewShot:  # fmt: skip
        """pool: only the first so many training images are chosen from. order: the run's pixel permutation.

        Images are resized to both sides of image_size / 0.875, and the centre is cut.

        Raises:
            UserError: train and test are one and the same, or samples without a class.
        """
        if train.digest == test.digest:
            raise UserError(f"{train.name} has no split of its own to test on: give one with --test")
        labels = train.labels()[:pool]
        if labels.min() < 0:
            raise UserError(f"{train.name} has samples without a class: no probe can be fitted to them")
        classes = 1 + int(max(labels.max(), test.labels().max()))
        transform = EvalTransform(image_size, 0.875, "square", order=order)
        data = (TrainSamples(s, transform, channels=channels, num_classes=classes) for s in (train, test))
        return FewShot(*data, labels, **settings)  # type: ignore[arg-type]

    def run(
        self, features: Callable[[Batch], Tensor], world: World, on_batch: Callable[[], None] = lambda: None
    ) -> FewShotResult:
        """features: a batch's [m, D], of a model that every rank calls equally often, sharded or not."""
        picked = {(n, seed): pick(self.labels, n, seed) for n in self.shots for seed in self.seeds}
        probes = self._fit_all(picked, features, world, on_batch)
        weight = torch.cat([p.weight for p in probes], 1)
        bias = torch.cat([p.bias for p in probes])
        totals = torch.zeros(len(probes) + 1, dtype=torch.float64, device=world.device)
        failure = None
        for batch in self._batches(self.test, None, world):
            failure = failure or batch.failure
            scores = features(batch).double() @ weight + bias
            guesses = scores.view(len(scores), len(probes), -1).argmax(-1)
            used = batch.weights.to(world.device, torch.float64)
            right = guesses == batch.labels.to(world.device)[:, None]
            totals[:-1] += (right * used[:, None]).sum(0)
            totals[-1] += used.sum()
            on_batch()
        raise_together(failure, world)
        *right, samples = world.sum(totals.tolist())
        return FewShotResult({k: n / max(samples, 1.0) for k, n in zip(picked, right)}, int(samples))

    def _fit_all(
        self, picked: dict[tuple[int, int], np.ndarray], features: Callable[[Batch], Tensor], world: World,
        on_batch: Callable[[], None],
    ) -> list[Probe]:  # fmt: skip
        """One probe for each choice of images; every image goes through the model once, the ranks share the fits."""
        needed = np.unique(np.concatenate(list(picked.values())))
        rows, ids = [], []
        failure = None
        for batch in self._batches(self.train, needed, world):
            failure = failure or batch.failure
            used = batch.weights > 0
            rows.append(features(batch).cpu()[used])
            ids.append(batch.ids[used])
            on_batch()
        raise_together(failure, world)
        parts = world.gather((torch.cat(ids).numpy(), torch.cat(rows).numpy()))
        found = np.concatenate([i for i, _ in parts])  # sorted: ranks hold consecutive parts; unreadable ones lack
        known = torch.from_numpy(np.concatenate([f for _, f in parts]))
        mine = {}
        for number, chosen in enumerate(picked.values()):
            if number % world.size == world.rank:
                chosen = chosen[np.isin(chosen, found)]
                x = known[np.searchsorted(found, chosen)].to(world.device)
                y = torch.from_numpy(self.labels[chosen]).to(world.device)
                mine[number] = [t.cpu().numpy() for t in fit(x, y, self.train.num_classes, self.l2)]
        fitted = {n: p for part in world.gather(mine) for n, p in part.items()}
        return [Probe(*(torch.from_numpy(t).to(world.device) for t in fitted[n])) for n in range(len(picked))]

    def _batches(self, samples: TrainSamples, ids: np.ndarray | None, world: World) -> EvalBatches:
        return eval_batches(
            samples,
            rank=world.rank,
            world_size=world.size,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            ids=ids,
        )

    @property
    def num_batches(self) -> int:
        """Upper bound of the batches that one rank of one sees, for a progress bar."""
        few = min(len(self.labels), int(self.labels.max() + 1) * max(self.shots) * len(self.seeds))
        return -(-(few + sum(self.test.source.shard_sizes)) // self.batch_size)
