"""Encoded bytes -> pixels. simplejpeg for JPEG, Pillow for every other format; numpy uint8 [H, W, channels] out.

Accepts what `data_tools.images.check_image` accepts when a corpus is sharded (a test holds the two together): the same
formats, told by content, and for JPEGs that simplejpeg does not read (CMYK, unusual subsampling) the same way out.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg

from pipeline.data.region import decode_region

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 200_000_000  # refused by the header before anything is decoded: a decompression bomb costs no memory
# Nothing in a data set may reach a decoder that runs other programs: Pillow's EPS plugin starts Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
_KEPT_BYTES = 64 << 20  # largest buffer that a thread keeps between images
_mine = threading.local()


class Crop(NamedTuple):
    """The part of an image that is wanted, in pixels of the whole one.

    factor: 1, 2, 4 or 8; a JPEG may be decoded at that fraction of its size, rounded up: the decoder then leaves out
    the high frequencies. region: the rest of a JPEG need not be decoded at all (see `region`). whole: all of it.
    """

    top: int
    left: int
    height: int
    width: int
    factor: int = 1
    region: bool = False
    whole: bool = False

    def cut(self, pixels: np.ndarray, factor: int = 1) -> np.ndarray:
        """This part of the image, whose `pixels` are those of 1/`factor` of its size."""
        if self.whole:
            return pixels
        first = round(self.top / factor), round(self.left / factor)
        last = round((self.top + self.height) / factor), round((self.left + self.width) / factor)
        return pixels[first[0] : last[0], first[1] : last[1]]


Choose = Callable[[int, int], Crop]  # from (height, width) of the whole image


def decode_image(data: bytes, channels: int = 3, choose: Choose | None = None) -> np.ndarray:
    """Pixels of one image, RGB (channels=3) or grey (channels=1), uint8 [H, W, channels].

    With `choose` only of the crop that it asks for, and only until this thread decodes its next image: they lie in a
    buffer that is used again, since fresh memory costs a tenth of the decoding.

    Raises:
        ValueError: damaged, unknown or larger than MAX_PIXELS; the message says which.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if data[:2] == b"\xff\xd8" and (header := _jpeg_header(data)) is not None:
        width, height, space = header
        _check_size(width, height)
        if space != "CMYK":  # libjpeg-turbo has no conversion from CMYK to RGB; Pillow does
            colors = "RGB" if channels == 3 else "GRAY"
            if choose is None:
                return simplejpeg.decode_jpeg(data, colorspace=colors, strict=True)
            crop = choose(height, width)
            factor = crop.factor
            if crop.region and factor == 1:
                pixels = decode_region(data, channels, *crop[:4])
                if pixels is not None:
                    return pixels
            h, w = -(-height // factor), -(-width // factor)
            pixels = simplejpeg.decode_jpeg(
                data, colors, min_height=h, min_width=w, min_factor=factor, buffer=_buffer(h * w * channels)
            )
            return crop.cut(pixels, factor)
    pixels = _decode_pillow(data, channels)
    return pixels if choose is None else choose(*pixels.shape[:2]).cut(pixels)


def _buffer(size: int) -> np.ndarray:
    """At least `size` bytes, this thread's."""
    kept = getattr(_mine, "buffer", None)
    if kept is None or len(kept) < size:
        kept = np.empty(size, np.uint8)
        if size <= _KEPT_BYTES:
            _mine.buffer = kept
    return kept


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
            pixels = np.array(_eight_bits(image).convert("RGB" if channels == 3 else "L"))  # asarray's is read-only
    except (MemoryError, ValueError):
        raise
    except Exception as e:  # Pillow's plugins raise anything: SyntaxError, struct.error, KeyError
        raise ValueError(str(e) or type(e).__name__) from e
    return pixels if channels == 3 else pixels[:, :, None]


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled over the full range, as `mixer shard` converts it; Pillow would clip it at 255: all white."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels: their range is unknown")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    scale = 257 if image.mode != "I" or pixels.max(initial=0) > 255 else 1
    return Image.fromarray(np.clip(pixels // scale, 0, 255).astype(np.uint8))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS:,}")
