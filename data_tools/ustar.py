"""Deterministic USTAR writing: headers by hand, the same bytes for the same name and size, everywhere.

Owner, group and time are zero, so a tar depends on nothing but its members. Names are limited to the 100
bytes of the plain name field (no prefix field, no PAX or GNU extensions): `keys.member_key` only makes such
names, and every tar reader of the last thirty years understands them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 512
END = bytes(2 * BLOCK)  # two empty blocks close an archive
MAX_NAME = 100  # bytes
MAX_SIZE = 8**11 - 1  # bytes: eleven octal digits

_SIZE, _CHECKSUM = 124, 148  # where these fields begin
# Name; mode, user, group; size; change time; checksum, which counts itself as eight spaces; type '0' (regular file),
# link name, magic, version, user, group, device numbers, prefix.
_TEMPLATE = np.frombuffer(
    bytes(MAX_NAME) + b"0000644\0" + b"0000000\0" * 2 + b"00000000000\0" * 2 + b" " * 8
    + b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(155) + bytes(12),
    np.uint8,
)  # fmt: skip
_CONSTANT_SUM = int(_TEMPLATE.sum())
_PADDING = [bytes(-n % BLOCK) for n in range(BLOCK)]


def headers(names: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    """The headers of regular files of these sizes in bytes, uint8 [n, 512].

    Raises ValueError where a name is empty, not ASCII or longer than 100 bytes, or where a size does not fit.
    """
    lengths = [len(name) for name in names]
    if not (min(lengths) > 0 and max(lengths) <= MAX_NAME and min(sizes) >= 0 and max(sizes) <= MAX_SIZE):
        raise ValueError(f"a name or a size does not fit into a tar header: {list(zip(names, sizes))}")
    raw = np.array(names, f"S{MAX_NAME}").view(np.uint8)  # UnicodeEncodeError, a ValueError: not ASCII
    digits = _octal(np.array(sizes, np.int64), 11)
    letters = np.add.reduceat(raw, np.arange(0, len(raw), MAX_NAME), dtype=np.int64)
    blocks = np.empty((len(names), BLOCK), np.uint8)
    blocks[:] = _TEMPLATE
    blocks[:, :MAX_NAME] = raw.reshape(-1, MAX_NAME)
    blocks[:, _SIZE : _SIZE + 11] += digits
    blocks[:, _CHECKSUM : _CHECKSUM + 6] = _octal(_CONSTANT_SUM + letters + digits.sum(1, np.int64), 6) + ord("0")
    blocks[:, _CHECKSUM + 6] = 0
    return blocks


def _octal(values: np.ndarray, digits: int) -> np.ndarray:
    """The octal digits of each value, uint8 [n, digits]."""
    shifts = np.arange(3 * (digits - 1), -1, -3)
    return (values[:, None] >> shifts & 7).astype(np.uint8)


def header(name: str, size: int) -> bytes:
    """One of `headers`."""
    return headers([name], [size]).tobytes()


def padding(size: int) -> bytes:
    """The zero bytes that fill a member of `size` bytes up to a block."""
    return _PADDING[size % BLOCK]


def member_bytes(size: int) -> int:
    """What a member of `size` bytes takes in the tar: header, data, padding."""
    return BLOCK + size + -size % BLOCK
