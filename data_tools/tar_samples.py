"""The samples of a tar as webdataset sees them: consecutive members with one key. Reads headers only.

A key is a member's name up to the first dot of its base name; the rest, in lower case, tells the members of a sample
apart. Takes any tar that Python's `tarfile` reads (PAX, GNU long names); nothing is extracted to disk.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UserError
from data_tools.manifest import MAX_LABEL
from data_tools.tar_reading import StrictInfo
from data_tools.ustar import BLOCK

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's own rule


class Part(NamedTuple):
    """One member's data in the tar."""

    offset: int
    size: int


@dataclass
class TarSample:
    """`parts` by suffix in tar order; [`start`, `end`) are the bytes of all its headers and data."""

    key: str
    start: int
    end: int = 0
    parts: dict[str, Part] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)  # suffixes that came twice

    @property
    def image(self) -> str | None:
        """The suffix of the first image (`jpg`, or `thumb.png`)."""
        return next((s for s in self.parts if s.rpartition(".")[2] in IMAGE_MEMBERS), None)


def walk_tar(path: Path) -> Iterator[TarSample]:
    """The samples of the tar at `path`, in order; members without a key (folders, links, `.name`) are passed over.

    Raises UserError for what is no plain tar, or where it ends in the middle or has a damaged header.
    """
    sample: TarSample | None = None
    try:
        with tarfile.open(path, "r:", tarinfo=StrictInfo) as archive:
            for member in archive:
                match = _NAME.match(member.name)
                if match is None or not member.isreg() or member.issparse():
                    continue
                key, suffix = match[1], match[2].lower()
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key, member.offset)
                if suffix in sample.parts:
                    sample.repeated.append(suffix)
                sample.parts.setdefault(suffix, Part(member.offset_data, member.size))
                sample.end = member.offset_data + member.size + -member.size % BLOCK
                archive.members = []  # type: ignore[assignment]  # tarfile keeps every header otherwise
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"{path} cannot be read to its end as a plain tar: {e}") from e
    if sample is not None:
        yield sample


# --- labels -------------------------------------------------------------------------------------------------


class BadLabel(Exception):
    """The label is there but cannot be understood; the message says why."""


def read_label(
    sample: TarSample, read: Callable[[Part], bytes], rule: str, classes: dict[str, int] | None = None
) -> int:
    """The class index of a sample, -1 where it has none or several.

    `rule`: `cls` (member `.cls`), `json:FIELD` (that field of member `.json`), `none`. A text that is no number is
    looked up in `classes`. Raises BadLabel.
    """
    if rule == "none":
        return -1
    if rule == "cls":
        part = sample.parts.get("cls")
        if part is None:
            return -1
        text = read(part).decode("utf-8", "replace").strip()
    else:
        part = sample.parts.get("json")
        if part is None:
            return -1
        try:
            value = json.loads(read(part)).get(rule.partition(":")[2])
        except (ValueError, AttributeError, RecursionError) as e:
            raise BadLabel(f"member .json is not a JSON object: {e}") from e
        if value is None or isinstance(value, list):
            return -1
        text = str(value)
    if classes is not None and text in classes:
        return classes[text]
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > MAX_LABEL:
        raise BadLabel(f"label {text[:50]!r} is neither a class index (0..{MAX_LABEL}) nor in the list of classes")
    return int(text)
