"""Width and height of many JPEGs at once: asking a decoder for each costs more than copying a small image does.

Walks the marker segments of all images in step, from their start to the scan, and answers only where everything is
as usual: whoever is left out here is looked at by the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SEGMENTS = 24  # most segments before the scan
_FEWEST, _LARGE = 16, 8192  # for fewer images, or of more bytes on average, the decoder is quicker
_MARGIN = 16  # bytes: the furthest look from where a marker is

_STOP, _PASS, _FRAME, _SCAN = range(4)
_KIND = np.full(1 << 16, _STOP, np.uint8)  # what a marker is
_KIND[[0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)]] = _PASS  # tables, comments, applications' own
_KIND[[0xFFC0, 0xFFC1, 0xFFC2]] = _FRAME  # baseline, extended, progressive
_KIND[0xFFDA] = _SCAN


def jpeg_sizes(images: Sequence[bytes]) -> list[tuple[int, int]]:
    """(width, height) in pixels of each image; (0, 0) where the decoder must be asked."""
    lengths = [len(data) for data in images]
    count, nowhere = len(images), sum(lengths)
    if count < _FEWEST or nowhere > _LARGE * count:
        return [(0, 0)] * count
    joined = b"".join([*images, bytes(_MARGIN)])  # at `nowhere` there is no marker
    # Four bytes (a marker, the length of its segment), big-endian, at every position
    quads = np.ndarray(len(joined) - 3, ">u4", joined, strides=(1,))
    ends = np.cumsum(lengths)
    begins = np.append(0, ends[:-1])
    last = ends - _MARGIN
    at = np.where((quads[begins] >> 16 == 0xFFD8) & (begins < last), begins + 2, nowhere)
    frame, frames = np.full(count, nowhere), np.zeros(count, np.int64)
    kind = np.zeros(count, np.uint8)
    for _ in range(_SEGMENTS):
        quad = quads[at].astype(np.int64)
        kind = _KIND[quad >> 16]
        if (is_frame := kind == _FRAME).any():
            frame[is_frame] = at[is_frame]
            frames += is_frame
        moves = (kind == _PASS) | is_frame
        if not moves.any():
            break
        at = at + moves * ((quad & 0xFFFF) + 2)
        at[at > last] = nowhere
    # Behind the marker: length, bits, height, width, components
    length, bits = quads[frame] & 0xFFFF, quads[frame + 4] >> 24
    height, width, components = quads[frame + 5] >> 16, quads[frame + 5] & 0xFFFF, quads[frame + 9] >> 24
    usual = (bits == 8) & ((components == 1) | (components == 3)) & (length == 8 + 3 * components)
    known = (kind == _SCAN) & (frames == 1) & usual & (width > 0) & (height > 0)
    return list(zip((width * known).tolist(), (height * known).tolist()))
