"""The `TrainEngine`: what the trainer knows of data parallelism. One subclass a family.

An engine owns model and optimizer and hides who holds which part of them. Its state is visible as `Piece`s: flat
1-D views on the local storage of every weight and optimizer moment, which checkpoints write and overwrite in
place. A fresh start and a resume are the same procedure: warm up, then overwrite every piece.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data_tools.errors import UserError
from pipeline.data.augment import normalize
from pipeline.data.loader import Batch
from pipeline.data.mixup import mix_images, mix_targets
from pipeline.data.order import key
from pipeline.parallel.blocks import prepare_blocks
from pipeline.parallel.registry import STRATEGIES
from pipeline.parallel.world import World

WEIGHT, BUFFER, EMA = "weight", "buffer", "ema"
# optimizer -> kinds of its state, one value a trainable element each; they begin as zeros
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + len(data)) of the flattened tensor (name, kind); `data` is a 1-D view, fp32."""

    name: str
    kind: str
    offset: int
    data: Tensor


@dataclass(frozen=True)
class EngineOptions:
    """How to train, as far as engines care. `micro_steps` micro-batches make one optimizer step."""

    strategy: str
    precision: str  # bf16 | fp32: of the computation; master weights, moments and gradient reduction are fp32
    global_batch_size: int
    micro_batch_size: int
    micro_steps: int
    betas: tuple[float, float]
    eps: float
    clip_grad_norm: float  # 0 = no clipping
    compile: str = "none"
    activation_checkpointing: str = "none"
    offload: str = "none"  # none | optimizer: moments (fsdp: weights too) live in host memory
    shard_size: int = 0  # hsdp: ranks a copy of the state is sharded over
    reshard_after_forward: bool = True
    optimizer: str = "adamw"  # adamw | sgd
    momentum: float = 0.9  # of sgd
    seed: int = 0  # of what the model itself draws


@dataclass
class StepStats:
    """Sums over the local slots of one step, still on the device: no synchronisation until somebody looks."""

    loss: Tensor
    weight: Tensor
    correct: Tensor

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(self.loss + other.loss, self.weight + other.weight, self.correct + other.correct)


