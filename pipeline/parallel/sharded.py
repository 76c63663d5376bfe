"""Strategy `fsdp`: FSDP2. Parameters, gradients and moments are sharded along dim 0, block by block.

`fully_shard` is called directly: Accelerate's plugin silently becomes DDP on a CPU and fixes the recomputation
policy for activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pipeline.parallel.engine import (
    ADAM_MOMENTS,
    BUFFER,
    WEIGHT,
    Piece,
    TrainEngine,
    persistent_buffers,
    row_offset,
)


class ShardedEngine(TrainEngine):
    def __init__(self, model: Any, groups: Any, loss_fn: Any, options: Any, world: Any):
        super().__init__(model, groups, loss_fn, options, world)
        mesh = init_device_mesh(world.device.type, (world.size,))
        bf16 = options.precision == "bf16"
        # Weights travel in bf16 and are reduced in fp32; autocast decides what is computed in bf16, as for ddp
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in getattr(model, "blocks", []):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        parameters = self._materialize()
        self._parameters: dict[str, Any] = {name: parameters[name] for name in self.names}  # DTensors
        self._optimizer = self._adamw(parameters)

    def _backward(self, loss: Tensor, last: bool) -> None:
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def _update(self, lr: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        limit = self.options.clip_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def pieces(self) -> Iterator[Piece]:
        for name, p in self._parameters.items():
            shape = self.shapes[name]
            _, offsets = compute_local_shape_and_global_offset(shape, p.device_mesh, p.placements)
            at = row_offset(shape, offsets[0])
            yield Piece(name, WEIGHT, at, p.to_local().view(-1))
            for kind in ADAM_MOMENTS:
                yield Piece(name, kind, at, self._optimizer.state[p][kind].to_local().view(-1))
        for name, buffer in persistent_buffers(self.model):
            yield Piece(name, BUFFER, 0, buffer.view(-1))

    def owned(self) -> Iterator[Piece]:
        return (p for p in self.pieces() if p.kind != BUFFER or self.world.is_main)

    def finish_load(self, optimizer_step: int) -> None:
        self.optimizer_step = optimizer_step
        for state in self._optimizer.state.values():
            state["step"].fill_(float(optimizer_step))

    def verify(self) -> str:
        whole = [n for n, p in self._parameters.items() if not isinstance(p, DTensor)]
        if not isinstance(self.model, FSDPModule) or whole:
            raise RuntimeError(f"strategy fsdp, but these parameters are not sharded: {whole[:3] or 'all'}")
        local = sum(p.to_local().numel() for p in self._parameters.values())
        total = sum(p.numel() for p in self._parameters.values())
        units = sum(isinstance(m, FSDPModule) for m in self.model.modules())
        return f"FSDP2 ({units} units, {local:,} of {total:,} parameters on rank {self.world.rank})"
