"""Accuracy counted by hand, ties and NaN included, and each sample once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.evaluate import evaluate
from pipeline.losses import make_loss
from pipeline.parallel.world import World

LOSS = make_loss("softmax_xent")


def batch(labels: list[int], weights: list[float] | None = None, errors: int = 0) -> Batch:
    m = len(labels)
    return Batch(
        torch.zeros(m, 3, 2, 2, dtype=torch.uint8),
        torch.tensor(labels),
        torch.ones(m) if weights is None else torch.tensor(weights),
        torch.empty(m, 0),
        torch.arange(m),
        torch.zeros(m, dtype=torch.int64),
        ["bad"] * errors,
    )


def result(world: World, logits: list[Tensor], batches: list[Batch]):
    queue = iter(logits)
    return evaluate(lambda _: next(queue), batches, LOSS, world)


def test_equals_a_sort_of_the_logits(world):
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 17), torch.randint(17, (200,))
    weights = (torch.rand(200) > 0.2).float()
    split = [slice(0, 90), slice(90, 91), slice(91, 200)]
    got = result(
        world, [logits[s] for s in split], [batch(labels[s].tolist(), weights[s].tolist(), errors=1) for s in split]
    )
    ranked = logits.argsort(1, descending=True)
    used = weights > 0
    top = [float((ranked[used, :k] == labels[used, None]).any(1).double().mean()) for k in (1, 5)]
    loss = float(torch.nn.functional.cross_entropy(logits[used].double(), labels[used]))
    assert (got.top1, got.top5) == pytest.approx(top, abs=1e-12)
    assert got.loss == pytest.approx(loss, rel=1e-5)
    assert (got.samples, got.bad) == (int(used.sum()), 3)


def test_padding_and_bad_samples_count_in_nothing(world):
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    got = result(world, [logits], [batch([0, 0, 0], [1.0, 0.0, 1.0], errors=1)])
    assert (got.top1, got.top5, got.samples, got.bad) == (0.5, 1.0, 2, 1)


def test_ties_go_to_the_lower_class_as_argmax_has_it(world):
    logits = torch.zeros(7, 7)
    got = result(world, [logits], [batch(list(range(7)))])
    assert got.top1 == pytest.approx(1 / 7) and got.top5 == pytest.approx(5 / 7)


@pytest.mark.parametrize("where", ["all", "true class", "another class"])
def test_a_network_that_gives_nan_is_not_right(world, where):
    logits = torch.tensor([[5.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    match where:
        case "all":
            logits[:] = float("nan")
        case "true class":
            logits[0, 0] = float("nan")
        case "another class":
            logits[0, 3] = float("nan")
    assert result(world, [logits], [batch([0])]).top1 == 0


def test_nothing_to_evaluate(world):
    got = result(world, [], [])
    assert (got.top1, got.samples) == (0.0, 0)
