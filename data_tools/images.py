"""Is this an image that training can decode? Formats are told by content, never by file name.

Only the formats below are tried, so nothing in a corpus can reach a decoder that runs other programs
(Pillow's EPS plugin starts Ghostscript).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import simplejpeg

from data_tools.jpeg_headers import jpeg_sizes

_JPEG = b"\xff\xd8\xff"
_JPEG_FORMAT = ("jpg", "JPEG")
# (suffix of the tar member, Pillow's name, first bytes)
_MAGIC = [
    (*_JPEG_FORMAT, _JPEG),
    ("png", "PNG", b"\x89PNG\r\n\x1a\n"),
    ("gif", "GIF", b"GIF8"),
    ("bmp", "BMP", b"BM"),
    ("tif", "TIFF", b"II*\0"),
    ("tif", "TIFF", b"MM\0*"),
]


FLOATING = "floating-point pixels: their range is unknown"


class BadImage(Exception):
    """This file cannot be a training image; the message is the reason, fit for a quarantine list."""


class ImageInfo(NamedTuple):
    """`suffix` names the format for the tar member; width and height are pixels, as stored (EXIF not
    applied)."""

    suffix: str
    width: int
    height: int


def check_image(data: bytes, max_pixels: int, decode: bool = True) -> ImageInfo:
    """Reads the header and, with `decode`, decodes the whole image once.

    Raises BadImage where the bytes are no image, are damaged or cut short, or where the header promises more
    than `max_pixels` (checked before any pixel is decoded).
    """
    if not data:
        raise BadImage("empty file")
    suffix, pillow_format = _JPEG_FORMAT if data.startswith(_JPEG) else sniff_format(data)
    if pillow_format == "JPEG":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except (ValueError, KeyError):  # unusual subsampling (KeyError: 4:4:1), which Pillow may know, or damage
            pass
        else:
            size = int(width), int(height)
            _limit(*size, max_pixels)
            if decode:
                _decode_jpeg(data)
            return ImageInfo(suffix, *size)
    return ImageInfo(suffix, *_check_with_pillow(data, pillow_format, max_pixels, decode))


def check_images(
    images: list[bytes | BadImage], max_pixels: int, decode: bool = True
) -> Iterator[ImageInfo | BadImage]:
    """`check_image` of each, with the reason in place of an exception; what is bad already stays so.

    Without `decode` the header of a usual JPEG is only looked at as far as its size needs.
    """
    sizes = jpeg_sizes([b"" if isinstance(data, BadImage) else data for data in images])
    for data, (width, height) in zip(images, sizes):
        try:
            if isinstance(data, BadImage):
                yield data
            elif width:
                _limit(width, height, max_pixels)
                if decode:
                    _decode_jpeg(data)
                yield ImageInfo("jpg", width, height)
            else:
                yield check_image(data, max_pixels, decode)
        except BadImage as e:
            yield e


def sniff_format(data: bytes) -> tuple[str, str]:
    for suffix, name, magic in _MAGIC:
        if data.startswith(magic):
            return suffix, name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", "WEBP"
    raise BadImage("not an image (JPEG, PNG, WebP, GIF, BMP or TIFF) by its first bytes")


def _limit(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than the limit of {max_pixels}")


def _decode_jpeg(data: bytes) -> None:
    """Raises BadImage for damage of any kind.

    At 1/8 scale every coefficient is still read, so damage shows just as well (no difference in 600 images
    with flipped bits), in 0.7 of the time and 1/64 of the memory.
    """
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as e:
        raise BadImage(f"damaged JPEG: {e}") from e


def _check_with_pillow(data: bytes, name: str, max_pixels: int, decode: bool) -> tuple[int, int]:
    from PIL import Image

    with pillow_errors(name), Image.open(io.BytesIO(data), formats=(name,)) as image:
        width, height = image.size
        _limit(width, height, max_pixels)
        if image.mode == "F":
            raise BadImage(FLOATING)
        if decode:
            image.load()
    return width, height


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Whatever Pillow raises over a file becomes BadImage; `name` is the format."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of many pixels; the limit here is ours
            yield
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as e:  # Pillow's own limit, 179 million pixels
        raise BadImage(f"too many pixels: {e}") from e
    except Exception as e:  # Pillow's plugins raise anything: SyntaxError, struct.error, KeyError
        text = str(e).split("<_io.BytesIO")[0].strip() or type(e).__name__  # without the address
        raise BadImage(f"damaged {name}: {text}") from e
