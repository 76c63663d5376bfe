"""A trained model, wherever it lies: opened for evaluation, export, few-shot and fine-tuning; whole or sharded.

`TrainedModel.open` takes a run folder, what `mixer import` made, or one checkpoint of a run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.errors import UserError
from data_tools.manifest import DatasetManifest
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose
from pipeline.checkpoint.place import MANIFEST, checkpoint_root, committed_steps, is_local, place
from pipeline.config import Config, load_config, train_sets
from pipeline.data.augment import normalize
from pipeline.data.loader import Batch
from pipeline.model import create_model
from pipeline.parallel.engine import BUFFER, EMA, WEIGHT, widen_scalars
from pipeline.parallel.world import World

CLASSES = "classes.json"
SHARDED = ("fsdp", "hsdp", "zero3")


@dataclass(frozen=True)
class TrainedModel:
    """The configuration of the run and one of its checkpoints. `ema`: its averaged weights instead."""

    folder: Path
    config: Config
    reader: CheckpointReader
    ema: bool = False

    @staticmethod
    def open(where: str, which: str = "last", ema: bool = False, overrides: list[str] | None = None) -> TrainedModel:
        """`which` is last, best or step-N, unless `where` is a checkpoint itself.

        Raises:
            UserError: no run, no such checkpoint, a damaged one, or one without an average.
        """
        path, run, config = _find(where, overrides or [])
        folder = path if run is not path else choose(checkpoint_root(config), which)
        reader = CheckpointReader(folder)
        if damage := reader.damage(reader.manifest.files):
            raise UserError(f"{damage}; take another checkpoint (`--checkpoint step-N`)")
        if ema and not any(kind == EMA for _, kind in reader.manifest.tensors):
            raise UserError(
                f"{folder} holds no averaged weights: train with train.ema_decay=0.9999, or leave --ema out"
            )
        return TrainedModel(run, config, reader, ema)

    @property
    def kind(self) -> str:
        return EMA if self.ema else WEIGHT

    @property
    def name(self) -> str:
        return f"{self.reader.folder.name}{'-ema' if self.ema else ''}"

    @property
    def step(self) -> int:
        return self.reader.manifest.step

    @property
    def num_classes(self) -> int:
        """Rows of the classifier's weight."""
        return self.reader.shape(self._classifier(), self.kind)[0]

    def _classifier(self) -> str:
        network = self.network("meta", num_classes=1)
        return next(n for n, m in network.named_modules() if m is head_of(network)) + ".weight"

    def network(self, device: str | None, num_classes: int | None = None) -> Any:
        """A model of this kind, without these weights."""
        m = self.config.model
        classes = self.num_classes if num_classes is None else num_classes
        return create_model(m.name, classes, m.image_size, device=device, **m.overrides())

    def class_names(self) -> list[str] | None:
        """By class index, from what was imported or from the training set; None where neither says."""
        with suppress(OSError):
            return json.loads((self.folder / CLASSES).read_text())
        with suppress(UserError, OSError):
            return DatasetManifest.load(train_sets(self.config.data.train)[0].path).classes
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight and buffer, one at a time."""
        for name, kind in self.reader.manifest.tensors:
            if kind in (self.kind, BUFFER):
                yield name, self.reader.tensor(name, kind)

    def load(self, world: World, strategy: str = "ddp") -> Predictor:
        """The model on this rank's device; under fsdp, hsdp and zero3 sharded over all ranks by block (FSDP2)."""
        return Predictor(self, world, strategy in SHARDED and world.size > 1)


def newest_checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint; else the newest in it, or where its run's `checkpoint.dir` is.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).exists():
        return path
    root = path / "checkpoints" if (path / "checkpoints").exists() else path
    if not committed_steps(root) and is_local(path) and (path / "config.yaml").exists():
        root = checkpoint_root(load_config(str(path / "config.yaml"), [f"run.dir={path}"]).config)
    return choose(root, "last")


def run_config(where: str) -> Config:
    """The configuration of a run, of a checkpoint's run, or of imported weights. Raises UserError."""
    return _find(where, [])[2]


