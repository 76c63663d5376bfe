"""Tar keys: a name for every sample that any tar reader and webdataset take as it is. Pure."""

from __future__ import annotations

import re

import xxhash

from data_tools.sources.rows import IMAGE_SUFFIXES

MAX_KEY = 90  # characters: leaves room for a suffix within ustar.MAX_NAME


def raw_path(path: str) -> bytes:
    """The bytes of a path; file names need not be valid UTF-8."""
    return path.encode("utf-8", "surrogateescape")


_UNSAFE = re.compile(r"[^A-Za-z0-9_/-]")
_SUFFIXES = "|".join(sorted(s[1:] for s in IMAGE_SUFFIXES))
# Names that are keys as they are, without their suffix: nearly all of a usual corpus.
_PLAIN_TEXT = re.compile(
    rf"([A-Za-z0-9_-](?:[A-Za-z0-9_/-]{{0,{MAX_KEY - 2}}}[A-Za-z0-9_-])?)\.(?i:{_SUFFIXES})", re.ASCII
)
_PLAIN = re.compile(_PLAIN_TEXT.pattern.encode())
_OTHER_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")


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
    clean = _UNSAFE.sub("_", _OTHER_URL.sub("", stem)).strip("/")
    if clean != stem or not clean or len(clean) > MAX_KEY:
        suffix = f"-{xxhash.xxh3_64_hexdigest(raw_path(path))}"
    return clean[-(MAX_KEY - len(suffix)) :].lstrip("/") + suffix  # the end of a long path tells more


def sample_key(path: bytes, twin: bool = False) -> str:
    """The key of a sample; of a `twin` (another sample would get the same key) with a hash of its whole path."""
    if not twin and (plain := _PLAIN.fullmatch(path)) is not None:
        return plain[1].decode()
    text = path.decode("utf-8", "surrogateescape")
    return member_key(text, f"-{xxhash.xxh3_64_hexdigest(path)}" if twin else "")


def sample_keys(paths: list[str], twins: list[bool]) -> list[str]:
    """`sample_key` of each path, given as text."""
    plain = _PLAIN_TEXT.fullmatch
    return [
        m[1] if not twin and (m := plain(path)) is not None else sample_key(raw_path(path), twin)
        for path, twin in zip(paths, twins)
    ]


def key_hashes(paths: list[bytes]) -> list[int]:
    """The 64-bit hash of every sample's key, as the index stores it."""
    plain, digest = _PLAIN.fullmatch, xxhash.xxh3_64_intdigest
    return [digest(m[1]) if (m := plain(p)) is not None else digest(sample_key(p).encode()) for p in paths]
