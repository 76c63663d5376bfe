"""Which Mixer a set of tensors is: its shape read off the tensors, and every tensor that does not fit named."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from data_tools.errors import UserError
from pipeline.model.variants import VARIANTS, MixerSpec

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MixerShape:
    """A Mixer as `create_model` makes it: name and what differs from that variant, pixels, classes (0: no head)."""

    name: str
    spec: MixerSpec
    image_size: int
    num_classes: int

    def overrides(self) -> dict[str, int]:
        """The fields in which `spec` is not the named variant."""
        own = VARIANTS[self.name]
        names = [f.name for f in fields(MixerSpec) if f.name != "drop_path_rate"]
        return {n: getattr(self.spec, n) for n in names if getattr(self.spec, n) != getattr(own, n)}


def mixer_shape(shapes: Shapes, where: str) -> MixerShape:
    """Reads P, C, L, D_S, D_C, the image size and the number of classes off the tensors.

    Raises:
        UserError: a tensor that says one of these is missing, or the tokens are no square.
    """

    def look(name: str, ndim: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != ndim:
            there = "is missing" if found is None else f"has shape {list(found)}"
            raise UserError(f"{where} is no Mixer: {name} {there}")
        return found

    hidden, in_chans, patch, _ = look("stem.proj.weight", 4)
    tokens_mlp, tokens = look("blocks.0.mlp_tokens.fc1.weight", 2)
    channels_mlp = look("blocks.0.mlp_channels.fc1.weight", 2)[0]
    blocks = 1 + max(int(m[1]) for n in shapes if (m := re.match(r"blocks\.(\d+)\.", n)))
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"{where}: {tokens} tokens are no square; only square images can be imported")
    classes = shapes["head.weight"][0] if "head.weight" in shapes else 0
    spec = MixerSpec(patch, hidden, blocks, tokens_mlp, channels_mlp, in_chans)
    alike = [n for n, v in VARIANTS.items() if (v.patch_size, v.hidden_dim, v.num_blocks) == (patch, hidden, blocks)]
    return MixerShape(alike[0] if alike else "mixer_s16", spec, side * patch, classes)


def mismatches(found: Shapes, wanted: Shapes) -> list[str]:
    """Every tensor that is missing, not asked for, or of another shape; blocks that differ alike share a line."""
    problems: dict[tuple[str, str], list[str]] = {}
    for name in [*wanted, *(n for n in found if n not in wanted)]:
        if name not in found:
            what = f"is missing (wanted {list(wanted[name])})"
        elif name not in wanted:
            what = f"{list(found[name])} has no place in this model"
        elif tuple(found[name]) != tuple(wanted[name]):
            what = f"is {list(found[name])}, wanted {list(wanted[name])}"
        else:
            continue
        problems.setdefault((re.sub(r"\d+", "N", name), what), []).append(name)
    return [
        f"{names[0]}{f' (and {len(names) - 1} more like it, to {names[-1]})' if len(names) > 1 else ''} {what}"
        for (_, what), names in problems.items()
    ]
