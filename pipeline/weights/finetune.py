"""`mixer finetune`: from a trained model and a recipe to the settings of a new run that begins with its weights."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.place import is_local
from pipeline.config import find_recipe, load_config
from pipeline.model import variants
from pipeline.weights.begin import growth
from pipeline.weights.trained import TrainedModel


def finetune_settings(
    where: str, recipe: str, overrides: list[str], which: str = "last", ema: bool = False
) -> tuple[str, list[str]]:
    """(recipe, settings for it): the model of `where`, a new head of zeros, token MLPs that fit the image size.

    Raises:
        UserError: no such model; an image size that is no multiple of the one it was trained at.
    """
    trained = TrainedModel.open(where, which, ema)
    m = trained.config.model
    shape = {k: v for k, v in m.overrides().items() if v is not None and "drop" not in k}
    asked = [o for o in overrides if o.partition("=")[0].strip() == "model.image_size"]
    size = m.image_size
    if asked:
        # Read as the configuration reads it, so that a mistake gets the same message
        size = load_config(None, ["data.train=x", "train.duration=1 steps", asked[-1]]).config.model.image_size
    if m.name in variants.names() and size != m.image_size:
        copies = growth(m.image_size, size, where) ** 2
        shape["tokens_mlp_dim"] = copies * variants.resolve(m.name, **m.overrides()).tokens_mlp_dim
    folder = trained.reader.folder
    name = f"{Path(where).resolve().name}-{Path(find_recipe(recipe)).stem}"
    settings = {
        "run.name": name,
        "run.init_from": folder.resolve() if is_local(folder) else folder,
        "run.init_head": "zero",
        "run.init_ema": str(ema).lower(),
        "model.name": m.name,
        "model.image_size": m.image_size,
        **{f"model.{k}": v for k, v in shape.items()},
    }
    return recipe, [*(f"{k}={v}" for k, v in settings.items()), *overrides]
