"""A checkpoint's weights in other people's formats, tensor by tensor, on one CPU.

* safetensors: one file, our (= timm's) parameter names
* timm:        a folder with config.json and model.safetensors that timm's `MlpMixer` loads
* npz:         the layout of the released checkpoints (Flax Linen names, kernels transposed)
* torch:       a state dict for `torch.load(..., weights_only=True)`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.model import variants
from pipeline.weights.flax import write_npz
from pipeline.weights.trained import TrainedModel

FORMATS = ("safetensors", "timm", "npz", "torch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(trained: TrainedModel, form: str, target: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Writes `target` (a file, or a folder for timm) and returns the lines of Python that load it.

    Raises:
        UserError: an unknown format, or one that this model does not have.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        write_safetensors(target, trained, dtype)
        return [f'from safetensors.torch import load_file; weights = load_file("{target}")']
    if form == "torch":
        torch.save(dict(cast_tensors(trained, dtype)), target)
        return [f'import torch; weights = torch.load("{target}", weights_only=True)']
    if trained.config.model.name not in variants.names():
        if form == "timm":
            return write_timm_model(target, trained, dtype)
        raise UserError(
            f"--format {form} exists for Mixers only; {trained.config.model.name} can be exported as timm, safetensors "
            "or torch, with timm's parameter names"
        )
    if form == "npz":
        write_npz(target, cast_tensors(trained, dtype))
        return [f'import numpy as np; weights = np.load("{target}", allow_pickle=False)']
    if form == "timm":
        return write_timm(target, trained, dtype)
    raise UserError(f"there is no format {form!r}; choose one of {', '.join(FORMATS)}")


def cast_tensors(trained: TrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Weights in `dtype`; integers (counts of batches) stay what they are."""
    return ((n, t.to(dtype) if t.is_floating_point() else t) for n, t in trained.tensors())


def write_safetensors(path: Path, trained: TrainedModel, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: tensor.contiguous() for name, tensor in cast_tensors(trained, dtype)}
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def write_timm(folder: Path, trained: TrainedModel, dtype: torch.dtype) -> list[str]:
    """What timm knows no name for (H/14, grown token MLPs, own shapes) loads too: the arguments are written out."""
    folder.mkdir(parents=True, exist_ok=True)
    m = trained.config.model
    spec = variants.resolve(m.name, **m.overrides())
    arguments: dict[str, Any] = {
        "num_classes": trained.num_classes, "img_size": m.image_size, "in_chans": spec.in_chans,
        "patch_size": spec.patch_size, "num_blocks": spec.num_blocks, "embed_dim": spec.hidden_dim,
        # timm multiplies these with the embedding and cuts off the rest: half a unit more keeps every width exact
        "mlp_ratio": [(width + 0.5) / spec.hidden_dim for width in (spec.tokens_mlp_dim, spec.channels_mlp_dim)],
    }  # fmt: skip
    _describe(folder, trained, "MlpMixer", arguments, act_layer="gelu_tanh")
    write_safetensors(folder / "model.safetensors", trained, dtype)
    return [
        "import json; from timm.layers import get_act_layer; from timm.models.mlp_mixer import MlpMixer; "
        "from safetensors.torch import load_file",
        f'c = json.load(open("{folder}/config.json")); model = MlpMixer(**c["model_args"], '
        'act_layer=get_act_layer(c["act_layer"]))',
        f'model.load_state_dict(load_file("{folder}/model.safetensors"))',
    ]


def write_timm_model(folder: Path, trained: TrainedModel, dtype: torch.dtype) -> list[str]:
    """Of a model that is timm's own."""
    from pipeline.model import timm_models

    folder.mkdir(parents=True, exist_ok=True)
    m = trained.config.model
    name = m.name.removeprefix(timm_models.PREFIX)
    if timm_models.is_resized_bit(name, m.overrides()):
        raise UserError(f"timm has no name for a {m.name} of this size: export it as safetensors")
    arguments = timm_models.arguments(name, trained.num_classes, m.image_size, m.overrides())
    _describe(folder, trained, name, arguments)
    write_safetensors(folder / "model.safetensors", trained, dtype)
    return [
        "import json, timm; from safetensors.torch import load_file",
        f'c = json.load(open("{folder}/config.json")); model = timm.create_model(c["architecture"], **c["model_args"])',
        f'model.load_state_dict(load_file("{folder}/model.safetensors"))',
    ]


def _describe(folder: Path, trained: TrainedModel, architecture: str, arguments: dict[str, Any], **more: Any) -> None:
    """Writes config.json: the arguments, class names, and how images enter."""
    m, crop = trained.config.model, trained.config.eval.crop_fraction
    described = {
        "architecture": architecture, "model_args": arguments, **more, "label_names": trained.class_names(),
        "pretrained_cfg": {"mean": [0.5] * m.in_chans, "std": [0.5] * m.in_chans, "interpolation": "bilinear",
                           "input_size": [m.in_chans, m.image_size, m.image_size], "crop_pct": crop,
                           "num_classes": trained.num_classes},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
