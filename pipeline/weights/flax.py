"""The layout of the authors' released checkpoints: Flax Linen names, kernels as [in, out], flat in an npz file.

Two layouts are in circulation, and both are read: that of the released `Mixer-*.npz` (`MixerBlock_0/...`), and an
older one (`Mixer/encoderblock_0/...`) that big_vision's loader accepts too. Written is the former. Arrays are
read without pickle.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError

_PREFIXES = ("params/", "opt/target/", "target/")  # where training checkpoints keep the weights
_MIXING = {"mlp_tokens": "token_mixing", "mlp_channels": "channel_mixing"}


def flax_name(name: str) -> str:
    """`blocks.3.mlp_tokens.fc1.weight` -> `MixerBlock_3/token_mixing/Dense_0/kernel`."""
    parts = name.split(".")
    leaf = "bias" if parts[-1] == "bias" else "kernel"
    if parts[0] == "stem":
        return f"stem/{leaf}"
    if parts[0] == "head":
        return f"head/{leaf}"
    scale = "bias" if leaf == "bias" else "scale"
    if parts[0] == "norm":
        return f"pre_head_layer_norm/{scale}"
    block = f"MixerBlock_{parts[1]}"
    if parts[2].startswith("norm"):
        return f"{block}/LayerNorm_{int(parts[2][-1]) - 1}/{scale}"
    return f"{block}/{_MIXING[parts[2]]}/Dense_{int(parts[3][-1]) - 1}/{leaf}"


def our_name(name: str) -> str | None:
    """`MixerBlock_3/token_mixing/Dense_0/kernel` -> `blocks.3.mlp_tokens.fc1.weight`; None for any other name."""
    parts = name.split("/")
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(parts[-1])
    if leaf is None:
        return None
    match parts[:-1]:
        case ["stem"]:
            return f"stem.proj.{leaf}"
        case ["head"]:
            return f"head.{leaf}"
        case ["pre_head_layer_norm"]:
            return f"norm.{leaf}"
        case [block, inner, *rest] if found := re.fullmatch(r"MixerBlock_(\d+)", block):
            if not rest and (norm := re.fullmatch(r"LayerNorm_([01])", inner)):
                return f"blocks.{found[1]}.norm{int(norm[1]) + 1}.{leaf}"
            mixing = {theirs: ours for ours, theirs in _MIXING.items()}.get(inner)
            if mixing and len(rest) == 1 and (dense := re.fullmatch(r"Dense_([01])", rest[0])):
                return f"blocks.{found[1]}.{mixing}.fc{int(dense[1]) + 1}.{leaf}"
    return None


def flax_array(tensor: Tensor) -> np.ndarray:
    """Kernels as Flax has them: [in, out], the stem's [P, P, C_in, C]."""
    array = tensor.float().numpy()
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.T) if array.ndim == 2 else array


def our_tensor(array: np.ndarray) -> Tensor:
    """The inverse of `flax_array`, fp32. bfloat16, which numpy stores as two raw bytes, is read too."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    if tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    return (tensor.T if tensor.ndim == 2 else tensor).float().contiguous()


def read_npz(file: Path | BinaryIO, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """({our name: tensor}, names in the file that are no weights of a Mixer), of either layout.

    Raises:
        UserError: not an npz file, one that needs pickle, or one that holds no Mixer.
    """
    if not zipfile.is_zipfile(file):  # numpy would take it for a pickle, and advise to load that
        raise UserError(f"{where} is no npz file: damaged, cut short, or something else. Fetch it again")
    if not isinstance(file, Path):
        file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{where} cannot be read as an npz file of plain arrays: {e}") from e
    prefix = next((p for p in _PREFIXES if any(n.startswith(p) for n in arrays)), "")
    inside = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    weights: dict[str, Tensor] = {}
    strangers: list[str] = []
    for name, array in _to_released_names(inside).items():
        ours = our_name(name)
        if ours is None:
            strangers.append(prefix + name)
        else:
            weights[ours] = our_tensor(array)
    if not weights:
        raise UserError(f"{where} holds no Mixer: its arrays are called {', '.join(list(arrays)[:3])}, ...")
    return weights, strangers


def _to_released_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The older layout's names and shapes in those of the released files; other names stay."""
    renamed = {}
    for name, array in arrays.items():
        name = re.sub(r"^embedding/", "stem/", name)
        name = re.sub(r"^Mixer/encoder_norm/", "pre_head_layer_norm/", name)
        name = re.sub(r"^Mixer/encoderblock_(\d+)/", r"MixerBlock_\1/", name)
        old = re.fullmatch(r"(MixerBlock_\d+/(?:token|channel)_mixing)_phase_0/(kernel|bias)([12])", name)
        if old:
            name, array = f"{old[1]}/Dense_{int(old[3]) - 1}/{old[2]}", array.squeeze()
        renamed[name] = array
    return renamed


def write_npz(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One array at a time, so that memory stays at one tensor."""
    temporary = path.with_name(path.name + ".tmp")
    options: dict[str, Any] = {"compression": zipfile.ZIP_STORED, "allowZip64": True}
    with zipfile.ZipFile(temporary, "w", **options) as archive:
        for name, tensor in tensors:
            with archive.open(flax_name(name) + ".npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, flax_array(tensor), allow_pickle=False)
    temporary.replace(path)
