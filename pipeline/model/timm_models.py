"""ViT, BiT, HaloNet, NFNet and every other classifier of timm, by name (`timm/vit_base_patch16_224`).

The models that the Mixer is compared with, in the same pipeline on the same batches: timm's code and timm's parameter
names, with `MlpMixer`'s interface. Needs the extra `compare`; nothing of timm is imported before a name is asked for.

What would draw random numbers inside is keyed by the sample, as a Mixer's stochastic depth is, so that ranks and
micro-batches change nothing: one column of `keep` for every `DropPath`, and, where there is dropout, 32 columns more,
each kept with probability 1/2: they are the bits of the sample's dropout key. What remains is BatchNorm (HaloNet): its
statistics are those of a micro-batch, so such a model is elastic in its data only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from pipeline.model.flops import ModelCost

if TYPE_CHECKING:
    from torch import Tensor, nn

PREFIX = "timm/"
# Those of the paper's comparisons; any other name of timm's works too
LISTED = (
    "vit_base_patch32_224", "vit_base_patch16_224", "vit_large_patch32_224", "vit_large_patch16_224",
    "vit_huge_patch14_224", "resnetv2_50x1_bit", "resnetv2_50x3_bit", "resnetv2_101x1_bit", "resnetv2_101x3_bit",
    "resnetv2_152x2_bit", "resnetv2_152x4_bit", "halonet26t", "halonet50ts", "halonet_h1", "dm_nfnet_f0", "dm_nfnet_f1",
    "dm_nfnet_f2", "dm_nfnet_f3", "dm_nfnet_f4",
)  # fmt: skip
_SHAPE_KEYS = ("patch_size", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")


def names() -> list[str]:
    """Those worth listing."""
    return [PREFIX + name for name in LISTED]


def knows(name: str) -> bool:
    """Whether timm has this model. Raises UserError where timm is not installed."""
    return _timm().is_model(name.removeprefix(PREFIX))


def similar(name: str) -> list[str]:
    """Names of timm's that are spelt like this one."""
    import difflib

    found = difflib.get_close_matches(name.removeprefix(PREFIX), _timm().list_models(), 3, cutoff=0.5)
    return [PREFIX + n for n in found]


@functools.cache
def _timm() -> Any:
    try:
        from pipeline.model.timm_compat import import_timm

        return import_timm()
    except ImportError as e:
        raise UserError(f"timm/ models need the extra `compare` ({e}): pip install 'mixer-pretraining[compare]'") from e


def build(
    name: str,
    num_classes: int,
    image_size: int | tuple[int, int],
    device: str | None,
    seed: int,
    head_bias: float,
    **overrides: Any,
) -> nn.Module:
    """The named model with timm's own initial values for `seed` and a head of zeros, or empty on device "meta"."""
    import torch

    from pipeline.model.timm_wrap import wrap

    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(seed)
        model = wrap(_network(name.removeprefix(PREFIX), num_classes, image_size, overrides))
        if num_classes:
            head = model.get_classifier()
            while not hasattr(head, "weight"):  # a head that is several modules ends in its linear layer
                head = list(head.children())[-1]
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.constant_(head.bias, head_bias)
    return model if device in (None, "meta", "cpu") else model.to(device)


def initial_values(
    name: str, num_classes: int, image_size: int, seed: int, head_bias: float, **overrides: Any
) -> Callable[[str], Tensor]:
    """name of a parameter or buffer -> its initial value. The model is built once, on the CPU."""
    values = build(name, num_classes, image_size, "cpu", seed, head_bias, **overrides).state_dict()
    return values.__getitem__


