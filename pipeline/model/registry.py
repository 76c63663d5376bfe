"""From a model's name to the model: the only place that knows which families exist.

A family is one module that offers

* `names() -> list[str]`
* `build(name, num_classes, image_size, device, seed, head_bias, **overrides) -> nn.Module` with `MlpMixer`'s
  interface: `forward(images, keep=None)`, `drop_rates`, `blocks`, the last linear layer as `head` or `get_classifier()`
* `cost(name, num_classes, image_size, **overrides) -> ModelCost`

and, if it likes, `knows(name)` and `similar(name)` where `names()` is not all, and `initial_values(name, num_classes,
image_size, seed, head_bias, **overrides)` -> (parameter or buffer -> value) where `mixer.init_parameter` does not know
its parameters; and one line in `FAMILIES`. It is imported only when a name with its prefix is asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from pipeline.model.flops import ModelCost

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.model.mixer import MlpMixer

# prefix of the names -> module
FAMILIES = {
    "mixer_": "pipeline.model.variants",
    "timm/": "pipeline.model.timm_models",
}


def create_model(
    name: str,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    *,
    device: str | None = None,
    seed: int = 0,
    head_bias: float = 0.0,
    **overrides: Any,
) -> MlpMixer:
    """The named model (`list_models()`), initialised on `device` (default: CPU), or empty on device "meta".

    image_size: pixels, or (height, width). num_classes=0: no head, the model returns features. seed and
    head_bias go to the initialisation. overrides, for a Mixer: patch_size, in_chans, hidden_dim, num_blocks,
    tokens_mlp_dim, channels_mlp_dim, drop_path_rate; for timm/ models those that they have, and drop_rate; None
    means the variant's own value. Raises UserError for
    an unknown name or override and for an image size that the patches do not tile.
    """
    family = _family(name)
    return family.build(name, num_classes, image_size, device, seed, head_bias, **overrides)


def initial_values(
    name: str,
    num_classes: int,
    image_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    head_bias: float = 0.0,
    **overrides: Any,
) -> Callable[[str], Tensor]:
    """Name of a parameter or buffer -> its initial value, whole, fp32 on the CPU: for models that are sharded."""
    family = _family(name)
    if hasattr(family, "initial_values"):
        return family.initial_values(name, num_classes, image_size, seed, head_bias, **overrides)
    from pipeline.model.mixer import init_parameter

    return lambda parameter: init_parameter(parameter, shapes[parameter], seed, head_bias)


def model_cost(
    name: str, num_classes: int = 1000, image_size: int | tuple[int, int] = 224, **overrides: Any
) -> ModelCost:
    """Parameters and forward MACs of `create_model` with the same arguments, without building it or torch."""
    return _family(name).cost(name, num_classes, image_size, **overrides)


def list_models() -> list[str]:
    """Every name that `create_model` takes."""
    return [name for module in FAMILIES.values() for name in importlib.import_module(module).names()]


def _family(name: str) -> ModuleType:
    for prefix, module_name in FAMILIES.items():
        if name.startswith(prefix):
            module = importlib.import_module(module_name)
            if name in module.names() or (hasattr(module, "knows") and module.knows(name)):
                return module
            if hasattr(module, "similar"):
                near = " or ".join(module.similar(name)) or "one of `timm.list_models()`"
                raise UserError(f"there is no model {name!r}; did you mean {near}?")
    known = list_models()
    normal = name.lower().replace("-", "_").replace("/", "")
    nearest = difflib.get_close_matches(normal, known, 1, cutoff=0)[0]
    raise UserError(f"there is no model {name!r}; did you mean {nearest!r}? (all: {', '.join(known)})")
