"""The learning-rate schedule and the weight-decay mask; the optimizers themselves are torch's."""

from __future__ import annotations

import difflib
import math
from typing import Any

from torch import nn

from data_tools.errors import UserError

SCHEDULES = ("linear", "cosine", "constant")


def lr_scale(step: int, *, total_steps: int, warmup_steps: int, name: str, end_factor: float) -> float:
    """The factor on the peak learning rate for update number `step`, counted from 0.

    With progress p = clip((step - warmup) / (total - warmup), 0, 1) and e = end_factor:
    linear e + (1-e)(1-p), cosine e + (1-e)(1 + cos(pi p))/2, constant 1 (no e); all times min(1,
    step/warmup). Source: big_vision `utils.create_learning_rate_schedule`, the linear form being the paper's
    (section 3; its end value is not given there, the Mixer config has 1e-5). The warmup multiplies the
    decayed value, as there; as the count starts at 0, the first update after a warmup is a zero one. Raises
    UserError for an unknown name.
    """
    progress = min(max((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0), 1.0)
    if name == "linear":
        scale = end_factor + (1 - end_factor) * (1 - progress)
    elif name == "cosine":
        scale = end_factor + (1 - end_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    elif name == "constant":
        scale = 1.0
    else:
        nearest = difflib.get_close_matches(name, SCHEDULES, 1, cutoff=0)[0]
        raise UserError(
            f"scheduler.name: there is no schedule {name!r}; did you mean {nearest!r}? (all: {', '.join(SCHEDULES)})"
        )
    return scale * min(1.0, step / warmup_steps) if warmup_steps else scale


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as two groups for a torch optimizer: with decay, and without.

    Decayed are kernels only: a `weight` of two or more dimensions, that is of a linear or convolution layer.
    Biases, norms and position embeddings are not. Source: big_vision's Mixer config, which
    decays what matches ".*/kernel$". There the decay is not multiplied by the learning rate before the
    schedule; torch's AdamW multiplies, so 1e-4 there with a learning rate of 1e-3 is 0.1 here, the value in
    the paper's table 4.

    Each group holds `params`, `names` (same order) and `weight_decay`; a group without parameters is left
    out. Call it before ZeRO-3 partitions the parameters, which flattens them.
    """
    decay: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    no_decay: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kernel = parameter.ndim >= 2 and name.rpartition(".")[2] == "weight"
            group = decay if kernel else no_decay
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in (decay, no_decay) if group["params"]]
