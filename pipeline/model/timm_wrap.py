"""timm's models with `MlpMixer`'s interface: blocks to shard and recompute, and randomness that enters as an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_KEY_BITS = 32  # further columns of `keep`, where a model has dropout: the bits of the sample's key
_WORD = 0xFFFFFFFF


class KeyedDropPath(nn.Module):
    """Stochastic depth whose mask is given: keep [B], 0 or 1. Rescaled by 1/(1-p), as timm's. Nothing given: identity.

    `keep` is noted by the model before its forward pass and stays until the next, so recomputation sees the same.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is None:
            return x
        mask = self.keep.to(x.dtype) / (1 - self.drop_prob)
        return x * mask.view(-1, *[1] * (x.ndim - 1))


class KeyedDropout(nn.Module):
    """Dropout whose mask is a hash of (sample key, layer, element): no generator, the same on every device and rank."""

    def __init__(self, p: float, layer: int):
        super().__init__()
        self.p, self.layer = p, layer
        self.key: Tensor | None = None  # int64 [B]

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None:
            return x
        element = torch.arange(x[0].numel(), device=x.device)
        seed = mix(self.key + self.layer * 0x9E3779B9 & _WORD)
        kept = mix(mix(element)[None] ^ seed[:, None]) >= int(self.p * 2**32)
        return x * kept.view(x.shape).to(x.dtype) / (1 - self.p)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that leaves no pattern (MurmurHash3's finaliser), on int64."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _WORD
    return x ^ (x >> 16)


class KeyedModel(nn.Module):
    """What `wrap` adds to a timm model's class."""

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [B, K]. keep [B, len(drop_rates())], 0 or 1; None: nothing is dropped."""
        paths, dropouts = self._keyed()
        for i, path in enumerate(paths):
            path.keep = None if keep is None else keep[:, i]
        if dropouts:
            key = None
            if keep is not None:
                bits = keep[:, len(paths) :].long()
                key = (bits << torch.arange(_KEY_BITS, device=keep.device)).sum(1)
            for dropout in dropouts:
                dropout.key = key
        return super().forward(images)

    def drop_rates(self) -> list[float]:
        """The probability that each column of `keep` is 0."""
        paths, dropouts = self._keyed()
        return [p.drop_prob for p in paths] + [0.5] * (_KEY_BITS if dropouts else 0)

    def _keyed(self) -> tuple[list[KeyedDropPath], list[KeyedDropout]]:
        modules = list(self.modules())
        return [m for m in modules if isinstance(m, KeyedDropPath)], [m for m in modules if isinstance(m, KeyedDropout)]


def wrap(model: nn.Module) -> Any:
    """The model itself, its class extended by `KeyedModel` and, where it has no `blocks`, by those of its stages."""
    layer = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "DropPath":
                rate = float(child.drop_prob)  # type: ignore[arg-type]
                setattr(module, name, KeyedDropPath(rate) if rate else nn.Identity())
            elif isinstance(child, nn.Dropout) and child.p:
                setattr(module, name, KeyedDropout(child.p, layer))
                layer += 1
    extra: dict[str, Any] = {}
    if not hasattr(model, "blocks"):
        extra["blocks"] = property(stage_blocks)
    model.__class__ = type(type(model).__name__, (KeyedModel, type(model)), extra)
    return model


def stage_blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a model that is built of stages (or of `layer1` to `layer4`), in order; else none."""
    layers = [getattr(model, f"layer{i}") for i in range(1, 5) if hasattr(model, f"layer{i}")]
    return [block for stage in getattr(model, "stages", layers) for block in _innermost(stage)]


def _innermost(stage: nn.Module) -> list[nn.Module]:
    inner = getattr(stage, "blocks", stage)  # ResNetV2's stage is a module that holds its blocks
    return list(inner) if isinstance(inner, nn.Sequential | nn.ModuleList) else [inner]
