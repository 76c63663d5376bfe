"""The plan's state a device, against what real engines over real process groups hold."""

from __future__ import annotations

import plan_cases as cases
import pytest

from pipeline.model import model_cost
from pipeline.model.variants import resolve
from pipeline.plan import Setting, memory


@pytest.mark.parametrize(
    ("strategy", "size"),
    [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("zero1", 2), ("zero2", 4), ("zero3", 2), ("zero3", 4)],
)
def test_every_rank_holds_what_the_plan_says(ranks, strategy: str, size: int) -> None:
    cost = model_cost("mixer_s16", 10, 32, **cases.SHAPE)
    spec = resolve("mixer_s16", **cases.SHAPE)
    plan = memory(Setting(spec, (32, 32), 10, cost, strategy, 8, 2, 1, size, "fp32", shard_size=2, cuda=False))
    # Under zero1 and zero2 a rank answers for its own part of the fp32 weights; the whole ones are beside it
    weights = 4 * cost.parameters / size if strategy in ("zero1", "zero2") else plan.weights
    for held_weights, held_moments in ranks(size).run(cases.held, strategy):
        assert held_weights == pytest.approx(weights, rel=0.02)
        assert held_moments == pytest.approx(plan.moments, rel=0.02)