class TrainEngine(ABC):
    """Data-parallel training of one model. Subclasses call `super().__init__` first, then wrap `self.model`.

    Args:
        model: built on the meta device (or any other); its values do not matter, they are loaded afterwards.
        groups: parameter groups with `names` and `weight_decay`; parameters in none of them are frozen.
        loss_fn: (logits [m, K] fp32, labels [m]) -> losses [m].
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        options: EngineOptions,
        world: World,
    ):
        self.options, self.world, self.loss_fn = options, world, loss_fn
        self.groups = [(list(g["names"]), float(g["weight_decay"])) for g in groups]
        self.moments = MOMENTS[options.optimizer]
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.buffer_shapes = {name: tuple(b.shape) for name, b in persistent_buffers(model)}
        self.names = list(self.shapes)
        self.trainable = {name for names, _ in self.groups for name in names}
        widen_scalars(model)
        self.model = model
        self.own_seconds = 0.0  # of the last step's forward passes, on the host's clock
        self.updated = torch.ones(())  # whether the last step changed anything, 1 or 0, still on the device
        self._updates = torch.zeros(())

    def _materialize(self, device: torch.device | None = None) -> dict[str, nn.Parameter]:
        """Gives the model memory on `device` (this rank's), zeroes and returns its parameters by name.

        Zeros, not garbage: the warm-up must not meet a NaN, on which the step would be skipped.
        """
        device = device or self.world.device
        on_meta = [n for n, t in (*self.model.named_parameters(), *self.model.named_buffers()) if t.is_meta]
        if on_meta:
            lost = set(dict(self.model.named_buffers())) - set(self.buffer_shapes)
            if lost:  # nobody would compute them again
                raise ValueError(f"build this model on the CPU: no checkpoint holds its buffers {sorted(lost)[:3]}")
            self.model.to_empty(device=device)
        else:
            self.model.to(device)
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
            for b in self.model.buffers() if on_meta else ():
                b.zero_()
        return dict(self.model.named_parameters())

    def _grouped(self, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [parameters[n] for n in names], "weight_decay": decay} for names, decay in self.groups]

    def _make_optimizer(self, parameters: dict[str, Any]) -> torch.optim.Optimizer:
        groups, o = self._grouped(parameters), self.options
        if o.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=o.momentum, fused=True)
        return torch.optim.AdamW(groups, lr=0.0, betas=o.betas, eps=o.eps, fused=True)

    # -- training ---------------------------------------------------------------------------------------------

    def train_step(self, batches: list[Batch], lr: float, step: int = 0) -> tuple[StepStats, Tensor]:
        """Optimizer step number `step`. Returns the local sums and the gradient's global norm before clipping."""
        self.model.train()
        self.own_seconds = 0.0
        before = [b.clone() for b in self._statistics]
        parts = []
        for i, batch in enumerate(batches):
            # A Mixer draws nothing, other models may (dropout): keyed, so that no generator has to be saved
            torch.manual_seed(int(key(self.options.seed, step, i, self.world.rank)) >> 1)
            parts.append(self._forward_backward(batch, i == len(batches) - 1))
        norm = self._update(lr)
        for buffer, old in zip(self._statistics, before):  # BatchNorm's moved in the forward pass, before anybody knew
            buffer.copy_(torch.where(self.updated.to(buffer.device) > 0, buffer, old))
        return functools.reduce(operator.add, parts), norm

    @functools.cached_property
    def _statistics(self) -> list[Tensor]:
        """Buffers that a forward pass may change in place; a Mixer has none."""
        return [b for _, b in persistent_buffers(self.model)]

    def _forward_backward(self, batch: Batch, last: bool) -> StepStats:
        started = time.perf_counter()
        images, labels, weights, keep = self._to_device(batch)
        mixed = len(batch.partners) > 0
        partners, mix = (x.to(self.world.device, non_blocking=True) for x in (batch.partners, batch.mix))
        if mixed:
            images = mix_images(images, partners, mix)
        with self._autocast():
            logits = self.model(images, keep)
        self.own_seconds += time.perf_counter() - started
        targets = mix_targets(labels, partners, mix, logits.shape[1]) if mixed else labels
        losses = self.loss_fn(logits.float(), targets) * weights
        # Every backend averages gradients over ranks; the loss is sum(weight * loss) / B, B the fixed global batch,
        # so that padding, accumulation and the number of ranks do not change the function that is optimised.
        scale = self.world.size / self.options.global_batch_size
        # A loss that is not finite makes the gradient such, whatever the loss function's own derivative says there:
        # so the reduction of gradients tells all ranks, and they skip the step together.
        total = losses.sum()
        self._backward(total * torch.where(torch.isfinite(total.detach()), scale, math.nan), last)
        with torch.no_grad():
            correct = ((logits.argmax(-1) == labels[: len(weights)]) * weights).sum()
        return StepStats(losses.detach().sum(), weights.sum(), correct)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits fp32 [m, K] of an evaluation batch. Every rank must call it equally often."""
        self.model.eval()
        images, *_ = self._to_device(batch)
        with self._autocast():
            return self.model(images, None).float()

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        device = self.world.device
        images = normalize(batch.images.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        weights = batch.weights.to(device, non_blocking=True)
        keep = batch.keep.to(device, non_blocking=True) if batch.keep.shape[1] else None
        return images, labels, weights, keep

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.precision == "fp32":
            return nullcontext()
        # No cache of cast weights: each is used once a forward, and ZeRO-3 frees the originals meanwhile
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, cache_enabled=False)

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None:
        """Accumulates gradients; `last` marks the micro-batch after which they are reduced over ranks."""

    @abstractmethod
    def _update(self, lr: float) -> Tensor:
        """Clips, updates, clears the gradients. Returns the norm before clipping.

        A step whose norm is not finite changes nothing: neither weights nor moments nor the count of updates; the
        caller puts BatchNorm's statistics back.
        """

    def _torch_update(self, parameters: Iterable[Tensor], lr: float) -> Tensor:
        """`_update` for a torch optimizer whose gradients are already reduced."""
        optimizer = self._inner_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.clip_grad_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # What a gradient scaler would say: fused AdamW then leaves everything alone, and nobody waits for the device
        self._count(torch.isfinite(norm).float())
        optimizer.grad_scale, optimizer.found_inf = None, 1 - self.updated
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _count(self, updated: Tensor) -> None:
        self.updated, self._updates = updated, self._updates.to(updated.device) + updated

    @abstractmethod
    def _inner_optimizer(self) -> Any:
        """The torch optimizer that holds the moments."""

    @property
    def optimizer_step(self) -> int:
        """Updates so far, which Adam's bias correction counts; skipped steps are not among them."""
        return int(self._updates)

    def _set_optimizer_step(self, step: int) -> None:
        self._updates = torch.full((), float(step))
        for state in self._inner_optimizer().state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(float(step))
            elif "step" in state:  # DeepSpeed's CPU Adam
                state["step"] = step

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Rank 0's BatchNorm statistics, which are what checkpoints hold, on every rank: before an evaluation."""
        if self.world.size > 1:
            for _, buffer in persistent_buffers(self.model):
                dist.broadcast(buffer, src=0)

    # -- state ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Every (name, kind) of the whole training state and its full shape, whoever holds it."""
        full = {(n, WEIGHT): s for n, s in self.shapes.items()}
        full |= {(n, k): s for k in self.moments for n, s in self.shapes.items() if n in self.trainable}
        return full | {(n, BUFFER): s for n, s in self.buffer_shapes.items()}

    def kinds(self, name: str) -> tuple[str, ...]:
        """What there is of a parameter: its weight, and moments unless it is frozen."""
        return (WEIGHT, *self.moments) if name in self.trainable else (WEIGHT,)

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All pieces this rank holds; a replicated tensor appears whole on every rank."""

    def owned(self) -> Iterator[Piece]:
        """The pieces this rank answers for: over all ranks they cover every element exactly once."""
        return self.pieces()

    @abstractmethod
    def finish_load(self, optimizer_step: int) -> None:
        """Call after every piece's data was overwritten: refreshes what derives from it."""

    def warm_up(self, batch: Batch) -> None:
        """One throwaway step, the same at a fresh start and a resume; its effects are overwritten by loading.

        It creates the optimizer's moments, lets DDP settle its buckets (they are rebuilt after the first step, and
        another order of summation would show in the last bits after a resume) and fails early when out of memory.
        """
        self.train_step([batch] * self.options.micro_steps, lr=0.0)

    # -- what is running --------------------------------------------------------------------------------------

    @abstractmethod
    def verify(self) -> str:
        """Asserts that the strategy asked for is the one running and says so in a few words, from what it found."""


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return ((n, b) for n, b in model.named_buffers() if n in saved)


def widen_scalars(model: nn.Module) -> None:
    """Gives 0-d parameters the shape (1,), in place: neither FSDP2 nor DeepSpeed takes them, and they broadcast alike.

    Checkpoints keep their own shape, ().
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim == 0:
                setattr(module, name, nn.Parameter(p.detach().reshape(1), p.requires_grad))


def split_evenly(piece: Piece, part: int, parts: int) -> Piece:
    """Part `part` of `parts` of a piece, by elements."""
    n = piece.data.numel()
    first, last = n * part // parts, n * (part + 1) // parts
    return Piece(piece.name, piece.kind, piece.offset + first, piece.data[first:last])


def check_share(strategy: str, world: World, local: int, total: int, ranks: int) -> None:
    """Raises RuntimeError where this rank holds far more than its part of what `ranks` of them should share."""
    if ranks > 1 and local > 0.75 * total + 4096:
        raise RuntimeError(f"strategy {strategy}, but rank {world.rank} holds {local:,} of {total:,} parameters")


def row_offset(shape: tuple[int, ...], first_row: int) -> int:
    """Flat offset of a tensor's row `first_row` (dim 0)."""
    return first_row * prod(shape[1:])


def make_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    options: EngineOptions,
    world: World,
) -> TrainEngine:
    """The engine of `options.strategy`. Raises UserError where its library cannot be imported."""
    prepare_blocks(model, options.activation_checkpointing, options.compile)
    module, _, name = STRATEGIES[options.strategy].partition(":")
    try:
        engine_class = getattr(importlib.import_module(module), name)
    except ImportError as e:
        raise UserError(
            f"train.strategy={options.strategy} cannot start here ({e}); "
            "choose train.strategy=fsdp or ddp, which need no DeepSpeed"
        ) from e
    engine = engine_class(model, groups, loss_fn, options, world)
    world.set_timeouts()
    return engine
