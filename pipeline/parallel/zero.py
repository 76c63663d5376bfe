"""Strategies `zero1` and `zero2`: DeepSpeed shards moments (1) and gradients (2). `deepspeed.initialize` directly.

Weights stay fp32 and the computation is autocast, as under the other strategies; so reduction is fp32 too. The
state is read through DeepSpeed's private fragment mapping, which is why its version is pinned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.parallel.engine import ADAM_MOMENTS, BUFFER, WEIGHT, Piece, TrainEngine, persistent_buffers

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found none
import deepspeed

if not torch.cuda.is_available():
    # Its shared-memory collective would be compiled with g++ on first use; gloo does the same without a compiler
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroEngine(TrainEngine):
    stage: int

    def __init__(self, model: Any, groups: Any, loss_fn: Any, options: Any, world: Any):
        super().__init__(model, groups, loss_fn, options, world)
        self.stage = int(options.strategy[-1])
        self._parameters = self._materialize()
        optimizer = self._adamw(self._parameters)
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo", dist_init_required=False
        )
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config())
        self.model = self._engine
        self._zero: Any = self._engine.optimizer
        self._names_by_id = {id(p): n for n, p in self._parameters.items()}

    def _config(self) -> dict[str, Any]:
        o = self.options
        return {
            "train_micro_batch_size_per_gpu": o.micro_batch_size,
            "gradient_accumulation_steps": o.micro_steps,
            # the plugin layer would turn 0 into 1.0; given here it is taken as it is
            "gradient_clipping": o.clip_grad_norm,
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": True,
                "overlap_comm": self.world.device.type == "cuda",
                "round_robin_gradients": False,
            },
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _forward_backward(self, batch: Any, last: bool) -> Any:
        # The forward pass already asks whether this is the last micro-batch
        self._engine.set_gradient_accumulation_boundary(last)
        stats = super()._forward_backward(batch, last)
        if not last:
            self._engine.step()
        return stats

    def _update(self, lr: float) -> Tensor:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.as_tensor(float(self._engine.get_global_grad_norm()))

    def pieces(self) -> Iterator[Piece]:
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            moments = self._zero.optimizer.state[flat]
            for p in self._zero.bit16_groups[group]:
                mapping = p._hp_mapping
                if mapping is None:  # nothing of this parameter is on this rank
                    continue
                name, at = self._names_by_id[id(p)], mapping.lp_fragment_address.start
                here = mapping.get_hp_fragment_address()
                yield Piece(name, WEIGHT, at, flat.data.narrow(0, here.start, here.numel))
                for kind in ADAM_MOMENTS:
                    yield Piece(name, kind, at, moments[kind].narrow(0, here.start, here.numel))
        yield from self._buffers()

    def _buffers(self) -> Iterator[Piece]:
        return (Piece(n, BUFFER, 0, b.view(-1)) for n, b in persistent_buffers(self._engine.module))

    def owned(self) -> Iterator[Piece]:
        return (p for p in self.pieces() if p.kind != BUFFER or self.world.is_main)

    def finish_load(self, optimizer_step: int) -> None:
        self._set_optimizer_step(optimizer_step)
        self._zero.update_lp_params()

    def _inner_optimizer(self) -> Any:
        return self._zero.optimizer

    def verify(self) -> str:
        if self._engine.zero_optimization_stage() != self.stage:
            raise RuntimeError(
                f"strategy zero{self.stage}, but DeepSpeed runs stage {self._engine.zero_optimization_stage()}"
            )
        if self._zero.partition_gradients != (self.stage == 2):
            raise RuntimeError(f"strategy zero{self.stage}, but partition_gradients={self._zero.partition_gradients}")
        total = sum(p.numel() for p in self._parameters.values())
        local = sum(f.numel() for f in self._zero.single_partition_of_fp32_groups)
        if self.world.size > 1 and local > 0.75 * total + 4096:
            raise RuntimeError(
                f"strategy zero{self.stage}, but rank {self.world.rank} holds {local:,} of {total:,} master weights"
            )
        return f"DeepSpeed ZeRO-{self.stage} ({local:,} of {total:,} master weights on rank {self.world.rank})"
