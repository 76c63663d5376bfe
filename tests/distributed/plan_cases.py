"""What the ranks do for `test_plan_state.py`: make a real engine and count the bytes of state it holds."""

from __future__ import annotations

import torch

from pipeline.losses import make_loss
from pipeline.model import create_model
from pipeline.optim import param_groups
from pipeline.parallel.engine import MOMENTS, EngineOptions, make_engine
from pipeline.parallel.world import World

SHAPE = {"patch_size": 8, "hidden_dim": 64, "num_blocks": 4}


def held(world: World, strategy: str) -> tuple[int, int]:
    """(bytes of weights, bytes of moments) in this rank's pieces."""
    from pipeline.data.loader import PADDING, Batch

    model = create_model("mixer_s16", 10, 32, device="meta", **SHAPE)
    options = EngineOptions(strategy, "fp32", 8, 2, 2, (0.9, 0.999), 1e-8, 1.0, shard_size=2)
    engine = make_engine(model, param_groups(model, 0.1), make_loss("softmax_xent", 0.0), options, world)
    batch = Batch(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2),
        torch.ones(2, 0),
        torch.full((2,), PADDING),
        torch.zeros(2, dtype=torch.int64),
        [],
    )
    engine.warm_up(batch)
    moments = {kind for kinds in MOMENTS.values() for kind in kinds}
    pieces = [(p.kind, p.data.numel() * p.data.element_size()) for p in engine.pieces()]
    weights = sum(size for kind, size in pieces if kind == "weight")
    return weights, sum(size for kind, size in pieces if kind in moments)
