"""MixUp (Zhang et al. 2018) that does not depend on ranks, micro-batches or workers.

The slots of a global batch form groups of g (g divides B). The partner of a slot is the next one of its group, the
last one's the first, and a group shares one weight a = max(a', 1 - a'), a' ~ Beta(p, p), keyed by (seed, epoch,
position of the group): big_vision's semantics, whose groups are a device's images. `MixUp` says who is mixed with
whom; the mixing itself happens on the accelerator, on normalised images in fp32 and on the classes' shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.data.augment import uniforms


@dataclass(frozen=True)
class MixUp:
    """`alpha` is the paper's p, `group` is g."""

    alpha: float
    group: int
    seed: int

    def partners(self, slots: np.ndarray) -> np.ndarray:
        """The slot of the global batch that each slot is mixed with."""
        first = slots // self.group * self.group
        return first + (slots - first + 1) % self.group

    def weights(self, epoch: int, position: int, slots: np.ndarray) -> np.ndarray:
        """a of each slot, float32 in [0.5, 1]; `position` is that of the step's slot 0."""
        groups, which = np.unique(slots // self.group, return_inverse=True)
        values = [
            larger_beta(self.alpha, *uniforms("mixup", self.seed, epoch, position + g * self.group, 2))
            for g in groups.tolist()
        ]
        return np.array(values, dtype=np.float32)[which]


def larger_beta(alpha: float, u: float, v: float) -> float:
    """max(a, 1 - a) with a ~ Beta(alpha, alpha), from two uniforms in [0, 1), for any alpha > 0.

    T = sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v) has Student's distribution with 2 alpha degrees of freedom
    (Bailey 1994), and (1 + T / sqrt(2 alpha + T^2)) / 2 is Beta(alpha, alpha). No rejection: two draws, always.
    """
    tail = math.expm1(min(-math.log1p(-u) / alpha, 700.0))  # beyond, float64 overflows and a is 1 anyway
    squared = tail * math.cos(2 * math.pi * v) ** 2
    return 0.5 + 0.5 * math.sqrt(squared / (1 + squared))


def mix_images(images: Tensor, partners: Tensor, weights: Tensor) -> Tensor:
    """Rows of fp32 `images` [n, C, H, W] mixed: row i of the m results is a_i images[i] + (1 - a_i) images[partner_i].

    Products and sum are rounded one by one, so that every device gives the same bits.
    """
    a = weights[:, None, None, None]
    return images[: len(weights)] * a + images[partners] * (1 - a)


def mix_targets(labels: Tensor, partners: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Shares of the classes, fp32 [m, K], from the class indices [n]; see `mix_images`."""

    def share(classes: Tensor, of: Tensor) -> Tensor:
        return of.new_zeros(len(of), num_classes).scatter_(1, classes[:, None], of[:, None])

    return share(labels[: len(weights)], weights) + share(labels[partners], 1 - weights)