def cost(name: str, num_classes: int, image_size: int | tuple[int, int], **overrides: Any) -> ModelCost:
    """Parameters, and MACs as torch counts them in one forward pass (matrix products and convolutions)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = build(name, num_classes, image_size, "meta", 0, 0.0, **overrides).eval()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    channels = overrides.get("in_chans") or 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, channels, *size, device="meta"))
    return ModelCost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def arguments(name: str, num_classes: int, image_size: int | tuple[int, int], overrides: dict[str, Any]) -> dict:
    """What `timm.create_model(name, ...)` is given. Raises UserError for a setting that this model does not have."""
    given = {k: v for k, v in overrides.items() if v is not None}
    found: dict[str, Any] = {"num_classes": num_classes, "in_chans": given.pop("in_chans", 3)}
    found["drop_path_rate"] = given.pop("drop_path_rate", 0.0)
    dropout = given.pop("drop_rate", 0.0)
    if name.startswith(("vit_", "test_vit")):
        found["img_size"] = image_size
        if dropout:  # after every dense layer and the position embedding: ViT paper, appendix B.1
            found |= {"pos_drop_rate": dropout, "proj_drop_rate": dropout}
        if "patch_size" in given:
            found["patch_size"] = given.pop("patch_size")
        if "num_blocks" in given:
            found["depth"] = given.pop("num_blocks")
        if "hidden_dim" in given:
            width = given.pop("hidden_dim")
            found |= {"embed_dim": width, "num_heads": max(1, width // 64)}
    elif dropout:
        found["drop_rate"] = dropout
    if given:
        raise UserError(f"timm/{name} has no setting model.{min(given)}; leave it out")
    return found


def is_resized_bit(name: str, overrides: dict[str, Any]) -> bool:
    """Whether this is a BiT of a size that timm has no name for."""
    resized = overrides.get("hidden_dim") or overrides.get("num_blocks")
    return bool(resized) and name.startswith("resnetv2_") and name.endswith("_bit")


def settings_of(described: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `arguments`: model.* keys from a timm folder's config.json."""
    ours = {"img_size": "image_size", "depth": "num_blocks", "embed_dim": "hidden_dim", "num_heads": None}
    config = described.get("pretrained_cfg", {})
    size = (config.get("input_size") or [3, 224, 224])[-1]
    found: dict[str, Any] = {"name": PREFIX + described["architecture"], "image_size": size}
    for key, value in described.get("model_args", {}).items():
        if (name := ours.get(key, key)) and value is not None:
            found[name] = value
    found.setdefault("num_classes", described.get("num_classes") or config.get("num_classes"))
    return found


def _network(name: str, num_classes: int, image_size: int | tuple[int, int], overrides: dict[str, Any]) -> nn.Module:
    timm = _timm()
    if is_resized_bit(name, overrides):
        return _small_bit(num_classes, overrides)
    try:
        return timm.create_model(name, pretrained=False, **arguments(name, num_classes, image_size, overrides))
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"timm/{name} cannot be built for model.image_size={image_size}: {e}") from e


def _small_bit(num_classes: int, overrides: dict[str, Any]) -> nn.Module:
    """A BiT (ResNet-v2 with GroupNorm and standardised weights) of another size, for studies with small models.

    hidden_dim: channels of the first stage (256 in BiT-R50x1), doubled from stage to stage; num_blocks: in each stage.
    """
    from functools import partial
    from importlib import import_module

    layers, resnet = import_module("timm.layers"), import_module("timm.models.resnetv2")
    unknown = [k for k in _SHAPE_KEYS if overrides.get(k) is not None and k not in ("hidden_dim", "num_blocks")]
    if unknown:
        raise UserError(f"a BiT has no setting model.{unknown[0]}; leave it out")
    width, blocks = overrides.get("hidden_dim") or 256, overrides.get("num_blocks") or 3
    if width % 128:
        raise UserError(f"model.hidden_dim={width}: a BiT normalises 32 groups of channels; give a multiple of 128")
    return resnet.ResNetV2(
        layers=[blocks] * 4,
        channels=[width * 2**i for i in range(4)],
        stem_chs=width // 4,
        stem_type="fixed",
        conv_layer=partial(layers.StdConv2d, eps=1e-8),
        num_classes=num_classes,
        in_chans=overrides.get("in_chans") or 3,
        drop_path_rate=overrides.get("drop_path_rate") or 0.0,
    )


def uses_batch_norm(model: nn.Module) -> Iterator[str]:
    """Names of layers whose statistics depend on the micro-batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return (name for name, m in model.named_modules() if isinstance(m, _BatchNorm))
