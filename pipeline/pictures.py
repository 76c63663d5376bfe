"""Pictures drawn with numpy and Pillow alone: of evaluations, of batches and of weights, for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_NAMED = 40  # up to so many classes have their names written beside the picture
_SIDE = 900  # pixels, about


def confusion_picture(counts: np.ndarray, names: list[str]) -> Image:
    """Rows: true classes, columns: predicted ones, each row as shares of its samples; dark is many. counts [K, K]."""
    from PIL import Image, ImageDraw

    k = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    dark = np.sqrt(share)[..., None]  # the square root shows rare confusions
    colour = 255 - dark * (255 - np.array([16, 48, 107]))
    cell = max(1, _SIDE // k)
    grid = np.repeat(np.repeat(colour.astype(np.uint8), cell, 0), cell, 1)
    if k > _NAMED:
        return Image.fromarray(grid)
    short = [n if len(n) <= 18 else n[:17] + "…" for n in (names[i] if i < len(names) else str(i) for i in range(k))]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 12 + int(max(probe.textlength(n) for n in short))
    picture = Image.new("RGB", (margin + cell * k, margin + cell * k), "white")
    picture.paste(Image.fromarray(grid), (margin, margin))
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(short):
        middle = margin + cell * i + cell // 2
        draw.text((margin - 6, middle), name, fill="black", anchor="rm")
        label = Image.new("RGB", (margin, 14), "white")
        ImageDraw.Draw(label).text((6, 7), name, fill="black", anchor="lm")
        picture.paste(label.rotate(90, expand=True), (middle - 7, 0))
        for j in range(k):
            if cell >= 28 and counts[i, j]:
                ink = "white" if share[i, j] > 0.4 else "black"
                centre = margin + cell * j + cell // 2, middle
                draw.text(centre, f"{int(counts[i, j])}", fill=ink, anchor="mm")
    return picture


def tile_grid(tiles: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """uint8 [N, h, w, 1 or 3] -> one picture [., ., 3]: rows of `columns` tiles, `pad` white pixels around each."""
    n, height, width, _ = tiles.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = tile
    return grid