def _find(where: str, overrides: list[str]) -> tuple[Path, Path, Config]:
    """(what was given, the run folder, its configuration)."""
    path = place(where)
    run = path.parent.parent if (path / MANIFEST).exists() else path
    if not (run / "config.yaml").exists():
        problem = "it has no config.yaml" if path.exists() else "no such folder"
        raise UserError(
            f"{where} is not a run folder: {problem}. Give a run, a checkpoint, or what `mixer import` made"
        )
    return path, run, load_config(str(run / "config.yaml"), [f"run.dir={run}", *overrides]).config


class Predictor:
    """Logits and features of batches. Where the model is sharded, all ranks must call it equally often."""

    def __init__(self, trained: TrainedModel, world: World, sharded: bool):
        self.world, self.sharded = world, sharded
        self._bf16 = trained.config.train.precision == "bf16"
        self.model = trained.network("meta")
        if sharded:
            _shard(self.model, world, self._bf16)
        if any(t.is_meta for t in (*self.model.parameters(), *self.model.buffers())):
            self.model.to_empty(device=world.device)
        self.model.to(world.device).eval()
        self._fill(trained)

    @torch.no_grad()
    def _fill(self, trained: TrainedModel) -> None:
        reader, shapes = trained.reader, {}
        for name, p in self.model.named_parameters():
            shapes[name] = tuple(p.shape)
            there = reader.shape(name, trained.kind) if reader.has(name, trained.kind) else None
            if there is None or (there or (1,)) != (shapes[name] or (1,)):  # sharded, 0-d ones have shape (1,)
                raise UserError(
                    f"{reader.folder} is of another model: {name} is {list(shapes[name])} here and "
                    f"{'missing' if there is None else list(there)} there"
                )
            at, local = _local_part(p)
            local.copy_(reader.read(name, trained.kind, at, local.numel()).view(local.shape))
        for name, b in self.model.named_buffers():
            if reader.has(name, BUFFER):
                b.copy_(reader.tensor(name, BUFFER))

    def logits(self, batch: Batch) -> Tensor:
        """fp32 [m, K]."""
        return self(batch)[0]

    def features(self, batch: Batch) -> Tensor:
        """The input of the head, fp32 [m, C]: `pre_logits` in the authors' code."""
        return self(batch)[1]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits, features)."""
        images = normalize(batch.images.to(self.world.device, non_blocking=True))
        with (
            torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self._bf16),
            head_input(self.model) as seen,
        ):
            logits = self.model(images, None)
        return logits.float(), seen[0].float().flatten(1)  # the head of a BiT is a 1x1 convolution

    def images_per_second(self, batch: Batch, seconds: float = 1.0) -> float:
        """Of the forward pass alone on this rank: the batch again and again for about so long."""
        turns = 1
        while True:
            self(batch)
            self._wait()
            started = time.perf_counter()
            for _ in range(turns):
                self(batch)
            self._wait()
            elapsed = time.perf_counter() - started
            if max(self.world.gather(elapsed)) >= seconds / 2:  # all alike: a sharded model's forward is collective
                return turns * len(batch.images) / elapsed
            turns *= 2

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def head_of(model: nn.Module) -> nn.Module:
    """The last linear layer."""
    return model.get_classifier() if hasattr(model, "get_classifier") else model.head  # type: ignore[operator,return-value]


@contextmanager
def head_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """While a model runs, under whatever wrapper, the input of its head is noted: the features. model: unwrapped."""
    seen: list[Tensor] = []
    handle = head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def features_of(model: nn.Module, predict: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """From a way to logits (an engine's `predict`) to one to features, under any wrapper."""
    inner = getattr(model, "module", model)

    def features(batch: Batch) -> Tensor:
        with head_input(inner) as seen:
            predict(batch)
        return seen[0].float().flatten(1)

    return features


def _shard(model: Any, world: World, bf16: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    widen_scalars(model)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _local_part(p: Tensor) -> tuple[int, Tensor]:
    """(offset in the flattened whole, this rank's part) of a parameter."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from pipeline.parallel.engine import row_offset

    if not isinstance(p, DTensor):
        return 0, p.data
    shape = tuple(p.shape)
    _, offsets = compute_local_shape_and_global_offset(shape, p.device_mesh, p.placements)
    return row_offset(shape, offsets[0]), p.to_local()
