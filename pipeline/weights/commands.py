"""What `mixer import`, `mixer export` and `mixer picture` do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def run_import(source: str, out: Path, model: str | None, image_size: int | None, num_classes: int | None) -> int:
    """Makes a checkpoint of weights from elsewhere and says what it is good for."""
    from pipeline.weights.importing import import_weights

    imported = import_weights(source, out, model=model, image_size=image_size, num_classes=num_classes)
    print(f"{out}: {imported.what}, from {source}")
    for note in imported.notes:
        print(f"note: {note}")
    print(f"Go on with `mixer finetune {out} data.train=...`, `mixer eval {out} data.val=...`, or run.init_from={out}")
    return 0


def run_export(run_dir: str, out: Path | None, form: str, which: str, ema: bool, dtype: str) -> int:
    """Writes the weights of one checkpoint in another format and says how to load them."""
    from pipeline.export import DTYPES, FORMATS, export
    from pipeline.weights.trained import TrainedModel

    if form not in FORMATS or dtype not in DTYPES:
        raise UserError(f"choose --format of {', '.join(FORMATS)} and --dtype of {', '.join(DTYPES)}")
    trained = TrainedModel.open(run_dir, which, ema)
    suffix = {"safetensors": ".safetensors", "npz": ".npz", "torch": ".pt", "timm": ""}[form]
    target = out or trained.folder / "export" / f"{trained.config.run.name}-{trained.name}{suffix}"
    lines = export(trained, form, target, DTYPES[dtype])
    weights = "averaged weights" if ema else "weights"
    print(f"{target}: {weights} of {trained.reader.folder.name}, {dtype}. To load:")
    for line in lines:
        print(f"  {line}")
    return 0


def run_picture(source: str, out: Path | None, which: str, ema: bool, layers: str, grid: str | None) -> int:
    """Draws token-mixing weights and stem filters as PNG files, and says how far apart in phase the pairs are."""
    import numpy as np
    from PIL import Image

    from pipeline.weights import filters

    read, names, target = _open_weights(source, which, ema)
    chosen = filters.parse_layers(layers, filters.count_layers(names, source))
    first = read(filters.layer_name(1))
    rows, cols = filters.token_grid(first.shape[1], grid)
    out = out or target
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for layer in chosen:
        units = read(filters.layer_name(layer))
        order, frequency, cosines = filters.sort_units(units, rows, cols)
        path = out / f"token-mixing-layer{layer:02d}.png"
        Image.fromarray(filters.token_mixing_picture(units, rows, cols, order)).save(path)
        written.append(path)
        pairs = f", closest inverses: median cosine {np.median(cosines):+.2f}" if len(cosines) else ""
        print(
            f"layer {layer}: {len(units)} units over {rows}x{cols} tokens, "
            f"mean frequency {frequency.mean():.2f} cycles a token{pairs}"
        )
    stem = read(filters.STEM)
    try:
        Image.fromarray(filters.stem_picture(stem)).save(out / "stem.png")
    except UserError as e:
        print(f"no picture of the stem: {e}")
    else:
        written.append(out / "stem.png")
        print(f"stem: {len(stem)} filters of {stem.shape[2]}x{stem.shape[3]} pixels")
    print(f"written: {len(written)} pictures in {out}")
    return 0


def _open_weights(source: str, which: str, ema: bool) -> tuple[Callable[[str], np.ndarray], set[str], Path]:
    """(a tensor by its name, all names, where pictures go) of a run, a checkpoint or a file of weights.

    Raises:
        UserError: nothing that holds weights, or a choice of checkpoint where there is none to choose.
    """
    from pipeline.checkpoint.place import MANIFEST, is_local, place
    from pipeline.weights.importing import read_weights
    from pipeline.weights.trained import TrainedModel

    path = place(source)
    beside = Path(f"{path.stem}-pictures")
    if path.is_dir() and ((path / MANIFEST).exists() or (path / "config.yaml").exists()):
        trained = TrainedModel.open(source, which, ema)
        target = trained.folder / "pictures" / trained.name if is_local(trained.folder) else beside
        names = {n for n, kind in trained.reader.manifest.tensors if kind == trained.kind}
        return lambda name: trained.reader.tensor(name, trained.kind).numpy(), names, target
    if ema or which != "last":
        raise UserError(f"{source} is no run: --ema and --checkpoint choose among a run's weights")
    tensors = read_weights(source).tensors
    return lambda name: tensors[name].numpy(), set(tensors), beside
