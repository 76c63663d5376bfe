"""Durations that carry their unit: "10000 steps", "0.5 epochs", "1200000 samples", "15 min".

One number, one unit. Numbers are kept as decimals, so that "0.1 epochs" is exactly a tenth.
Imports the standard library and `data_tools.errors` only.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from data_tools.errors import UserError

# Every accepted spelling -> the canonical unit. No "m": minutes, months and millions all claim it.
_SPELLINGS = {
    "step": "steps", "steps": "steps",
    "epoch": "epochs", "epochs": "epochs",
    "sample": "samples", "samples": "samples",
    "s": "s", "sec": "s", "secs": "s", "second": "s", "seconds": "s",
    "min": "min", "mins": "min", "minute": "min", "minutes": "min",
    "h": "h", "hr": "h", "hrs": "h", "hour": "h", "hours": "h",
}  # fmt: skip
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_WHOLE = ("steps", "samples")
_EXAMPLES = "'10000 steps', '14 epochs', '1200000 samples' or '15 min'"
# Far above any run (the longest corpora hold 1e9 samples), far below what makes integers of absurd length.
_LARGEST = Decimal(10) ** 15

_PATTERN = re.compile(
    r"\s*(?P<number>(?:\d+(?:_\d+)*)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|\.\d+)\s*(?P<unit>[A-Za-z]+)?\s*",
    re.ASCII,
)


@dataclass(frozen=True)
class Duration:
    """An amount of training or time. Made by `Duration.parse`; `str` gives the text back, normalised."""

    value: Decimal
    unit: str  # steps | epochs | samples | s | min | h

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read "NUMBER UNIT". Raises UserError; the caller adds the key the text came from."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UserError(f"{text!r} is not a duration; write one number and one unit: {_EXAMPLES}")
        number, unit = match["number"], match["unit"]
        if unit is None:
            raise UserError(f"{text!r} has no unit; write for example '{text.strip()} steps', or {_EXAMPLES}")
        canonical = _SPELLINGS.get(unit.lower())
        if canonical is None:
            near = difflib.get_close_matches(unit.lower(), _SPELLINGS, n=1)
            hint = f"; did you mean {_SPELLINGS[near[0]]!r}?" if near else ""
            units = "steps, epochs, samples, s, min, h"
            raise UserError(f"{text!r}: unknown unit {unit!r}{hint} (units: {units})")
        value = Decimal(number)
        if value > _LARGEST:
            raise UserError(f"{text!r} is too long; the largest number taken is {_LARGEST:.0e}")
        if canonical in _WHOLE and value != value.to_integral_value():
            raise UserError(f"{text!r}: the number of {canonical} must be whole")
        return cls(value, canonical)

    def __str__(self) -> str:
        number = format(self.value, "f")  # never "1E+4"; not normalize(), which rounds to 28 digits
        if "." in number:
            number = number.rstrip("0").rstrip(".")
        return f"{number} {self.unit}"

    @property
    def is_time(self) -> bool:
        """True for seconds, minutes and hours: decided by a clock, not by the step."""
        return self.unit in _SECONDS

    def seconds(self) -> float:
        """Length in seconds. Raises UserError where the unit is not one of time."""
        if not self.is_time:
            raise UserError(f"'{self}' is not a time; write for example '15 min'")
        return float(self.value * _SECONDS[self.unit])

    def to_steps(self, global_batch_size: int, samples_per_epoch: int) -> int:
        """Number of optimizer steps.

        An epoch has floor(samples_per_epoch / global_batch_size) steps; fractions of a step round half up;
        samples round up. What is longer than nothing is at least one step, so that "every 0.01 epochs" of a
        small data set does not divide by zero. Raises UserError for a time, and for epochs of a data set
        smaller than one batch.
        """
        if self.is_time:
            raise UserError(f"'{self}' is a time; write steps, epochs or samples, for example '1000 steps'")
        if self.unit == "steps":
            return int(self.value)
        if self.unit == "samples":
            return -(-int(self.value) // global_batch_size)
        steps_per_epoch = samples_per_epoch // global_batch_size
        if steps_per_epoch == 0:
            raise UserError(
                f"'{self}': the data set has {samples_per_epoch} samples, fewer than one global batch; lower "
                f"train.global_batch_size ({global_batch_size}) to {samples_per_epoch} or less"
            )
        steps = int((self.value * steps_per_epoch).to_integral_value(ROUND_HALF_UP))
        return max(steps, 1) if self.value > 0 else 0
