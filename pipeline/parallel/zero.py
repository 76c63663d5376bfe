"""Strategies `zero1` and `zero2`: DeepSpeed shards moments (1) and gradients (2). `deepspeed.initialize` directly.

Weights stay fp32 and the computation is autocast, as under the other strategies; so reduction is fp32 too. The
state is read through DeepSpeed's private fragment mapping, which is why its version is pinned.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.parallel.engine import BUFFER, WEIGHT, Piece, TrainEngine, check_share, persistent_buffers, split_evenly

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found none
import deepspeed

if not torch.cuda.is_available():
    # Its shared-memory collective would be compiled with g++ on first use; gloo does the same without a compiler
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


REDUCE_BUCKET = 50_000_000  # elements, 200 MB; DeepSpeed's default is ten times that, which no Mixer block fills


class ZeroEngine(TrainEngine):
    stage: int

    def __init__(self, model: Any, groups: Any, loss_fn: Any, options: Any, world: Any):
        super().__init__(model, groups, loss_fn, options, world)
        self.stage = int(options.strategy[-1])
        self._parameters = self._materialize()
        optimizer = self._make_optimizer(self._parameters)
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo", dist_init_required=False
        )
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._config())
        self.model = self._engine
        self._zero: Any = self._engine.optimizer
        self._names_by_id = {id(p): n for n, p in self._parameters.items()}

    def _make_optimizer(self, parameters: dict[str, Any]) -> torch.optim.Optimizer:
        o = self.options
        if o.offload != "optimizer" or o.optimizer != "adamw":
            return super()._make_optimizer(parameters)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            if shutil.which("ninja") is None:  # DeepSpeed depends on it, but its folder need not be on the PATH
                import ninja

                os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), ninja.BIN_DIR])
            return DeepSpeedCPUAdam(
                self._grouped(parameters), lr=0.0, betas=o.betas, eps=o.eps, fp32_optimizer_states=True
            )
        except Exception as e:  # whatever a compiler can end in
            raise UserError(
                f"train.offload=optimizer under {o.strategy} compiles DeepSpeed's CPU Adam, which failed "
                f"({(str(e).strip() or type(e).__name__).splitlines()[-1]}): install g++ and Python's headers "
                "(Debian: python3-dev), or choose train.strategy=fsdp"
            ) from e

    def _config(self) -> dict[str, Any]:
        o = self.options
        on_gpu = self.world.device.type == "cuda"
        offload = {"offload_optimizer": {"device": "cpu", "pin_memory": on_gpu}} if o.offload == "optimizer" else {}
        return {
            "train_micro_batch_size_per_gpu": o.micro_batch_size,
            "gradient_accumulation_steps": o.micro_steps,
            # the plugin layer would turn 0 into 1.0; given here it is taken as it is
            "gradient_clipping": o.clip_grad_norm,
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": True,
                "overlap_comm": on_gpu,
                "round_robin_gradients": False,
                "reduce_bucket_size": REDUCE_BUCKET,
                **offload,
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
        skipped = bool(self._zero.overflow)  # agreed over ranks
        self._count(torch.tensor(float(not skipped)))
        return torch.tensor(math.nan if skipped else float(self._engine.get_global_grad_norm()))

    def pieces(self) -> Iterator[Piece]:
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            moments = self._zero.optimizer.state[flat]
            for p in self._zero.bit16_groups[group]:
                mapping = p._hp_mapping
                if mapping is None:  # nothing of this parameter is on this rank
                    continue
                name, at = self._names_by_id[id(p)], mapping.lp_fragment_address.start
                here = mapping.get_hp_fragment_address()
                for kind in self.kinds(name):
                    held = flat.data if kind == WEIGHT else moments[kind]
                    yield Piece(name, kind, at, held.narrow(0, here.start, here.numel))
        for name in self.names:
            if name not in self.trainable:
                yield Piece(name, WEIGHT, 0, self._parameters[name].data.view(-1))
        yield from self._buffers()

    def _buffers(self) -> Iterator[Piece]:
        return (Piece(n, BUFFER, 0, b.view(-1)) for n, b in persistent_buffers(self._engine.module))

    def owned(self) -> Iterator[Piece]:
        for piece in self.pieces():
            if piece.kind == BUFFER:  # statistics differ between ranks: rank 0's are the run's
                if self.world.is_main:
                    yield piece
            elif self.stage < 3 and piece.name not in self.trainable:  # whole on every rank
                yield split_evenly(piece, self.world.rank, self.world.size)
            else:
                yield piece

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
        total = sum(p.numel() for n, p in self._parameters.items() if n in self.trainable)
        local = sum(f.numel() for f in self._zero.single_partition_of_fp32_groups)
        check_share(f"zero{self.stage}", self.world, local, total, self.world.size)
        return f"DeepSpeed ZeRO-{self.stage} ({local:,} of {total:,} master weights on rank {self.world.rank})"
