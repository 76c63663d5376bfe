"""A checkpoint's weights in other people's formats, tensor by tensor, on one CPU.

* safetensors: one file, our (= timm's) parameter names
* timm:        a folder with config.json and model.safetensors that timm's `MlpMixer` loads
* npz:         the layout of the released checkpoints (Flax Linen names, kernels transposed)
* torch:       a state dict for `torch.load(..., weights_only=True)`
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.config import Config
from pipeline.model import variants
from pipeline.parallel.engine import BUFFER, EMA, WEIGHT

FORMATS = ("safetensors", "timm", "npz", "torch")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """The tensors of one checkpoint, read when they are asked for: peak memory stays at about one copy."""

    reader: CheckpointReader
    ema: bool
    dtype: torch.dtype

    def names(self) -> list[str]:
        kind = EMA if self.ema else WEIGHT
        found = [n for n, k in self.reader.manifest.tensors if k == kind]
        if not found:
            raise UserError(
                f"{self.reader.folder} holds no averaged weights: train with train.ema_decay, or leave --ema out"
            )
        return found

    def items(self) -> Iterator[tuple[str, Tensor]]:
        kind = EMA if self.ema else WEIGHT
        for name in self.names():
            yield name, self.reader.tensor(name, kind).to(self.dtype)
        for name, k in self.reader.manifest.tensors:
            if k == BUFFER:
                yield name, self.reader.tensor(name, BUFFER)


def export(config: Config, weights: Weights, form: str, target: Path, classes: list[str] | None) -> list[str]:
    """Writes `target` (a file, or a folder for timm) and returns lines for the user: what to load it with.

    Raises:
        UserError: an unknown format, or one that this model does not have.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        write_safetensors(target, weights)
        return [f'from safetensors.torch import load_file; weights = load_file("{target}")']
    if form == "torch":
        torch.save(dict(weights.items()), target)
        return [f'weights = torch.load("{target}", weights_only=True)']
    if config.model.name not in variants.names():
        raise UserError(
            f"--format {form} exists for Mixers only; {config.model.name} can be exported as safetensors or torch"
        )
    if form == "npz":
        write_npz(target, weights)
        return [f'weights = np.load("{target}", allow_pickle=False)']
    if form == "timm":
        return write_timm(target, config, weights, classes)
    raise UserError(f"there is no format {form!r}; choose one of {', '.join(FORMATS)}")


def write_safetensors(path: Path, weights: Weights) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def flax_name(name: str) -> str:
    """`blocks.3.mlp_tokens.fc1.weight` -> `MixerBlock_3/token_mixing/Dense_0/kernel`."""
    parts = name.split(".")
    leaf = "bias" if parts[-1] == "bias" else "kernel"
    if parts[0] == "stem":
        return f"stem/{leaf}"
    if parts[0] == "head":
        return f"head/{leaf}"
    if parts[0] == "norm":
        return f"pre_head_layer_norm/{'bias' if leaf == 'bias' else 'scale'}"
    block = f"MixerBlock_{parts[1]}"
    if parts[2].startswith("norm"):
        return f"{block}/LayerNorm_{int(parts[2][-1]) - 1}/{'bias' if leaf == 'bias' else 'scale'}"
    mixing = {"mlp_tokens": "token_mixing", "mlp_channels": "channel_mixing"}[parts[2]]
    return f"{block}/{mixing}/Dense_{int(parts[3][-1]) - 1}/{leaf}"


def flax_array(name: str, tensor: Tensor) -> np.ndarray:
    """Kernels as Flax has them: [in, out], the stem's [P, P, C_in, C]."""
    array = tensor.float().numpy()
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T) if array.ndim == 2 else array


def write_npz(path: Path, weights: Weights) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, tensor in weights.items():
            with archive.open(flax_name(name) + ".npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, flax_array(name, tensor), allow_pickle=False)
    temporary.replace(path)


def write_timm(folder: Path, config: Config, weights: Weights, classes: list[str] | None) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    m = config.model
    spec = variants.resolve(
        m.name,
        patch_size=m.patch_size,
        hidden_dim=m.hidden_dim,
        num_blocks=m.num_blocks,
        tokens_mlp_dim=m.tokens_mlp_dim,
        channels_mlp_dim=m.channels_mlp_dim,
        in_chans=m.in_chans,
    )
    num_classes = weights.reader.shape("head.weight", EMA if weights.ema else WEIGHT)[0]
    # timm takes widths as ratios of the embedding; ours are exact integers, so the ratios come out exact too
    arguments: dict[str, Any] = {
        "num_classes": num_classes, "img_size": m.image_size, "in_chans": spec.in_chans, "patch_size": spec.patch_size,
        "num_blocks": spec.num_blocks, "embed_dim": spec.hidden_dim,
        "mlp_ratio": [spec.tokens_mlp_dim / spec.hidden_dim, spec.channels_mlp_dim / spec.hidden_dim],
    }  # fmt: skip
    described = {
        "architecture": "MlpMixer", "model_args": arguments, "act_layer": "gelu_tanh", "label_names": classes,
        "pretrained_cfg": {"mean": [0.5] * spec.in_chans, "std": [0.5] * spec.in_chans, "interpolation": "bilinear",
                           "input_size": [spec.in_chans, m.image_size, m.image_size],
                           "crop_pct": config.eval.crop_fraction, "num_classes": num_classes},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    write_safetensors(folder / "model.safetensors", weights)
    return [
        "import json; from timm.layers import get_act_layer; from timm.models.mlp_mixer import MlpMixer; "
        "from safetensors.torch import load_file",
        f'c = json.load(open("{folder}/config.json")); model = MlpMixer(**c["model_args"], '
        'act_layer=get_act_layer(c["act_layer"]))',
        f'model.load_state_dict(load_file("{folder}/model.safetensors"))',
    ]
