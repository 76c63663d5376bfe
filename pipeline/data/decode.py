"""Encoded bytes -> pixels. simplejpeg for JPEG, Pillow for every other format; numpy uint8 [H, W, channels] out."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg

MAX_PIXELS = 200_000_000  # refused by the header before anything is decoded: a decompression bomb costs no memory


def decode_image(data: bytes, channels: int = 3) -> np.ndarray:
    """Pixels of one image, RGB (channels=3) or grey (channels=1), uint8 [H, W, channels].

    Raises:
        ValueError: damaged, unknown or larger than MAX_PIXELS; the message says which.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if data[:2] == b"\xff\xd8":
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        _check_size(int(width), int(height))
        if space != "CMYK":  # libjpeg-turbo has no conversion from CMYK to RGB; Pillow does
            return simplejpeg.decode_jpeg(data, colorspace="RGB" if channels == 3 else "GRAY", strict=True)
    return _decode_pillow(data, channels)


def _decode_pillow(data: bytes, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size)
            pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # asarray's is read-only
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(str(e)) from e
    return pixels if channels == 3 else pixels[:, :, None]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS:,}")
