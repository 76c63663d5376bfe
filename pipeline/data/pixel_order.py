"""Pixel permutations of the paper's figure 4: one for all images of a run, in training and evaluation.

A Mixer does not care about the first kind (its weights can be permuted alike), and a convolutional network does.
"""

from __future__ import annotations

import numpy as np

from data_tools.errors import UserError
from pipeline.data.permutation import key, perm


def pixel_order(kind: str, size: int, patch_size: int, seed: int) -> np.ndarray | None:
    """int64 [size * size]: the place that each pixel of the permuted image comes from, row by row. None for "none".

    "patches": the patches change places, and the pixels inside of every patch do, all patches alike. "pixels": all
    pixels of the image change places.

    Raises:
        UserError: `patch_size` does not divide `size`.
    """
    if kind == "none":
        return None
    if kind == "pixels":
        return perm(np.arange(size * size), size * size, key(seed, "pixels"))
    if size % patch_size:
        raise UserError(
            f"augment.permute=patches: images of {size} px do not divide into patches of {patch_size}; "
            "choose another model.image_size"
        )
    side, area = size // patch_size, patch_size * patch_size
    patches = perm(np.arange(side * side), side * side, key(seed, "patches"))
    inside = perm(np.arange(area), area, key(seed, "inside"))
    source = np.arange(size * size).reshape(side, patch_size, side, patch_size).swapaxes(1, 2).reshape(-1, area)
    moved = source[patches][:, inside]
    return moved.reshape(side, side, patch_size, patch_size).swapaxes(1, 2).ravel()
