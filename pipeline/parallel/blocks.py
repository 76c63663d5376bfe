"""What is done to a model's blocks before any sharding: activation checkpointing and compilation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def prepare_blocks(model: nn.Module, activation_checkpointing: str, compiled: str) -> None:
    """Activation checkpointing and compilation by block, inside whatever sharding comes around them."""
    blocks = getattr(model, "blocks", [])
    for block in blocks:
        if activation_checkpointing != "none":
            checkpoint_forward(block, selective=activation_checkpointing == "selective")
        if compiled == "block":
            block.compile()
    if compiled == "model":
        model.compile()


def checkpoint_forward(block: nn.Module, selective: bool) -> None:
    """Recomputes the block's activations in the backward pass. Replacing `forward` keeps parameter names.

    selective: what GEMMs produced is kept, only the cheap rest (norms, GELU, sums) is computed again.
    """
    forward = block.forward
    contexts: dict[str, Any] = (
        {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_gemms)} if selective else {}
    )

    def recomputed(*args: Any) -> Any:
        # A Mixer draws nothing at random inside (keep-masks are inputs); the default keeps dropout models right
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **contexts)

    block.forward = recomputed


_GEMMS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def _keep_gemms(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _GEMMS else CheckpointPolicy.PREFER_RECOMPUTE
