"""`mixer import`: weights of others, or exported ones, as a checkpoint that runs can begin with.

The result looks like a run that has saved once, at step 0: `config.yaml`, `classes.json` where names are known, and
`checkpoints/step-00000000`. `mixer eval`, `fewshot`, `finetune`, `export` and `run.init_from` take it like a run.
No file is opened with pickle.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_tools.errors import UserError
from pipeline.checkpoint.layout import STATE, CheckpointManifest, CheckpointReader, write_pieces
from pipeline.checkpoint.place import MANIFEST, is_local, place, publish, step_folder, write_durably
from pipeline.config import load_config, to_yaml
from pipeline.model import create_model, variants
from pipeline.parallel.engine import BUFFER, WEIGHT, Piece
from pipeline.weights.flax import read_npz
from pipeline.weights.shape import MixerShape, mismatches, mixer_shape
from pipeline.weights.trained import newest_checkpoint

CLASSES = "classes.json"
MISLABELLED = ("mixer_b16_224.goog_in21k_ft_in1k", "mixer_l16_224.goog_in21k_ft_in1k")


@dataclass(frozen=True)
class Found:
    """What a file or folder holds: tensors by our (= timm's) names, and what it says of itself."""

    tensors: dict[str, Tensor]
    form: str
    described: dict[str, Any]  # timm's config.json, or nothing
    strangers: tuple[str, ...] = ()  # names that are no weights of a Mixer, left out


def read_weights(source: str) -> Found:
    """Reads an npz or safetensors file, a timm folder, a run or a checkpoint; `source` is a path or a URL.

    Raises:
        UserError: nothing there, a kind of file that would need pickle, or one that cannot be read.
    """
    path = place(source)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise UserError(
            f"{source}: files of this kind are pickles, which can run code; not opened. Save the state dict with "
            "safetensors.torch.save_file and import that"
        )
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.suffix == ".npz":
            # A copy in memory of what is remote: an npz file is read back and forth
            file = path if is_local(path) else io.BytesIO(path.read_bytes())
            tensors, strangers = read_npz(file, source)
            return Found(tensors, "npz", {}, tuple(strangers))
        if path.suffix == ".safetensors":
            return Found(_read_safetensors(path), "safetensors", {})
    except OSError as e:
        raise UserError(f"{source} cannot be read: {e}") from e
    raise UserError(f"{source}: give an .npz or .safetensors file, a timm folder, a run, or a checkpoint")


def _read_folder(path: Path) -> Found:
    if (path / "model.safetensors").exists():
        described = json.loads((path / "config.json").read_text()) if (path / "config.json").exists() else {}
        return Found(_read_safetensors(path / "model.safetensors"), "timm", described)
    reader = CheckpointReader(newest_checkpoint(path))
    if damage := reader.damage(reader.manifest.files):
        raise UserError(damage)
    kinds = (WEIGHT, BUFFER)
    return Found({n: reader.tensor(n, k) for n, k in reader.manifest.tensors if k in kinds}, "checkpoint", {})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        tensors = load_file(path) if is_local(path) else load(path.read_bytes())
    except SafetensorError as e:
        raise UserError(f"{path} cannot be read as safetensors: {e}") from e
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


@dataclass(frozen=True)
class Imported:
    """What was imported, for the user: in words, as a Mixer's shape, and lines to say."""

    what: str
    shape: MixerShape | None
    notes: list[str]


def import_weights(
    source: str,
    out: Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> Imported:
    """Makes the folder `out` from `source`. Model, image size and classes are read off the tensors; what is given
    must agree with them. A source without a head gets one of zeros for `num_classes` classes.

    Raises:
        UserError: `out` is not empty; the tensors are no Mixer, or not the one that was asked for.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    found = read_weights(source)
    if found.described.get("architecture", "MlpMixer").split("_")[0].lower() not in ("mlpmixer", "mixer"):
        return _import_timm_model(found, source, out)
    shape = mixer_shape({n: tuple(t.shape) for n, t in found.tensors.items()}, source)
    tensors = dict(found.tensors)
    notes = []
    if not shape.num_classes:
        if num_classes is None:
            raise UserError(f"{source} has no head: add --num-classes N for one of zeros (to be trained)")
        tensors["head.weight"] = torch.zeros(num_classes, shape.spec.hidden_dim)
        tensors["head.bias"] = torch.zeros(num_classes)
        shape = MixerShape(shape.name, shape.spec, shape.image_size, num_classes)
        notes.append(f"it has no head: one of zeros for {num_classes} classes was made")
    wanted = _wanted(shape, model, image_size, num_classes)
    wrong = mismatches({n: tuple(t.shape) for n, t in tensors.items()}, _shapes(wanted))
    if wrong:
        raise UserError("\n".join([f"{source} does not fit:", *wrong, *_advice(shape, wanted)]))
    if found.strangers:
        notes.append(f"{len(found.strangers)} arrays are no weights and were left out ({found.strangers[0]}, ...)")
    notes += _warnings(found)
    classes = found.described.get("label_names")
    config = {
        "run.name": out.name,
        "model.name": shape.name,
        "model.image_size": shape.image_size,
        "model.num_classes": shape.num_classes,
        **{f"model.{k}": v for k, v in shape.overrides().items()},
    }
    write_imported(out, tensors, config, classes, {"source": source, "format": found.form})
    what = f"{shape.name} at {shape.image_size} pixels, {shape.num_classes} classes"
    return Imported(what, shape, notes)


def _import_timm_model(found: Found, source: str, out: Path) -> Imported:
    """One of timm's own models, as `mixer export --format timm` or timm's `save_for_hf` writes it."""
    from pipeline.model.timm_models import settings_of

    settings = settings_of(found.described)
    overrides = {k: v for k, v in settings.items() if k not in ("name", "num_classes", "image_size")}
    classes, size = settings["num_classes"], settings["image_size"]
    network = create_model(settings["name"], classes, size, device="meta", **overrides)
    wrong = mismatches(
        {n: tuple(t.shape) for n, t in found.tensors.items()},
        {n: tuple(t.shape) for n, t in network.state_dict().items()},
    )
    if wrong:
        raise UserError("\n".join([f"{source} is not the {settings['name']} that its config.json says:", *wrong]))
    config = {"run.name": out.name, **{f"model.{k}": v for k, v in settings.items()}}
    buffers = frozenset(n for n, _ in network.named_buffers())
    names = found.described.get("label_names")
    write_imported(out, found.tensors, config, names, {"source": source, "format": found.form}, buffers)
    return Imported(f"{settings['name']} at {size} pixels, {classes} classes", None, _warnings(found))


def _wanted(shape: MixerShape, model: str | None, image_size: int | None, num_classes: int | None) -> MixerShape:
    spec, name = shape.spec, model or shape.name
    if name != shape.name:
        create_model(name, device="meta")  # an unknown name is told
        spec = variants.resolve(name)
    return MixerShape(name, spec, image_size or shape.image_size, num_classes or shape.num_classes)


def _shapes(shape: MixerShape) -> dict[str, tuple[int, ...]]:
    network = create_model(shape.name, shape.num_classes, shape.image_size, device="meta", **vars(shape.spec))
    return {n: tuple(p.shape) for n, p in network.named_parameters()}


def _advice(found: MixerShape, wanted: MixerShape) -> list[str]:
    """Which flag to change so that it fits."""
    lines = []
    if found.num_classes != wanted.num_classes:
        lines.append(
            f"it has {found.num_classes} classes: --num-classes {found.num_classes} (a new head is for "
            "`mixer finetune` to make)"
        )
    if found.image_size != wanted.image_size:
        lines.append(
            f"it was trained at {found.image_size} pixels: --image-size {found.image_size} (a higher resolution is for "
            "`mixer finetune` to make)"
        )
    if found.name != wanted.name:
        lines.append(f"it looks like {found.name}: --model {found.name}")
    return lines


def _warnings(found: Found) -> list[str]:
    """What of timm's description does not agree with this project's networks."""
    told = []
    pretrained = found.described.get("pretrained_cfg", {})
    mean, std = pretrained.get("mean"), pretrained.get("std")
    if mean is not None and (set(mean) | set(std or [])) != {0.5}:
        told.append(f"its inputs had mean {mean} and std {std}; here it is 0.5 and 0.5: expect lower accuracy")
    name = f"{found.described.get('architecture')}.{pretrained.get('tag')}"
    if name in MISLABELLED:
        told.append(f"{name} holds the weights trained on ImageNet-1k alone, whatever its name says (docs/science.md)")
    return told


def write_imported(
    out: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    classes: list[str] | None,
    origin: Mapping[str, str],
    buffers: frozenset[str] = frozenset(),
) -> None:
    """Writes `out` as a run that saved once, at step 0. Integers and `buffers` are stored as buffers."""
    settings = ["data.train=none", "data.val=none", "train.duration=1 steps", f"run.dir={out}"]
    loaded = load_config(None, [*settings, *(f"{k}={v}" for k, v in config.items())])
    folder = step_folder(out / "checkpoints", 0)
    folder.mkdir(parents=True)
    kinds = {n: BUFFER if n in buffers else WEIGHT for n in tensors}
    record = write_pieces(
        folder / "rank-00000-of-00001.safetensors",
        [Piece(n, kinds[n], 0, t.detach().contiguous().reshape(-1)) for n, t in tensors.items()],
    )
    state = json.dumps({"step": 0, "samples": 0, "optimizer_step": 0, "imported": dict(origin)}, indent=1).encode()
    write_durably(folder / STATE, [state])
    shapes = {(n, kinds[n]): tuple(t.shape) for n, t in tensors.items()}
    manifest = CheckpointManifest(
        0, shapes, [record], xxhash.xxh3_128_hexdigest(state), {}, {"strategy": "import", "world_size": 1}
    )
    if classes:
        (out / CLASSES).write_text(json.dumps(classes, ensure_ascii=False) + "\n")
    (out / "config.yaml").write_text(to_yaml(loaded.config))
    publish(folder / MANIFEST, manifest.to_json().encode())
