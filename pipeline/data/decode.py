"""Encoded bytes -> pixels. simplejpeg for JPEG, Pillow for every other format; numpy uint8 [H, W, channels] out.

Accepts what `data_tools.images.check_image` accepts when a corpus is sharded (a test holds the two together): the same
formats, told by content, and for JPEGs that simplejpeg does not read (CMYK, unusual subsampling) the same way out.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import simplejpeg

MAX_PIXELS = 200_000_000  # refused by the header before anything is decoded: a decompression bomb costs no memory
# Nothing in a data set may reach a decoder that runs other programs: Pillow's EPS plugin starts Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
Shrink = Callable[[int, int], int]  # (height, width) of the whole image -> 1, 2, 4 or 8: the divisor of its sides


def decode_image(data: bytes, channels: int = 3, shrink: Shrink | None = None) -> np.ndarray:
    """Pixels of one image, RGB (channels=3) or grey (channels=1), uint8 [H, W, channels].

    `shrink` may have a JPEG decoded at a half, a quarter or an eighth of its size, rounded up: the decoder then leaves
    out the high frequencies, which saves most of the time that large photographs take.

    Raises:
        ValueError: damaged, unknown or larger than MAX_PIXELS; the message says which.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if data[:2] == b"\xff\xd8" and (header := _jpeg_header(data)) is not None:
        width, height, space = header
        _check_size(width, height)
        if space != "CMYK":  # libjpeg-turbo has no conversion from CMYK to RGB; Pillow does
            factor = shrink(height, width) if shrink else 1
            smaller = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
            return simplejpeg.decode_jpeg(
                data, colorspace="RGB" if channels == 3 else "GRAY", strict=True, **(smaller if factor > 1 else {})
            )
    return _decode_pillow(data, channels)


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """(width, height, colour space), or None where simplejpeg cannot read the header: Pillow may."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except (ValueError, KeyError):  # KeyError: 4:4:1
        return None
    return int(width), int(height), str(space)


def _decode_pillow(data: bytes, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # asarray's is read-only
    except (MemoryError, ValueError):
        raise
    except Exception as e:  # Pillow's plugins raise anything: SyntaxError, struct.error, KeyError
        raise ValueError(str(e) or type(e).__name__) from e
    return pixels if channels == 3 else pixels[:, :, None]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS:,}")
