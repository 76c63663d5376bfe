"""How a new run begins with another's weights: as they are, with a new head, or grown to a higher resolution.

Growing is the paper's appendix C. K times the resolution has K^2 times the tokens, so the token-mixing MLPs become
K^2 copies of themselves, one for each of the K x K tiles of the image: block-diagonal matrices, biases repeated. That
holds where tokens are counted tile by tile; here they are counted row by row through the whole image, so what reads
or writes tokens is permuted from tile order to raster order. The network then computes on every tile what it
computed on a whole image before, exactly, until training lets the tiles talk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.parallel.engine import BUFFER, EMA, WEIGHT
from pipeline.weights.shape import Shapes

_READS = "mlp_tokens.fc1.weight"  # [D_S, S]


def raster_to_tile(side: int, tiles: int) -> Tensor:
    """For each token of a (tiles*side)^2 grid in raster order, its number in tile order. [tiles^2 * side^2]."""
    at = torch.arange(side * tiles)
    tile, inside = at // side, at % side
    tile_number = tile[:, None] * tiles + tile[None, :]
    token_number = inside[:, None] * side + inside[None, :]
    return (tile_number * side * side + token_number).flatten()


def grow(name: str, tensor: Tensor, side: int, tiles: int) -> Tensor:
    """One tensor of a Mixer of side x side tokens, for tiles*side x tiles*side tokens; most stay as they are."""
    part = name.partition(".mlp_tokens.")[2]
    if not part or tiles == 1:
        return tensor
    copies = tiles * tiles
    order = raster_to_tile(side, tiles)
    match part:
        case "fc1.weight":
            return torch.block_diag(*[tensor] * copies)[:, order]
        case "fc1.bias":
            return tensor.repeat(copies)
        case "fc2.weight":
            return torch.block_diag(*[tensor] * copies)[order]
        case "fc2.bias":
            return tensor.repeat(copies)[order]
    raise ValueError(f"no rule to grow {name!r}")


def growth(old_pixels: int, new_pixels: int, where: str) -> int:
    """K. Raises UserError, with sizes that fit, where the new size is no multiple of the old one."""
    if new_pixels % old_pixels:
        fitting = ", ".join(str(old_pixels * k) for k in (1, 2, 3))
        raise UserError(
            f"model.image_size={new_pixels} is not a multiple of the {old_pixels} pixels that {where} was trained at; "
            f"{fitting} are (the token MLPs grow by whole tiles; paper, appendix C)"
        )
    return new_pixels // old_pixels


class ForeignWeights:
    """A state source: another run's weights, made to fit the model of the new run; moments are zeros.

    Args:
        shapes: of the new run's parameters.
        patch_size: of the model, to speak of pixels; None for models that are no Mixers.
        new_head: values of the head's weight and bias are zeros and `head_bias` instead of the other run's.
        average: take its averaged weights.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        shapes: Shapes,
        *,
        patch_size: int | None,
        head: str = "head",
        new_head: bool = False,
        head_bias: float = 0.0,
        average: bool = False,
    ):
        self._reader, self._kind = reader, EMA if average else WEIGHT
        self._shapes, self._head_bias = shapes, head_bias
        self._new = {f"{head}.weight", f"{head}.bias"} if new_head else set()
        self._side, self.tiles = 0, 1
        first = f"blocks.0.{_READS}"
        if patch_size and first in shapes and reader.has(first, self._kind):
            old, new = (math.isqrt(s) for s in (reader.shape(first, self._kind)[1], shapes[first][1]))
            if old * old == reader.shape(first, self._kind)[1] and new * new == shapes[first][1] and new != old:
                self._side, self.tiles = old, growth(old * patch_size, new * patch_size, str(reader.folder))
        self._cached: tuple[str, Tensor] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What this source has to offer, after growing and with the new head."""
        copies = self.tiles**2
        offered = {}
        for name, kind in self._reader.manifest.tensors:
            if kind == self._kind:
                shape = self._reader.shape(name, kind)
                grown = ".mlp_tokens." in name
                offered[name] = tuple(n * copies for n in shape) if grown else shape
        return offered | {n: tuple(self._shapes[n]) for n in self._new}

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        if kind == BUFFER:
            return self._reader.read(name, kind, offset, length)
        if kind not in (WEIGHT, EMA):
            return torch.zeros(length)
        if name not in self._new and (self.tiles == 1 or ".mlp_tokens." not in name):
            return self._reader.read(name, self._kind, offset, length)
        if self._cached is None or self._cached[0] != name:
            self._cached = name, self._make(name).reshape(-1)
        return self._cached[1][offset : offset + length]

    def _make(self, name: str) -> Tensor:
        if name in self._new:
            return torch.full(self._shapes[name], self._head_bias if name.endswith("bias") else 0.0)
        return grow(name, self._reader.tensor(name, self._kind), self._side, self.tiles)


def advice(source: ForeignWeights, wanted: Shapes) -> list[str]:
    """Which setting to change where a run's model and the weights that it shall begin with do not fit."""
    lines = []
    offered = source.shapes()
    head = offered.get("head.weight"), wanted.get("head.weight")
    if head[0] and head[1] and head[0][0] != head[1][0]:
        lines.append(
            f"for a new head (other classes) use `mixer finetune`, or run.init_head=zero; {head[0][0]} are there"
        )
    reads = f"blocks.0.{_READS}"
    ours, theirs = wanted.get(reads), offered.get(reads)
    if ours and theirs and ours[1] == theirs[1] and ours[0] != theirs[0]:
        lines.append(f"for these weights set model.tokens_mlp_dim={theirs[0]}")
    return lines
