"""RandAugment (Cubuk et al. 2020) as the original Mixer was trained with it: big_vision's "archive" variant.

`layers` operations, each drawn uniformly from 16 and always applied, all at one magnitude m: arguments are m/10 times
the operation's full scale, so m > 10 extrapolates. On uint8 [C, H, W] throughout, nearest neighbour for what moves
pixels, 128 where no pixel comes from. Lengths are pixels of a 224 px image and scale with others. Integer arithmetic
where the original rounds in float32 keeps pixels the same on every machine; they differ from it by one level at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

FILL = 128
CUTOUT, TRANSLATE = 40, 100  # pixels of a 224 px image at m = 10
DRAWS = 4  # uniforms a layer: operation, sign, cutout's centre (y, x)

_LEVELS = np.arange(256)


@dataclass(frozen=True)
class RandAugment:
    """`layers` (N in the paper of RandAugment) operations of magnitude `magnitude` (M)."""

    layers: int
    magnitude: float

    @property
    def draws(self) -> int:
        """Uniforms that one image takes."""
        return self.layers * DRAWS

    def __call__(self, image: torch.Tensor, u: np.ndarray) -> torch.Tensor:
        """`u`: `draws` numbers in [0, 1), all that is random here. uint8 [C, H, W] -> the same shape."""
        pixels = image.numpy()
        for which, sign, y, x in u.reshape(self.layers, DRAWS).tolist():
            name = OPERATIONS[int(which * len(OPERATIONS))]
            pixels = apply(name, pixels, self.magnitude, -1.0 if sign < 0.5 else 1.0, (y, x))
        return torch.from_numpy(np.ascontiguousarray(pixels))


def apply(
    name: str, pixels: np.ndarray, magnitude: float, sign: float = 1.0, centre: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """One operation on uint8 [C, H, W]. `sign` turns geometry around; `centre` in [0, 1) is where cutout cuts."""
    share = magnitude / 10
    scale = pixels.shape[-1] / 224
    if name in _BLENDS:
        return _BLENDS[name](pixels, share * 1.8 + 0.1)
    if name in _GEOMETRY:
        return _warp(pixels, *_GEOMETRY[name](sign * share, pixels.shape[1], pixels.shape[2], scale))
    if name == "Cutout":
        return cutout(pixels, int(share * CUTOUT * scale), centre)
    return _TONES[name](pixels, share)


# ------------------------------------------------------------------------------------- tones: a table a channel


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.take(table.clip(0, 255).astype(np.uint8), pixels)


def autocontrast(pixels: np.ndarray, share: float = 0.0) -> np.ndarray:
    """Stretches each channel to [0, 255]."""
    out = np.empty_like(pixels)
    for channel, result in zip(pixels, out):
        low, high = int(channel.min()), int(channel.max())
        table = (_LEVELS - low) * 255 // (high - low) if high > low else _LEVELS
        result[...] = _look_up(channel, table)
    return out


def equalize(pixels: np.ndarray, share: float = 0.0) -> np.ndarray:
    """Evens out each channel's histogram, with Pillow's rounding."""
    out = np.empty_like(pixels)
    for channel, result in zip(pixels, out):
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (channel.size - int(counts[counts > 0][-1])) // 255
        darker = np.cumsum(counts) - counts
        result[...] = _look_up(channel, (darker + step // 2) // step) if step else channel
    return out


def invert(pixels: np.ndarray, share: float = 0.0) -> np.ndarray:
    return 255 - pixels


def posterize(pixels: np.ndarray, share: float) -> np.ndarray:
    """Keeps int(4 m/10) bits; 8 and more keep all."""
    drop = 8 - min(int(share * 4), 8)
    return pixels >> drop << drop


def solarize(pixels: np.ndarray, share: float) -> np.ndarray:
    """Inverts from level int(256 m/10) on: with m >= 10 nothing."""
    return _look_up(pixels, np.where(int(share * 256) > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(pixels: np.ndarray, share: float) -> np.ndarray:
    """Adds int(110 m/10) to what is darker than 128."""
    return _look_up(pixels, np.where(_LEVELS < 128, _LEVELS + int(share * 110), _LEVELS))


# ------------------------------------------------------------------- blends: away from a degenerate image, or to it


def _blend(degenerate: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """factor 0 is the degenerate image, 1 the image, above 1 extrapolates; truncated as the original's cast does."""
    base = degenerate.astype(np.float32)
    out = pixels - base
    out *= np.float32(factor)
    out += base
    return np.clip(out, 0, 255, out=out).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Luminance uint8 [H, W]: TensorFlow's weights, and its way back from [0, 1], a factor of 255.5 cut off."""
    if len(pixels) == 1:
        return pixels[0]
    r, g, b = pixels.astype(np.int32)
    return ((2989 * r + 5870 * g + 1140 * b) * 511 // 5_100_000).astype(np.uint8)


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _blend(_grey(pixels)[None], pixels, factor)


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    mean = np.array(int(_grey(pixels).mean()))
    return np.take(_blend(mean, _LEVELS, factor), pixels)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return np.take(_blend(np.array(0), _LEVELS, factor), pixels)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Degenerate: the 3x3 mean with a centre of weight 5, of 13; the outermost pixels stay."""
    out = pixels.copy()
    p = pixels.astype(np.uint16)
    rows = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    smooth = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * p[:, 1:-1, 1:-1]) // 13
    inner = np.s_[:, 1:-1, 1:-1]
    out[inner] = _blend(smooth, pixels[inner], factor)
    return out


# ---------------------------------------------------------------------------------------------------- geometry


def _warp(pixels: np.ndarray, x: tuple[float, float, float], y: tuple[float, float, float]) -> np.ndarray:
    """Pixel (i, j) of the result (column, row) is the nearest to (x0 i + x1 j + x2, y0 i + y1 j + y2)."""
    channels, height, width = pixels.shape
    i, j = np.arange(width), np.arange(height)[:, None]
    column = _round(x[0] * i + (x[1] * j + x[2]))
    row = _round(y[0] * i + (y[1] * j + y[2]))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = np.where(inside, row * width + column, height * width)
    flat = np.full((channels, height * width + 1), FILL, dtype=np.uint8)
    flat[:, :-1] = pixels.reshape(channels, -1)
    return np.take(flat, source, axis=1)


def _round(x: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves away from zero."""
    return np.trunc(x + np.copysign(0.5, x)).astype(np.int64)


def _rotation(share: float, height: int, width: int, scale: float) -> tuple[tuple, tuple]:
    """About the centre, 30 degrees at m = 10."""
    angle = math.radians(30 * share)
    # To so few bits that all products below are exact: no machine's cosine decides where halves go
    c, s = (round(f(angle) * 2**20) / 2**20 for f in (math.cos, math.sin))
    x, y = (width - 1) / 2, (height - 1) / 2
    return (c, -s, x - c * x + s * y), (s, c, y - s * x - c * y)


_GEOMETRY: dict[str, Callable[[float, int, int, float], tuple[tuple, tuple]]] = {
    "Rotate": _rotation,
    "ShearX": lambda share, h, w, scale: ((1, 0.3 * share, 0), (0, 1, 0)),
    "ShearY": lambda share, h, w, scale: ((1, 0, 0), (0.3 * share, 1, 0)),
    "TranslateX": lambda share, h, w, scale: ((1, 0, TRANSLATE * share * scale), (0, 1, 0)),
    "TranslateY": lambda share, h, w, scale: ((1, 0, 0), (0, 1, TRANSLATE * share * scale)),
}


def cutout(pixels: np.ndarray, pad: int, centre: tuple[float, float]) -> np.ndarray:
    """A grey square of side 2 pad around a pixel of the image, cut off at the border (DeVries and Taylor 2017)."""
    y, x = int(centre[0] * pixels.shape[1]), int(centre[1] * pixels.shape[2])
    out = pixels.copy()
    out[:, max(0, y - pad) : y + pad, max(0, x - pad) : x + pad] = FILL
    return out


_TONES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
}
_BLENDS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
# A draw picks one by its place: the order is part of what a seed means
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip
