"""Images a second that the paper gives (arXiv 2105.01601, tables 2 and 3): of the forward pass, a TPU v3 core, at the
best batch size."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """`name`: the paper's, where its model is not exactly this one. size None: pixels that the table does not give."""

    rate: float
    size: int | None = 224
    name: str = ""


# model.name -> what is published, the first entry being table 3's at 224 pixels where there is one
PUBLISHED: dict[str, list[Published]] = {
    "mixer_s32": [Published(11489)],
    "mixer_s16": [Published(3994)],
    "mixer_b32": [Published(4208)],
    "mixer_b16": [Published(1384)],
    "mixer_l32": [Published(1314)],
    "mixer_l16": [Published(419), Published(105, 448)],
    "mixer_h14": [Published(194), Published(40, 448)],
    "timm/vit_base_patch16_224": [Published(861)],
    "timm/vit_large_patch16_224": [Published(280), Published(32, 512)],
    "timm/vit_huge_patch14_224": [Published(87), Published(15, None)],
    "timm/resnetv2_50x1_bit": [Published(2159)],
    "timm/resnetv2_152x2_bit": [Published(356)],
    "timm/resnetv2_152x4_bit": [Published(26, None)],
    "timm/halonet_h1": [Published(120, None, "HaloNet-H4")],
    "timm/dm_nfnet_f4": [Published(46, None, "NFNet-F4+")],
}

# A Mixer and the ViT of the same size and patch
COUNTERPART = {
    "mixer_s32": "timm/vit_small_patch32_224",
    "mixer_s16": "timm/vit_small_patch16_224",
    "mixer_b32": "timm/vit_base_patch32_224",
    "mixer_b16": "timm/vit_base_patch16_224",
    "mixer_l32": "timm/vit_large_patch32_224",
    "mixer_l16": "timm/vit_large_patch16_224",
    "mixer_h14": "timm/vit_huge_patch14_224",
}


def published_rate(model: str, size: int) -> float | None:
    """Of exactly this model at this size; None where the paper gives none."""
    found = (p.rate for p in PUBLISHED.get(model, ()) if p.size == size and not p.name)
    return next(found, None)


def published_note(model: str, size: int) -> str:
    """What the paper gives for this model, or for the nearest it has; empty where it has none."""
    exact = published_rate(model, size)
    if exact is not None:
        return f"{exact:,.0f}"
    near = PUBLISHED.get(model, [])[-1:]
    return "".join(
        f"{p.rate:,.0f} ({', '.join(filter(None, [p.name, f'{p.size} px' if p.size else 'table 2']))})" for p in near
    )
