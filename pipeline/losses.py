"""Classification losses, one value per sample, in fp32.

Per sample, because the trainer weighs them: padded slots and unreadable images count 0, and the sum is
divided by the global batch size, which is the same on every rank. Targets are class indices [B], or [B, K]
with the share of each class (mixup, several labels per image). A negative index means "no class".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]


def softmax_xent(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-sum_k y_k log softmax(z)_k. logits [B, K], target int [B] or float [B, K] -> [B], fp32.

    Smoothing e replaces y by (1-e) y + e/K (Szegedy et al. 2016). A negative index gives loss 0.
    """
    if target.ndim == 1:
        target = target.long().clamp(min=-1)
        return F.cross_entropy(
            logits.float(), target, reduction="none", ignore_index=-1, label_smoothing=label_smoothing
        )
    return F.cross_entropy(logits.float(), target.float(), reduction="none", label_smoothing=label_smoothing)


def sigmoid_xent(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-sum_k [y_k log sigmoid(z_k) + (1-y_k) log sigmoid(-z_k)]: the sum of one binary problem a class.

    logits [B, K], target int [B] or float [B, K] -> [B], fp32. The sum, not the mean, is what big_vision
    trains Mixer with (its learning rates and clipping assume it). Smoothing as in `softmax_xent`. A negative
    index means that no class is present: all K problems are negative.
    """
    if target.ndim == 1:
        present = (target >= 0).float().unsqueeze(1)
        one_hot = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        target = one_hot.scatter_(1, target.long().clamp(min=0).unsqueeze(1), present)
    target = target.float()
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none").sum(dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = {"softmax_xent": softmax_xent, "sigmoid_xent": sigmoid_xent}


def make_loss(name: str, label_smoothing: float = 0.0) -> Loss:
    """loss(logits [B, K], target [B] or [B, K]) -> [B]. Raises UserError for an unknown name or smoothing."""
    if name not in LOSSES:
        nearest = difflib.get_close_matches(name, LOSSES, 1, cutoff=0)[0]
        raise UserError(f"loss.name: there is no loss {name!r}; did you mean {nearest!r}? (all: {', '.join(LOSSES)})")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"loss.label_smoothing={label_smoothing}: give a value in [0, 1)")
    return partial(LOSSES[name], label_smoothing=label_smoothing)
