"""Exponential moving average of the weights, sharded as the engine shards them.

It lives on the pieces this rank answers for, so no strategy needs to know of it: kind `ema`, same names and ranges.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.checkpoint.layout import Key, StateSource
from pipeline.parallel.engine import EMA, WEIGHT, Piece, TrainEngine


class WeightAverage:
    """ema <- decay * ema + (1 - decay) * weight after every update; a skipped step leaves it alone.

    `decay` None: nothing is kept.
    """

    def __init__(self, engine: TrainEngine, decay: float | None):
        self._decay = decay
        self._engine = engine
        self._average: list[Piece] = []

    def load(self, source: StateSource, has: bool) -> None:
        """From the source's average, or, where it `has` none, from its weights."""
        if self._decay is None:
            return
        kind = EMA if has else WEIGHT
        self._average = [
            Piece(
                p.name, EMA, p.offset, source.read(p.name, kind, p.offset, p.data.numel()).to(p.data.device, copy=True)
            )
            for p in self._weights()
        ]

    def reserve(self) -> None:
        """Takes the memory, with no values in it."""
        if self._decay is not None:
            self._average = [Piece(p.name, EMA, p.offset, torch.zeros_like(p.data)) for p in self._weights()]

    @torch.no_grad()
    def update(self) -> None:
        if self._decay is not None:
            average = [p.data for p in self._average if p.data.numel()]
            weights = [p.data for p in self._weights() if p.data.numel()]
            if average:  # a rank may hold nothing: of a small replicated model rank 0 writes, and averages, all
                share = ((1 - self._decay) * self._engine.updated).to(average[0].device)
                torch._foreach_lerp_(average, weights, [share] * len(average))

    def pieces(self) -> Iterator[Piece]:
        return iter(self._average)

    def tensors(self) -> dict[Key, tuple[int, ...]]:
        if self._decay is None:
            return {}
        return {(name, EMA): self._engine.shapes[name] for name in self._engine.names}

    def _weights(self) -> Iterator[Piece]:
        return (p for p in self._engine.owned() if p.kind == WEIGHT)
