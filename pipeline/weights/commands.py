"""What `mixer import` and `mixer export` do."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import UserError


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
