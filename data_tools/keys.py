"""Tar keys: a name for every sample that any tar reader and webdataset take as it is. Pure."""

from __future__ import annotations

import re
from collections import Counter

import xxhash

from data_tools.errors import UserError
from data_tools.sources import IMAGE_SUFFIXES, Sample

MAX_KEY = 90  # characters: leaves room for a suffix within ustar.MAX_NAME


def raw_path(path: str) -> bytes:
    """The bytes of a path; file names need not be valid UTF-8."""
    return path.encode("utf-8", "surrogateescape")


_UNSAFE = re.compile(r"[^A-Za-z0-9_/-]")


def member_key(path: str, suffix: str = "") -> str:
    """The tar key of a sample: its path without suffix where that is plain, else a cleaned one plus a hash.

    A key holds letters, digits, `_`, `-` and `/` only: webdataset ends a key at the first dot of the base
    name, and no tar reader has to deal with spaces, newlines, `..` or encodings. A function of the path
    alone, so that keys stay when the corpus grows; `suffix` is appended by the caller to tell equal keys
    apart.
    """
    stem, dot, extension = path.rpartition(".")
    if not dot or "." + extension.lower() not in IMAGE_SUFFIXES:
        stem = path
    clean = _UNSAFE.sub("_", stem).strip("/")
    if clean != stem or not clean or len(clean) > MAX_KEY:
        suffix = f"-{xxhash.xxh3_64_hexdigest(raw_path(path))}"
    return clean[-(MAX_KEY - len(suffix)) :].lstrip("/") + suffix  # the end of a long path tells more


def member_keys(samples: list[Sample]) -> list[str]:
    """One key a sample, all different: `a.jpg` beside `a.png` both get a hash. Raises UserError if that
    fails."""
    keys = [member_key(s.path) for s in samples]
    shared = {key for key, n in Counter(keys).items() if n > 1}
    if shared:
        for i, sample in enumerate(samples):
            if keys[i] in shared:
                keys[i] = member_key(sample.path, f"-{xxhash.xxh3_64_hexdigest(raw_path(sample.path))}")
        if len(set(keys)) < len(keys):
            again = next(key for key, n in Counter(keys).items() if n > 1)
            raise UserError(f"two images would get the same key {again!r}; rename one of them")
    return keys
