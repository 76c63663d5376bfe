"""Sizes that carry their unit: "400GiB", "1.5 TB". Imports the standard library and `data_tools.errors` only."""

from __future__ import annotations

import re

from data_tools.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes; "GB" is 10**9, "GiB" 2**30. Raises UserError; the caller adds the key the text came from."""
    match = _PATTERN.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise UserError(f"{text!r} is not a size; write for example 400GiB or 1.5TB")
    return int(float(match[1]) * (_BINARY if match[3] else _UNITS)[match[2].upper()])
