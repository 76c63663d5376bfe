"""Sizes, counts and fractions as people write and read them on the command line."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "256MB" (10^6), "1GiB" (2^30), "500000". Raises typer.BadParameter for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; try 256MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_bad(text: str) -> int | float:
    """A count ("10") or a fraction ("0.1%", "0.001"). Raises typer.BadParameter for anything else."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a count (10) nor a fraction (0.1%)") from None


def format_bytes(n: float) -> str:
    """Decimal units, three digits: "1.29 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"


def format_shards(n: int) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{n:,} shard" + "s" * (n != 1)


def format_seconds(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def parse_fraction(text: str) -> float:
    """A fraction: "10%" or "0.1". Raises typer.BadParameter for anything else."""
    value = parse_bad(text)
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is not a fraction; try 10% or 0.1")
    return float(value)
