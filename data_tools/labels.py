"""Class names and their numbers: given by `--classes`, brought by the source, or made from the labels. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data_tools.errors import UserError
from data_tools.manifest import MAX_LABEL
from data_tools.sources.rows import Source

_INDEX = re.compile(r"0|-?[1-9][0-9]*")


def read_classes(file: Path) -> list[str]:
    """One class name a line; line n is class n, from 0. Raises UserError for empty or repeated lines."""
    try:
        names = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--classes {file}: {e}") from e
    first: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name.strip():
            raise UserError(f"--classes {file}, line {line}: empty; give one class name a line")
        if first.setdefault(name, line) != line:
            raise UserError(f"--classes {file}, line {line}: {name!r} is already on line {first[name]}")
    if not names:
        raise UserError(f"--classes {file} is empty")
    return names


def number_labels(
    labels: Sequence[str], sources: Sequence[Source], given: list[str] | None
) -> tuple[dict[str, int], list[str] | None]:
    """(class index by label text, class names or None where labels are only numbers).

    `given` (or the names the sources bring) decide names and order: a label is one of the names, or an index into
    them. Without them, labels that are all plain integers are class indices, unless a source's labels are names
    whatever they look like (folders); other labels are numbered in sorted order.

    Raises UserError for a label that is not in the list, or is no class index; where sources bring different names.
    """
    names = given if given is not None else _brought(sources)
    plain = all(_INDEX.fullmatch(t) for t in labels) and not any(s.names for s in sources)
    if names is not None:
        return _by_names(labels, names, plain, "--classes" if given is not None else "the source's class names"), names
    if not labels:
        return {}, None
    if plain:
        for text in labels:
            if not 0 <= int(text) <= MAX_LABEL:
                raise UserError(
                    f"label {text} is outside 0..{MAX_LABEL}: plain numbers are class indices; where they are names "
                    "or ids, list them with --classes FILE"
                )
        return {t: int(t) for t in labels}, None
    ordered = sorted(labels)
    return {t: i for i, t in enumerate(ordered)}, ordered


def _brought(sources: Sequence[Source]) -> list[str] | None:
    found = [s for s in sources if s.classes is not None]
    if not found:
        return None
    for other in found[1:]:
        if other.classes != found[0].classes:
            raise UserError(
                f"{found[0].root} and {other.root} bring different class names; say which hold, with --classes FILE"
            )
    return found[0].classes


def _by_names(labels: Sequence[str], names: list[str], plain: bool, what: str) -> dict[str, int]:
    number = {name: i for i, name in enumerate(names)}
    missing = [t for t in labels if t not in number]
    if missing and plain and all(0 <= int(t) < len(names) for t in labels):
        return {t: int(t) for t in labels}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"label {missing[0]!r}{more} is not in {what} ({len(names)} names); add it, or leave it out")
    return {t: number[t] for t in labels}
