"""Training and evaluation transforms of one image: uint8 [H, W, C] in, uint8 torch [C, size, size] out.

Every random number comes from a Philox stream keyed by (seed, epoch, sample id): the same sample of the same epoch
gets the same pixels on any rank, in any worker, in any micro-batch. Philox' raw output is part of numpy's stability
promise, its distributions are not: so uniforms are made here, from the raw bits, in a fixed layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.data.decode import Crop
from pipeline.data.order import key
from pipeline.data.randaugment import RandAugment

_CROP_TRIES = 10
_CROP_DRAWS = 4 * _CROP_TRIES


def philox(*keys: int) -> np.random.Philox:
    """The counter-based generator of Salmon et al. 2011 under a 128-bit key."""
    return np.random.Philox(key=np.array(keys, dtype=np.uint64))


def uniforms(purpose: str, seed: int, epoch: int, sample_id: int, count: int) -> np.ndarray:
    """`count` float64 in [0, 1) that depend on the arguments alone."""
    raw = philox(_stream(seed, epoch, purpose), sample_id).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=64)  # an epoch's samples ask for the same few
def _stream(seed: int, epoch: int, purpose: str) -> int:
    return int(key(seed, epoch, purpose))


@dataclass(frozen=True)
class TrainTransform:
    """Random-resized crop (Szegedy et al. 2015; "inception crop" in the paper, section 3), horizontal flip; where
    given, RandAugment and a permutation of the pixels (`pixel_order`). `scaled`: images may be decoded at a fraction
    of their size, where the crop need not grow for it; it is the same to half a pixel of these. `region`: what lies
    outside of the crop need not be decoded.

    `scale` is the cropped share of the area, `ratio` the aspect ratio's range; crop="resize" takes the whole image.
    """

    size: int
    seed: int
    crop: str = "inception"
    scale: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    randaugment: RandAugment | None = None
    order: np.ndarray | None = None
    scaled: bool = False
    region: bool = False

    def __call__(self, pixels: np.ndarray, epoch: int, sample_id: int) -> torch.Tensor:
        """Of a whole image."""
        u = self.draw(epoch, sample_id)
        return self.finish(self.choose(u, *pixels.shape[:2]).cut(pixels), u, epoch, sample_id)

    def draw(self, epoch: int, sample_id: int) -> np.ndarray:
        """The random numbers of `choose` and `finish`."""
        return uniforms("augment", self.seed, epoch, sample_id, _CROP_DRAWS + 1)

    def choose(self, u: np.ndarray, height: int, width: int) -> Crop:
        """The part that is wanted of an image of this size."""
        whole = self.crop != "inception"
        box = (0, 0, height, width) if whole else self.crop_box(height, width, u)
        # Half of the image and less is decoded sooner alone than all of it at a fraction
        alone = self.region and 2 * box[2] * box[3] < height * width
        smaller = (f for f in (8, 4, 2) if min(box[2:]) >= f * self.size)
        return Crop(*box, next(smaller, 1) if self.scaled and not alone else 1, self.region and not whole, whole)

    def finish(
        self, pixels: np.ndarray, u: np.ndarray, epoch: int, sample_id: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of the pixels of the crop; written to `out` where given, which saves a copy."""
        image = interpolate(pixels, self.size, self.size)
        if u[_CROP_DRAWS] < self.hflip:
            image = image.flip(-1)
        if self.randaugment:
            # A stream of its own: crop and flip are the same with and without
            draws = uniforms("randaug", self.seed, epoch, sample_id, self.randaugment.draws)
            image = self.randaugment(image.contiguous(), draws)
        image = reorder(image, self.order)
        return image.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(image)

    def crop_box(self, height: int, width: int, u: np.ndarray) -> tuple[int, int, int, int]:
        """(top, left, height, width): ten tries, then the largest centred box of an allowed aspect ratio."""
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area_u, ratio_u, top_u, left_u in u[:_CROP_DRAWS].reshape(_CROP_TRIES, 4).tolist():
            area = height * width * (self.scale[0] + area_u * (self.scale[1] - self.scale[0]))
            ratio = math.exp(log_ratio[0] + ratio_u * (log_ratio[1] - log_ratio[0]))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


@dataclass(frozen=True)
class EvalTransform:
    """Resize to size / crop_fraction, then cut the centre.

    shape="short" resizes the shorter side and keeps the aspect ratio ("resmall-crop" in the paper), "square" makes both
    sides that long ("resize-crop", table 2). method="bilinear" is antialiased; "area" averages over the area that a
    pixel covers, as big_vision evaluates.
    """

    size: int
    crop_fraction: float = 0.875
    shape: str = "short"
    method: str = "bilinear"
    order: np.ndarray | None = None

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        height, width = pixels.shape[:2]
        short = round(self.size / self.crop_fraction)
        if self.shape == "square":
            new = short, short
        elif height < width:
            new = short, max(round(short * width / height), self.size)
        else:
            new = max(round(short * height / width), self.size), short
        image = (resize_area if self.method == "area" else resize)(pixels, *new)
        top, left = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        return reorder(image[:, top : top + self.size, left : left + self.size].contiguous(), self.order)


def reorder(image: torch.Tensor, order: np.ndarray | None) -> torch.Tensor:
    """uint8 [C, H, W] with its pixels (row by row) taken from the places in `order`, int64 [H * W]."""
    if order is None:
        return image
    return torch.from_numpy(np.take(image.flatten(1).numpy(), order, axis=1)).view(image.shape)


def resize(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Antialiased bilinear resize, uint8 [H, W, C] -> uint8 [C, height, width]."""
    return interpolate(pixels, height, width).contiguous()


def interpolate(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """`resize` whose result may lie in memory in another order, or be `pixels` themselves."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


def resize_area(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Mean over the area that each new pixel covers, rounded down as big_vision's cast does; otherwise as `resize`."""
    image = _mean_over_rows(pixels.astype(np.float64), height)
    image = _mean_over_rows(image.swapaxes(0, 1), width).swapaxes(0, 1)
    levels = np.floor(image + 1e-6).astype(np.uint8)  # a mean of equal levels must not fall below them
    return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1)))


def _mean_over_rows(pixels: np.ndarray, rows: int) -> np.ndarray:
    """float64 [H, ...] -> [rows, ...]: row i is the mean over [i, i + 1) * H / rows, ends counted by their share."""
    scale = pixels.shape[0] / rows
    first, last = np.arange(rows) * scale, np.arange(1, rows + 1) * scale
    total = np.zeros((rows, *pixels.shape[1:]))
    for tap in range(math.ceil(scale) + 1):
        row = np.floor(first) + tap
        share = np.clip(np.minimum(last, row + 1) - np.maximum(first, row), 0, None) / scale
        share = share.reshape(-1, *(1,) * (pixels.ndim - 1))
        total += share * pixels[np.minimum(row, pixels.shape[0] - 1).astype(np.int64)]
    return total


def keep_mask(drop_rates: np.ndarray, seed: int, epoch: int, sample_id: int) -> torch.Tensor:
    """Stochastic-depth keep-mask of one sample, float32 [2L] of zeros and ones (see `MlpMixer.drop_rates`)."""
    keep = uniforms("depth", seed, epoch, sample_id, len(drop_rates)) >= drop_rates
    return torch.from_numpy(keep.astype(np.float32))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, C, H, W] -> float32 in [-1, 1], on the images' device: the same bits on every one."""
    # By a tensor: CUDA multiplies by the rounded reciprocal of a Python number
    return images.to(torch.float32).div_(torch.full((), 127.5, device=images.device)).sub_(1.0)
