"""What a comparison leaves in its folder: OUT/NAME.md (the table), OUT/NAME.json (its facts), OUT/NAME.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.run import replace_file

MISSING = "-"  # a cell without a value

# Settings of `model.*` that change a model's shape, with the paper's letters
LETTERS = {"patch_size": "P", "hidden_dim": "C", "num_blocks": "L", "tokens_mlp_dim": "D_S", "channels_mlp_dim": "D_C"}


def shape_label(overrides: Mapping[str, Any]) -> str:
    """What is not the named model's own: "C=64 L=2"; empty where nothing is."""
    return " ".join(f"{letter}={overrides[key]}" for key, letter in LETTERS.items() if overrides.get(key) is not None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, the first column to the left, others to the right; padded, for those who read it as text."""
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(header, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])


def save(out: Path, name: str, text: str, facts: Any) -> None:
    """Writes OUT/NAME.md and OUT/NAME.json, each in one piece; makes the folder."""
    replace_file(out / f"{name}.md", text.rstrip("\n") + "\n")
    replace_file(out / f"{name}.json", json.dumps(facts, indent=1) + "\n")
