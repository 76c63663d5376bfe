"""Strategies `fsdp` and `hsdp`: FSDP2. Parameters, gradients and moments are sharded along dim 0, block by block.

`fully_shard` is called directly: Accelerate's plugin silently becomes DDP on a CPU and fixes the recomputation
policy for activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from data_tools.errors import UserError
from pipeline.parallel.engine import (
    BUFFER,
    WEIGHT,
    Piece,
    TrainEngine,
    check_share,
    persistent_buffers,
    row_offset,
)


class ShardedEngine(TrainEngine):
    def __init__(self, model: Any, groups: Any, loss_fn: Any, options: Any, world: Any):
        super().__init__(model, groups, loss_fn, options, world)
        self.mesh = mesh = self._mesh()
        offloaded, on_gpu = options.offload == "optimizer", world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if offloaded else OffloadPolicy()
        bf16 = options.precision == "bf16"
        # Weights travel in bf16 and are reduced in fp32; autocast decides what is computed in bf16, as for ddp
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in getattr(model, "blocks", []):
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=options.reshard_after_forward,
            )
        fully_shard(
            model,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=options.reshard_after_forward,
        )
        self._parameters: dict[str, Any] = self._materialize(torch.device("cpu") if offloaded else None)  # DTensors
        self._optimizer = self._make_optimizer(self._parameters)

    def _mesh(self) -> DeviceMesh:
        """One dimension of all ranks for fsdp; (copies, ranks a copy is sharded over) for hsdp."""
        size, device = self.world.size, self.world.device.type
        if self.options.strategy == "fsdp":
            return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
        inner = self._shard_size()
        if size % inner:
            raise UserError(
                f"train.shard_size={inner} does not divide the {size} ranks; choose one of "
                f"{[n for n in range(1, size + 1) if size % n == 0]}, or train.strategy=fsdp"
            )
        return init_device_mesh(device, (size // inner, inner), mesh_dim_names=("copy", "shard"))

    def _shard_size(self) -> int:
        return self.options.shard_size or self.world.local_size

    def _backward(self, loss: Tensor, last: bool) -> None:
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def _update(self, lr: float) -> Tensor:
        return self._torch_update(self.model.parameters(), lr)

    def _make_optimizer(self, parameters: dict[str, Any]) -> torch.optim.Optimizer:
        if self.options.optimizer == "sgd":
            return LocalSGD(self._grouped(parameters), lr=0.0, momentum=self.options.momentum, fused=True)
        return super()._make_optimizer(parameters)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @torch.no_grad()
    def pieces(self) -> Iterator[Piece]:
        for name, p in self._parameters.items():
            _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            at = row_offset(tuple(p.shape), offsets[0])
            for kind in self.kinds(name):
                yield Piece(name, kind, at, local(p if kind == WEIGHT else self._optimizer.state[p][kind]).view(-1))
        for name, buffer in persistent_buffers(self.model):
            yield Piece(name, BUFFER, 0, buffer.view(-1))

    def owned(self) -> Iterator[Piece]:
        first_copy = self.mesh.ndim == 1 or self.mesh.get_local_rank("copy") == 0
        return (p for p in self.pieces() if (self.world.is_main if p.kind == BUFFER else first_copy))

    def finish_load(self, optimizer_step: int) -> None:
        self._set_optimizer_step(optimizer_step)

    def verify(self) -> str:
        whole = [n for n, p in self._parameters.items() if not isinstance(p, DTensor)]
        if not isinstance(self.model, FSDPModule) or whole:
            raise RuntimeError(f"strategy fsdp, but these parameters are not sharded: {whole[:3] or 'all'}")
        local = sum(p.to_local().numel() for p in self._parameters.values())
        total = sum(p.numel() for p in self._parameters.values())
        units = sum(isinstance(m, FSDPModule) for m in self.model.modules())
        copies = self.mesh.size() // self.mesh["shard"].size()
        if copies != (1 if self.options.strategy == "fsdp" else self.world.size // self._shard_size()):
            raise RuntimeError(f"strategy {self.options.strategy}, but the state exists {copies} times")
        check_share(self.options.strategy, self.world, local, total, self.world.size // copies)
        name = "FSDP2" if copies == 1 else f"HSDP, {copies} copies"
        return f"{name} ({units} units, {local:,} of {total:,} parameters on rank {self.world.rank})"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class LocalSGD(torch.optim.SGD):
    """torch's fused SGD on this rank's shards: its kernel, which can skip a step on the device, takes no DTensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(local(p))
            if held:
                torch._fused_sgd_(
                    [local(p) for p in held],
                    [local(p.grad) for p in held],
                    [self.state[p]["momentum_buffer"] for p in held],
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                    found_inf=self.found_inf,  # type: ignore[attr-defined]
                )
