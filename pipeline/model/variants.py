"""The Mixer family: table 1 of the paper as data, and from a name with overrides to a model or to its cost.

Imports torch only inside `build`, so that costs and messages cost no start-up time.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from pipeline.model.flops import ModelCost, mixer_cost

if TYPE_CHECKING:
    from pipeline.model.mixer import MlpMixer


@dataclass(frozen=True)
class MixerSpec:
    """The shape of one Mixer, in the paper's terms: P, C, L, D_S, D_C."""

    patch_size: int
    hidden_dim: int
    num_blocks: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    in_chans: int = 3
    drop_path_rate: float = 0.0


def _paper(patch_size: int, hidden_dim: int, num_blocks: int) -> MixerSpec:
    return MixerSpec(patch_size, hidden_dim, num_blocks, hidden_dim // 2, hidden_dim * 4)


# Table 1; in all of them D_S = C/2 and D_C = 4C.
VARIANTS = {
    "mixer_s32": _paper(32, 512, 8),
    "mixer_s16": _paper(16, 512, 8),
    "mixer_b32": _paper(32, 768, 12),
    "mixer_b16": _paper(16, 768, 12),
    "mixer_l32": _paper(32, 1024, 24),
    "mixer_l16": _paper(16, 1024, 24),
    "mixer_h14": _paper(14, 1280, 32),
}


def names() -> list[str]:
    """Names that `resolve` knows."""
    return list(VARIANTS)


def resolve(name: str, **overrides: Any) -> MixerSpec:
    """The spec of a named variant with overrides (fields of `MixerSpec`; None means not given).

    D_S and D_C follow an overridden `hidden_dim` as C/2 and 4C unless they are given too.
    Raises UserError for an unknown field or an impossible value.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.pop("drop_rate", 0.0):
        raise UserError(
            "model.drop_rate: a Mixer has no dropout (0 was best in all of table 4, and no code says where it "
            "would go); use model.drop_path_rate"
        )
    known = [f.name for f in fields(MixerSpec)]
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0)[0]
            raise UserError(f"{name} has no setting {key!r}; did you mean {nearest!r}? (all: {', '.join(known)})")
    if "hidden_dim" in given:
        follows = _paper(1, given["hidden_dim"], 1)
        given.setdefault("tokens_mlp_dim", follows.tokens_mlp_dim)
        given.setdefault("channels_mlp_dim", follows.channels_mlp_dim)
    spec = replace(VARIANTS[name], **given)
    for key in known:
        value = getattr(spec, key)
        if key == "drop_path_rate":
            if not 0 <= value < 1:
                raise UserError(f"drop_path_rate={value}: it is a probability, give a value in [0, 1)")
        elif value < 1:
            raise UserError(f"{key}={value}: give a whole number of at least 1")
    return spec


def check_image_size(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(height, width). Raises UserError, naming the nearest fitting sizes, unless both are multiples of P."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    for side in (height, width):
        if side < 1 or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise UserError(
                f"image size {height}x{width} does not fit patches of {patch_size}: {side} is not a "
                f"multiple of {patch_size}; the nearest that are: {below} and {below + patch_size}"
            )
    return height, width


def build(
    name: str,
    num_classes: int,
    image_size: int | tuple[int, int],
    device: str | None,
    seed: int,
    head_bias: float,
    **overrides: Any,
) -> MlpMixer:
    """The named model, with its initial values unless the device is "meta"."""
    import torch

    from pipeline.model.mixer import MlpMixer

    spec = resolve(name, **overrides)
    size = check_image_size(image_size, spec.patch_size)
    with torch.device("meta"):  # skips torch's own initialisation, which would be overwritten
        model = MlpMixer(num_classes, size, **{f.name: getattr(spec, f.name) for f in fields(spec)})
    if device != "meta":
        model.to_empty(device=device or "cpu")
        model.reset_parameters(seed, head_bias)
    return model


def cost(name: str, num_classes: int, image_size: int | tuple[int, int], **overrides: Any) -> ModelCost:
    """Exact parameter count and forward MACs of the named model."""
    spec = resolve(name, **overrides)
    height, width = check_image_size(image_size, spec.patch_size)
    return mixer_cost(
        tokens=(height // spec.patch_size) * (width // spec.patch_size),
        patch_values=spec.in_chans * spec.patch_size**2,
        hidden_dim=spec.hidden_dim,
        num_blocks=spec.num_blocks,
        tokens_mlp_dim=spec.tokens_mlp_dim,
        channels_mlp_dim=spec.channels_mlp_dim,
        num_classes=num_classes,
    )
