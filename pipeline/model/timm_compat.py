"""timm beside this project: importing it next to any torch build, and its Mixer in the shape of ours.

timm and torchvision belong to the extra `compare`; nothing on the training path imports this file.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.library import Library

if TYPE_CHECKING:
    from pipeline.model.mixer import MlpMixer

# Operators that torchvision's Python code gives shapes to on import, and that its compiled part declares.
_NMS_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Library] = []  # a declared schema lives as long as its Library object


def import_timm() -> Any:
    """The module `timm`. Raises ImportError where it is not installed.

    PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled part does not load, and
    `import torchvision` ends in "operator torchvision::nms does not exist". No image model of timm calls
    these operators, so declaring them without an implementation is enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # the half that was imported
        library = Library("torchvision", "DEF")
        for schema in _NMS_SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        importlib.import_module("torchvision")
    return importlib.import_module("timm")


def timm_twin(model: MlpMixer) -> nn.Module:
    """timm's `MlpMixer` of the same shape, with the published tanh GELU (timm's default is erf).

    Parameter names are equal, so `load_state_dict` goes both ways.
    """
    import_timm()
    timm_mixer = importlib.import_module("timm.models.mlp_mixer").MlpMixer
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    channels = shapes["norm.weight"][0]
    # timm takes the hidden widths as ratios to C and truncates the product: half a unit keeps it exact.
    widths = [shapes[f"blocks.0.mlp_{kind}.fc1.weight"][0] for kind in ("tokens", "channels")]
    return timm_mixer(
        num_classes=model.num_classes,
        img_size=model.stem.image_size,
        in_chans=model.stem.in_chans,
        patch_size=model.stem.patch_size,
        num_blocks=len(model.blocks),
        embed_dim=channels,
        mlp_ratio=tuple((width + 0.5) / channels for width in widths),
        act_layer=partial(nn.GELU, approximate="tanh"),
    )
