"""`data.train`: one data set, or a weighted list of them. `data.subset`: a share of each."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

EXAMPLE = "[{path: /shards/a, weight: 0.7}, {path: /shards/b, weight: 0.3}]"
_KEYS = ("path", "weight")


@dataclass(frozen=True)
class TrainSet:
    """A data set's folder, URL, or `synthetic`; its share of the samples is weight / (sum of all weights)."""

    path: str
    weight: float = 1.0


def train_sets(value: str | list[dict[str, Any]]) -> list[TrainSet]:
    """What a checked `data.train` names."""
    return [TrainSet(value)] if isinstance(value, str) else [TrainSet(**item) for item in value]


def train_problems(value: Any) -> Iterator[str]:
    """What is wrong with a `data.train`; nothing: `train_sets` takes it."""
    if isinstance(value, str):
        if not value:
            yield "data.train: must not be empty"
        return
    if not isinstance(value, list):
        expected = "a data set's folder or a list of {path, weight}"
        yield f"data.train: expected {expected}, not {value!r}; such as {EXAMPLE}"
        return
    if not value:
        yield f"data.train: the list is empty; write for example {EXAMPLE}"
    for number, item in enumerate(value):
        where = f"data.train[{number}]"
        if not isinstance(item, dict):
            yield f"{where}: expected {{path: FOLDER, weight: NUMBER}}, not {item!r}"
            continue
        for key in item:
            if key not in _KEYS:
                near = difflib.get_close_matches(str(key), _KEYS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                yield f"{where}.{key}: no such key{hint} (an item has path and weight)"
        path, weight = item.get("path"), item.get("weight")
        if not isinstance(path, str) or not path:
            yield f"{where}.path: " + ("has no value" if path is None else f"expected text, not {path!r}")
        if weight is None and len(value) > 1:
            yield f"{where}.weight: has no value; give every set its share, such as {EXAMPLE}"
        elif weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf
        ):
            yield f"{where}.weight: {weight!r} must be a number above 0"


def parse_share(text: str) -> Fraction:
    """ "10%" -> 1/10. Raises ValueError outside (0%, 100%]."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    share = Fraction(match[1]) / 100 if match else Fraction(0)
    if not 0 < share <= 1:
        raise ValueError(text)
    return share


def subset_problems(text: str | None) -> Iterator[str]:
    if text is not None:
        try:
            parse_share(text)
        except ValueError:
            yield f"data.subset: {text!r} is not a share of the data; write for example 10%, or null for all of it"
