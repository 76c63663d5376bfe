"""What ranks are asked to do with trained models: few-shot features and logits, whole and sharded."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.data.augment import EvalTransform
from pipeline.data.loader import TrainSamples, eval_batches
from pipeline.data.synthetic import SyntheticSource
from pipeline.fewshot import FewShot
from pipeline.parallel.world import World
from pipeline.weights.trained import TrainedModel

IMAGE, CLASSES = 15, 10


def fewshot(world: World, run: str, strategy: str) -> tuple[dict[Any, float], int, int]:
    """(accuracies, samples, parameters held on this rank)."""
    predictor = TrainedModel.open(run).load(world, strategy)
    sources = [
        SyntheticSource(s, image_size=IMAGE, num_classes=CLASSES, samples=n) for s, n in (("train", 301), ("val", 97))
    ]
    probe = FewShot.of(*sources, image_size=IMAGE, channels=3, shots=[2, 9], seeds=[0, 1], batch_size=7)
    result = probe.run(predictor.features, world)
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in predictor.model.parameters())
    return result.top1, result.samples, held


def logits(world: World, run: str, strategy: str) -> torch.Tensor:
    """Of this rank's part of a split."""
    predictor = TrainedModel.open(run).load(world, strategy)
    source = SyntheticSource("val", image_size=IMAGE, num_classes=CLASSES, samples=11)
    batches = eval_batches(
        TrainSamples(source, EvalTransform(IMAGE), channels=3, num_classes=CLASSES),
        rank=world.rank, world_size=world.size, batch_size=3, num_workers=0,
    )  # fmt: skip
    return torch.cat([predictor.logits(b)[b.weights > 0] for b in batches])
