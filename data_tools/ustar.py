"""Deterministic USTAR writing: headers by hand, the same bytes for the same name and size, everywhere.

Owner, group and time are zero, so a tar depends on nothing but its members. Names are limited to the 100
bytes of the plain name field (no prefix field, no PAX or GNU extensions): `plan.member_key` only makes such
names, and every tar reader of the last thirty years understands them. Imports the standard library only.
"""

from __future__ import annotations

from functools import lru_cache

BLOCK = 512
END = bytes(2 * BLOCK)  # two empty blocks close an archive
MAX_NAME = 100  # bytes
MAX_SIZE = 8**11 - 1  # bytes: eleven octal digits

_MODE_OWNER_GROUP = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
# After the checksum: type '0' (regular file), link name, magic, version, user, group, device numbers, prefix.
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(32) + bytes(32) + b"0000000\0" * 2 + bytes(155) + bytes(12)
# The checksum counts itself as eight spaces.
_CONSTANT_SUM = sum(_MODE_OWNER_GROUP) + sum(_MTIME) + sum(b" " * 8) + sum(_TAIL)
_PADDING = [bytes(-n % BLOCK) for n in range(BLOCK)]
_FILL = [bytes(MAX_NAME - n) for n in range(MAX_NAME + 1)]


def header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file of `size` bytes.

    Raises ValueError where the name is empty, not ASCII or longer than 100 bytes, or where size does not fit.
    """
    raw = name.encode("ascii")
    length = len(raw)
    if not 0 < length <= MAX_NAME:
        raise ValueError(f"tar member name of {length} bytes: {name!r}")
    middle, middle_sum = _middle(size)
    return b"".join((raw, _FILL[length], middle, _checksum_and_tail(middle_sum + sum(raw))))


# Sizes and sums repeat: looking them up halves the time of a header.
@lru_cache(1 << 14)
def _middle(size: int) -> tuple[bytes, int]:
    """(the fields from mode to change time, the sum of all bytes but the name's)."""
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"tar member of {size} bytes")
    digits = b"%011o\0" % size
    return _MODE_OWNER_GROUP + digits + _MTIME, _CONSTANT_SUM + sum(digits)


@lru_cache(1 << 14)
def _checksum_and_tail(checksum: int) -> bytes:
    return b"%06o\0 " % checksum + _TAIL


def padding(size: int) -> bytes:
    """The zero bytes that fill a member of `size` bytes up to a block."""
    return _PADDING[size % BLOCK]


def member_bytes(size: int) -> int:
    """What a member of `size` bytes takes in the tar: header, data, padding."""
    return BLOCK + size + -size % BLOCK
