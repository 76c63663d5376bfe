"""Strategy `zero3`: DeepSpeed shards parameters too, each one flat over all ranks, padded to a multiple of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.parallel.engine import WEIGHT, Piece, check_share
from pipeline.parallel.zero import ZeroEngine


class Zero3Engine(ZeroEngine):
    def _config(self) -> dict[str, Any]:
        config = super()._config()
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
        return config

    def pieces(self) -> Iterator[Piece]:
        for name, p in self._parameters.items():
            share = p.ds_tensor.ds_numel  # type: ignore[attr-defined]
            at = self._zero._get_param_partition_rank(p) * share
            valid = max(0, min(share, p.ds_numel - at))  # type: ignore[attr-defined]
            for kind in self.kinds(name):
                if name in self.trainable:
                    state = None if kind == WEIGHT else kind
                    flat, _ = self._zero._get_fp32_opt_state_partition(p, False, optim_state_key=state)
                else:  # no optimizer has a master of it
                    flat = p.ds_tensor  # type: ignore[attr-defined]
                yield Piece(name, kind, min(at, p.ds_numel), flat.data.narrow(0, 0, valid))  # type: ignore[attr-defined]
        yield from self._buffers()

    def finish_load(self, optimizer_step: int) -> None:
        self._set_optimizer_step(optimizer_step)
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones are kept whole on every rank: gather the new values
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def verify(self) -> str:
        if self._engine.zero_optimization_stage() != 3:
            raise RuntimeError(f"strategy zero3, but DeepSpeed runs stage {self._engine.zero_optimization_stage()}")
        whole = [n for n, p in self._parameters.items() if not hasattr(p, "ds_tensor")]
        if whole:
            raise RuntimeError(f"strategy zero3, but these parameters are not partitioned: {whole[:3]}")
        total = sum(p.ds_numel for p in self._parameters.values())  # type: ignore[attr-defined]
        local = sum(p.ds_tensor.numel() for p in self._parameters.values())  # type: ignore[attr-defined]
        check_share("zero3", self.world, local, total, self.world.size)
        return f"DeepSpeed ZeRO-3 ({local:,} of {total:,} parameters on rank {self.world.rank})"
