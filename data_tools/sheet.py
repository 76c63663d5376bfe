"""A contact sheet: random images of a data set with their labels, to look at before training on it."""

from __future__ import annotations

import io
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from data_tools.stats import SampleRef, load_pixels
from data_tools.stores import Store

if TYPE_CHECKING:
    from PIL import Image

COLUMNS, ROWS = 8, 6
_TILE, _TEXT, _GAP = 112, 14, 6  # pixels


def contact_sheet(store: Store, refs: list[SampleRef], classes: list[str] | None) -> bytes:
    """A PNG of up to COLUMNS x ROWS images; the same images give the same bytes."""
    from PIL import Image, ImageDraw, ImageFont

    shown = refs[: COLUMNS * ROWS]
    rows = max(1, -(-len(shown) // COLUMNS))
    step_x, step_y = _TILE + _GAP, _TILE + _TEXT + _GAP
    sheet = Image.new("RGB", (COLUMNS * step_x + _GAP, rows * step_y + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, ref in enumerate(shown):
        x, y = _GAP + number % COLUMNS * step_x, _GAP + number // COLUMNS * step_y
        pixels = load_pixels(store, ref)
        if pixels is None:
            draw.rectangle((x, y, x + _TILE, y + _TILE), outline="red")
        else:
            tile = _fit(Image.fromarray(np.ascontiguousarray(pixels)))
            sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        draw.text((x, y + _TILE + 1), _caption(ref.label, classes), fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _fit(image: Image.Image) -> Image.Image:
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, reducing_gap=2.0)


def _caption(label: int, classes: list[str] | None) -> str:
    if label < 0:
        return ""
    name = classes[label] if classes is not None and label < len(classes) else str(label)
    plain = unicodedata.normalize("NFKC", name)
    return "".join(c if c.isprintable() else "?" for c in plain)[:20]
