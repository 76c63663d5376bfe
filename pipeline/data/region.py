"""Decoding a part of a JPEG: libjpeg-turbo skips what lies outside, through NVIDIA's nvImageCodec, on the CPU.

The pixels are those of the whole image, bit for bit. A third of a random crop's decoding goes, more the smaller the
crop and the larger the photograph. Damage is seen less often, outside of the part never: bytes are still held against
the index' crc32, and sharding has decoded every image once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from data_tools.errors import UserError

_NARROW = 16  # pixels: one column alone comes out otherwise than within a whole image, by its chroma
_decoder: Any = None
_image: Any = None  # its memory is used again
_owner = -1  # process: the decoder has a thread, which no fork takes along


def require_region_decoder() -> None:
    """Raises UserError where the package is not installed."""
    try:
        _library()
    except ImportError as e:
        raise UserError(
            f"data.region_decode needs nvImageCodec ({e}); pip install 'mixer-pretraining[region]', or set it to false"
        ) from e


def decode_region(data: bytes, channels: int, top: int, left: int, height: int, width: int) -> np.ndarray | None:
    """uint8 [height, width, channels], valid until the next call; None: not by this decoder, decode the whole image."""
    global _decoder, _image, _owner
    if width < _NARROW:
        return None
    library = _library()
    if _owner != os.getpid():
        with _silence():
            _decoder = library.Decoder(
                device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[library.Backend(library.CPU_ONLY)],
            )
        _image, _owner = None, os.getpid()
    kind = library.SampleFormat.I_RGB if channels == 3 else library.SampleFormat.I_Y
    color = library.ColorSpec.SRGB if channels == 3 else library.ColorSpec.GRAY
    params = library.DecodeParams(apply_exif_orientation=False, color_spec=color, sample_format=kind)
    part = library.CodeStream(data).get_sub_code_stream(region=library.Region(top, left, top + height, left + width))
    found = _decoder.decode(part, image=_image, params=params)
    if found is None:
        return None
    _image = found
    pixels = np.asarray(found)
    return pixels if pixels.shape == (height, width, channels) else None


def _library() -> Any:
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    from nvidia import nvimgcodec

    return nvimgcodec


@contextmanager
def _silence() -> Iterator[None]:
    """Without stderr: the library laments, by file descriptor 2, that decoders are missing which nobody asked for."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
