"""Strategy `ddp`: every rank holds everything, gradients are all-reduced. Through Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.parallel.engine import BUFFER, WEIGHT, Piece, TrainEngine, persistent_buffers, split_evenly

MIN_BYTES_A_WRITER = 64 << 20


class ReplicatedEngine(TrainEngine):
    def __init__(self, model: Any, groups: Any, loss_fn: Any, options: Any, world: Any):
        super().__init__(model, groups, loss_fn, options, world)
        self._raw = model
        self._accelerator = Accelerator(cpu=world.device.type == "cpu")
        self._optimizer = self._make_optimizer(self._materialize())
        # The optimizer stays unwrapped: Accelerate's wrapper would skip steps by its own account of accumulation
        self.model = self._accelerator.prepare_model(model)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def _forward_backward(self, batch: Any, last: bool) -> Any:
        # The flag is read in the forward pass, so the context spans both
        with nullcontext() if last else self._accelerator.no_sync(self.model):
            return super()._forward_backward(batch, last)

    def _update(self, lr: float) -> Tensor:
        return self._torch_update(self._raw.parameters(), lr)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def pieces(self) -> Iterator[Piece]:
        parameters = dict(self._raw.named_parameters())
        for name in self.names:
            p = parameters[name]
            for kind in self.kinds(name):
                yield Piece(name, kind, 0, (p.data if kind == WEIGHT else self._optimizer.state[p][kind]).view(-1))
        for name, buffer in persistent_buffers(self._raw):
            yield Piece(name, BUFFER, 0, buffer.view(-1))

    def owned(self) -> Iterator[Piece]:
        total = sum(p.data.numel() * p.data.element_size() for p in self.pieces())
        writers = min(self.world.size, max(1, total // MIN_BYTES_A_WRITER))
        for piece in self.pieces():
            if piece.kind == BUFFER:  # statistics differ between ranks: rank 0's are the run's
                if self.world.is_main:
                    yield piece
            elif self.world.rank < writers:
                yield split_evenly(piece, self.world.rank, writers)

    def finish_load(self, optimizer_step: int) -> None:
        self._set_optimizer_step(optimizer_step)

    def verify(self) -> str:
        wrapped = isinstance(self.model, DistributedDataParallel)
        if self.world.size > 1 and not wrapped:
            raise RuntimeError(
                f"strategy ddp over {self.world.size} ranks, but the model is a {type(self.model).__name__}"
            )
        whole = {n: p.numel() for n, p in self._raw.named_parameters()}
        if whole != {n: prod(s) for n, s in self.shapes.items()}:
            raise RuntimeError("strategy ddp, but parameters are not whole on this rank")
        return "DDP (DistributedDataParallel)" if wrapped else "DDP of one rank (plain module)"
