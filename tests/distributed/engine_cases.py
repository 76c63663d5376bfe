"""What the ranks of a `RankPool` are asked to do, and the plain single-process training they are compared with.

The problem is odd on purpose: no size is divisible by anything, some parameters have fewer elements than there are
ranks, 13 slots fall unevenly on the ranks and are padded to micro-batches of 3, weights form two groups (with and
without decay), some are frozen, one is 0-d, BatchNorm keeps statistics, and stochastic-depth masks enter the model.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.build import deterministic
from pipeline.checkpoint.layout import CheckpointReader, InitialState, StateSource, load_pieces
from pipeline.checkpoint.manager import CheckpointManager, Retention, step_folder
from pipeline.checkpoint.stager import BackgroundSaver
from pipeline.data.loader import Batch, Share
from pipeline.ema import WeightAverage
from pipeline.losses import make_loss
from pipeline.model import create_model
from pipeline.model.mixer import MlpMixer, init_parameter
from pipeline.optim import param_groups
from pipeline.parallel.engine import BUFFER, EMA, MOMENTS, WEIGHT, EngineOptions, Piece, TrainEngine, make_engine
from pipeline.parallel.world import World

with suppress(ImportError):  # only to have it imported once, in the server that the ranks are forked from
    import pipeline.parallel.zero3  # noqa: F401

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
BATCH, IMAGE, CLASSES, BLOCKS = 13, 15, 10, 2
SHAPE = {"patch_size": 5, "hidden_dim": 26, "num_blocks": BLOCKS, "tokens_mlp_dim": 3, "channels_mlp_dim": 17}
LR, WARMUP, TOTAL_STEPS, DECAY, CLIP = 3e-3, 2, 12, 0.1, 1.0
FROZEN = ("blocks.0.mlp_channels.fc2.weight", "blocks.1.norm1.bias")
EMA_DECAY = 0.9
SEED = 5
Key = tuple[str, str]


@dataclass(frozen=True)
class Spec:
    """How an engine of a case is made."""

    strategy: str
    precision: str = "fp32"
    micro_batch_size: int = 3
    clip: float = CLIP
    activation_checkpointing: str = "none"
    compile: str = "none"
    optimizer: str = "adamw"
    offload: str = "none"
    dropout: float = 0.0


# ------------------------------------------------------------------------------------------------ the problem


class OddMixer(MlpMixer):
    """A Mixer with a 0-d gain, and BatchNorm that watches the logits: its statistics move, the loss does not."""

    dropout: float
    gain: nn.Parameter
    watch: nn.BatchNorm1d

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        logits = super().forward(images, keep)
        self.watch(logits.detach().float())
        return nn.functional.dropout(logits * self.gain, self.dropout, self.training)


def build_model(device: str = "meta", dropout: float = 0.0) -> OddMixer:
    model: Any = create_model("mixer_s16", CLASSES, IMAGE, device=device, drop_path_rate=0.2, **SHAPE)
    model.__class__ = OddMixer
    model.dropout = dropout
    model.gain = nn.Parameter(torch.ones((), device=device))
    model.watch = nn.BatchNorm1d(CLASSES, affine=False, device=device)
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return model


def learning_rate(step: int) -> float:
    """Linear warm-up times linear decay, written out: what the trainer's schedule would give."""
    progress = min(max((step - WARMUP) / (TOTAL_STEPS - WARMUP), 0.0), 1.0)
    return LR * min(1.0, step / WARMUP) * (1 - progress)


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """images uint8 [B, 3, H, W], labels [B], keep-masks [B, 2L] of one step."""
    g = torch.Generator().manual_seed(1000 + step)
    images = torch.randint(0, 256, (BATCH, 3, IMAGE, IMAGE), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=g)
    keep = (torch.rand(BATCH, 2 * BLOCKS, generator=g) > 0.2).float()
    return images, labels, keep


def initial_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """As the product's, but a head that is not zero: then gradients reach every parameter from step 1 on."""
    if name == "gain":
        return torch.full((), 1.25)
    if name in BUFFERS:
        return BUFFERS[name]
    if name == "head.weight":
        return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.2
    return init_parameter(name, shape, SEED)


BUFFERS = {n: b.clone() for n, b in nn.BatchNorm1d(CLASSES, affine=False).named_buffers(prefix="watch")}


def canonical_state(optimizer: str = "adamw") -> dict[Key, Tensor]:
    """Made-up values for everything that a checkpoint holds, every element another one, all of plausible size."""
    shapes = {n: tuple(p.shape) for n, p in build_model().named_parameters()}
    g = torch.Generator().manual_seed(11)
    state: dict[Key, Tensor] = {}
    for name, shape in shapes.items():
        weight = initial_value(name, shape)
        state[name, WEIGHT] = weight + 0.01 * torch.randn(shape, generator=g)
        state[name, EMA] = weight + 0.01 * torch.randn(shape, generator=g)
        for kind in MOMENTS[optimizer] if name not in FROZEN else ():
            square = kind == "exp_avg_sq"
            state[name, kind] = (
                1e-6 * (0.5 + torch.rand(shape, generator=g)) if square else (1e-3 * torch.randn(shape, generator=g))
            )
    for name, start in BUFFERS.items():
        count = start.dtype == torch.int64
        state[name, BUFFER] = torch.tensor(2**40 + 3) if count else start + torch.rand(start.shape, generator=g)
    return state


class DictState:
    """A state source over whole tensors."""

    def __init__(self, tensors: dict[Key, Tensor]):
        self._flat = {key: t.reshape(-1) for key, t in tensors.items()}

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        return self._flat[name, kind][offset : offset + length]


# ------------------------------------------------------------------------------------------------ the reference


@dataclass
class Trained:
    """What a training gives back: loss and gradient norm a step, final tensors by (name, kind)."""

    losses: list[float]
    norms: list[float]
    tensors: dict[Key, Tensor]


def plain_training(
    steps: range, state: dict[Key, Tensor] | None = None, clip: float = CLIP, optimizer: str = "adamw"
) -> Trained:
    """The same training in plain torch: one process, no accumulation, no padding, torch's own optimizer."""
    model = build_model("cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name, WEIGHT] if state else initial_value(name, tuple(p.shape)))
    trained = {n: p for n, p in parameters.items() if n not in FROZEN}
    decayed = [p for n, p in trained.items() if p.ndim >= 2 and n.endswith("weight")]
    plain = [p for n, p in trained.items() if not (p.ndim >= 2 and n.endswith("weight"))]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    torch_optimizer: torch.optim.Optimizer
    if optimizer == "sgd":
        torch_optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, foreach=False)
    else:
        torch_optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    if state:
        for name, p in trained.items():
            torch_optimizer.state[p] = {
                "step": torch.tensor(float(steps.start)),
                **{k: state[name, k].clone() for k in MOMENTS[optimizer]},
            }
    losses, norms = [], []
    for step in steps:
        for group in torch_optimizer.param_groups:
            group["lr"] = learning_rate(step) * (10 if optimizer == "sgd" else 1)
        images, labels, keep = global_batch(step)
        loss = nn.functional.cross_entropy(model(images.float() / 127.5 - 1, keep), labels)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), clip or math.inf)))
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        losses.append(loss.item())
    tensors = {(n, WEIGHT): p.detach().clone() for n, p in parameters.items()}
    tensors |= {(n, k): torch_optimizer.state[p][k] for n, p in trained.items() for k in MOMENTS[optimizer]}
    return Trained(losses, norms, tensors)


# ------------------------------------------------------------------------------------------------ inside a rank


class Session:
    """One engine on this rank with its share of every batch, as `pipeline.build` and the trainer wire it."""

    def __init__(self, world: World, spec: Spec):
        self.world, self.spec = world, spec
        self.share = Share.of(world.rank, world.size, BATCH, spec.micro_batch_size)
        model = build_model(dropout=spec.dropout)
        options = EngineOptions(
            spec.strategy,
            spec.precision,
            BATCH,
            self.share.micro_batch_size,
            self.share.micro_steps,
            (0.9, 0.999),
            1e-8,
            spec.clip,
            spec.compile,
            spec.activation_checkpointing,
            spec.offload,
            max(1, world.size // 2),  # hsdp: two copies
            optimizer=spec.optimizer,
        )
        self.engine: TrainEngine = make_engine(
            model, param_groups(model, DECAY), make_loss("softmax_xent"), options, world
        )
        self.average = WeightAverage(self.engine, EMA_DECAY)
        m, size = self.share.micro_batch_size, IMAGE
        self.engine.warm_up(
            Batch(
                torch.zeros(m, 3, size, size, dtype=torch.uint8),
                torch.zeros(m, dtype=torch.long),
                torch.zeros(m),
                torch.ones(m, 2 * BLOCKS),
                torch.full((m,), -1),
                torch.zeros(m, dtype=torch.long),
                [],
            )
        )

    def load(self, source: StateSource | None, optimizer_step: int = 0) -> None:
        """None: a fresh start."""
        if source is None:
            source = InitialState(lambda n: initial_value(n, self.engine.shapes.get(n, ())))
        load_pieces(self.engine.pieces(), source)
        self.average.load(source, has=True)
        self.engine.finish_load(optimizer_step)

    def step(self, step: int) -> tuple[float, float]:
        """(loss, gradient norm) of optimizer step number `step`."""
        lr = learning_rate(step) * (10 if self.spec.optimizer == "sgd" else 1)
        stats, norm = self.engine.train_step(self.batches(step), lr, step)
        self.average.update()
        return self.world.sum([stats.loss.item()])[0] / BATCH, float(norm)

    def batches(self, step: int) -> list[Batch]:
        images, labels, keep = global_batch(step)
        share, m = self.share, self.share.micro_batch_size
        micro = []
        for i in range(share.micro_steps):
            slots = [share.first + i * m + j for j in range(m)]
            used = torch.tensor([float(s < share.last) for s in slots])
            at = torch.tensor([s if s < share.last else 0 for s in slots])
            blank = used[:, None, None, None].to(torch.uint8)
            micro.append(Batch(images[at] * blank, labels[at] * used.long(), used, keep[at], at, at, []))
        return micro

    def owned(self) -> Iterator[Piece]:
        yield from self.engine.owned()
        yield from self.average.pieces()

    def save(self, root: str | Path, step: int) -> str:
        """Saves and commits, returns the folder."""
        manager = CheckpointManager(Path(root), self.world, Retention(100))
        manager.save(
            step,
            self.engine.tensors() | self.average.tensors(),
            self.owned(),
            {"optimizer_step": step},
            metrics={},
            written_by={},
        )
        return str(step_folder(Path(root), step))

    def close(self) -> None:
        destroy = getattr(self.engine.model, "destroy", None)
        if destroy is not None:
            destroy()


@contextmanager
def session(world: World, spec: Spec) -> Iterator[Session]:
    linear = nn.functional.linear
    made = Session(world, spec)
    try:
        yield made
    finally:
        nn.functional.linear = linear  # DeepSpeed's zero3 leaves its own in place, for whatever comes afterwards
        made.close()
        del made
        gc.collect()


@dataclass
class Outcome:
    """What one rank reports of a case."""

    losses: list[float]
    norms: list[float]
    running: str = ""
    folder: str = ""


def train(world: World, spec: Spec, root: str | None, steps: int) -> Outcome:
    """From a fresh start; saved at the end where `root` is given."""
    with session(world, spec) as s:
        s.load(None)
        results = [s.step(t) for t in range(steps)]
        folder = s.save(root, steps) if root else ""
        return Outcome([r[0] for r in results], [r[1] for r in results], s.engine.verify(), folder)


def train_compiled(world: World, spec: Spec, root: str, steps: int) -> tuple[Outcome, int]:
    """As `train`; also how many graphs were compiled for it. What earlier cases compiled is forgotten first."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    outcome = train(world, spec, root, steps)
    return outcome, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def go_on(world: World, spec: Spec, source: str, root: str | None, steps: range) -> Outcome:
    """Loads a checkpoint into a new engine and takes the given steps; saved at the end where `root` is given."""
    with session(world, spec) as s:
        s.load(CheckpointReader(Path(source)), steps.start)
        results = [s.step(t) for t in steps]
        folder = s.save(root, steps.stop) if root else ""
        return Outcome([r[0] for r in results], [r[1] for r in results], s.engine.verify(), folder)


def interrupted(world: World, spec: Spec, root: str, at: int, steps: int) -> tuple[Outcome, Outcome]:
    """(undisturbed with a save in the middle, a new engine that goes on from there); both saved at the end."""
    with session(world, spec) as s:
        s.load(None)
        results = []
        for t in range(steps):
            if t == at:
                middle = s.save(root, at)
            results.append(s.step(t))
        whole = Outcome([r[0] for r in results], [r[1] for r in results], folder=s.save(f"{root}/whole", steps))
    return whole, go_on(world, spec, middle, f"{root}/resumed", range(at, steps))


def save_canonical(world: World, spec: Spec, root: str) -> str:
    """Puts the made-up state into the engine and saves it. Returns the folder."""
    with session(world, spec) as s:
        s.load(DictState(canonical_state(spec.optimizer)), 7)
        check_weights(s)
        return s.save(root, 7)


def save_beside_training(world: World, spec: Spec, root: str) -> tuple[str, bool]:
    """Saves the made-up state in the background while two steps change it. The folder; whether staging was pinned."""
    with session(world, spec) as s:
        s.load(DictState(canonical_state(spec.optimizer)), 7)
        saver = BackgroundSaver(CheckpointManager(Path(root), world, Retention(100)), world)
        saver.prepare(s.owned())
        tensors = s.engine.tensors() | s.average.tensors()
        saver.save(7, s.owned(), tensors=tensors, state={}, metrics={}, written_by={})
        for t in range(2):
            s.step(t)
        result = saver.wait()
        if result is None or result.error:
            raise AssertionError(result)
        return str(step_folder(Path(root), 7)), saver.staging_is_pinned


def train_twice(world: World, spec: Spec, root: str, steps: int) -> tuple[Outcome, Outcome]:
    """Two trainings from the same start with train.deterministic, both saved at the end."""
    deterministic(True)
    try:
        return train(world, spec, f"{root}/first", steps), train(world, spec, f"{root}/second", steps)
    finally:
        deterministic(False)


def copy_checkpoint(world: World, spec: Spec, source: str, root: str) -> str:
    """Loads a checkpoint and saves it again. Returns the folder."""
    with session(world, spec) as s:
        s.load(CheckpointReader(Path(source)), 7)
        check_weights(s)
        return s.save(root, 7)


def sick_step(world: World, spec: Spec, root: str, fault: str) -> tuple[str, str, tuple[int, int, int]]:
    """Two good steps, one that is sick on the last rank, one good. Folders around the sick one; updates counted."""
    with session(world, spec) as s:
        s.load(None)
        for t in range(2):
            s.step(t)
        before = s.save(f"{root}/before", 2)
        first, good = s.engine.optimizer_step, s.engine.loss_fn
        if world.rank == world.size - 1:
            # As a loss: not finite, though its derivative is; as a gradient: the other way round
            spoil = {"loss": lambda x: x + math.inf, "gradient": _NanGradient.apply}[fault]
            s.engine.loss_fn = lambda logits, labels: spoil(good(logits, labels))
        s.step(2)
        s.engine.loss_fn = good
        second = s.engine.optimizer_step
        after = s.save(f"{root}/after", 3)
        s.step(3)
        return before, after, (first, second, s.engine.optimizer_step)


def first_draws(world: World, spec: Spec) -> list[float]:
    """The first random number that each micro-step of two steps meets."""
    drawn: list[float] = []
    with session(world, spec) as s:
        s.load(None)
        s.engine.model.register_forward_pre_hook(lambda *_: drawn.append(float(torch.rand(()))))
        for t in range(2):
            s.step(t)
    return drawn


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * math.nan


def count_collectives(world: World, spec: Spec, micro_steps: int) -> dict[str, int]:
    """Collectives of one step of `micro_steps` micro-batches, by kind, as the profiler saw them."""
    with session(world, spec) as s:
        s.load(None)
        batches = s.batches(0)[:1] * micro_steps
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            s.engine.train_step(batches, 0.0)
        return {e.key: e.count for e in profile.key_averages() if e.key.startswith(("gloo:", "c10d::"))}


def group_timeouts(world: World, spec: Spec, root: str) -> set[float]:
    """Seconds after which the collectives of any group of this rank give up, with an engine and a saver at work."""
    with session(world, spec):
        BackgroundSaver(CheckpointManager(Path(root), world, Retention()), world)
        groups = list(dist.distributed_c10d._world.pg_map)
        return {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups}


def check_weights(s: Session) -> None:
    """The weights that the model computes with are the canonical ones, asked of the library, not of the pieces."""
    wanted = canonical_state(s.spec.optimizer)
    for name, whole in whole_weights(s.engine).items():
        if not torch.equal(whole.cpu().view(wanted[name, WEIGHT].shape), wanted[name, WEIGHT]):
            raise AssertionError(f"{name}: the model's own value is not what was loaded")


def whole_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """The model's whole weights by each library's own gathering."""
    parameters = getattr(engine, "_parameters", None) or dict(getattr(engine, "_raw").named_parameters())  # noqa: B009
    if engine.options.strategy in ("fsdp", "hsdp"):
        return {n: p.full_tensor().detach() for n, p in parameters.items()}
    if engine.options.strategy == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {n: p.detach().clone() for n, p in parameters.items()}
    return {n: p.detach() for n, p in parameters.items()}


def save_with_fault(world: World, spec: Spec, root: str, fault: str) -> str:
    """The last rank leaves a piece out, or writes one twice, or one that nobody knows. Returns save's error."""
    with session(world, spec) as s:
        s.load(DictState(canonical_state()), 7)
        pieces = list(s.owned())
        if world.rank == world.size - 1:
            at = next(i for i, p in enumerate(pieces) if p.data.numel() > 1 and p.kind == "exp_avg")
            piece = pieces[at]
            if fault == "missing":
                del pieces[at]
            elif fault == "twice":
                pieces.append(Piece(piece.name, piece.kind, piece.offset + 1, piece.data[1:]))
            elif fault == "unknown":
                pieces.append(Piece("nobody", WEIGHT, 0, torch.zeros(3)))
            elif fault == "disk":
                pieces.append(Piece("broken", WEIGHT, 0, torch.zeros(3, dtype=torch.complex64)))
        manager = CheckpointManager(Path(root), world, Retention())
        try:
            manager.save(7, s.engine.tensors() | s.average.tensors(), pieces, {}, metrics={}, written_by={})
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return "saved"


def evaluate_split(world: World, samples: int, batch_size: int, spec: Spec | None) -> dict[str, float]:
    """Evaluates the canonical weights over a synthetic split: under an engine, or as a plain model."""
    from pipeline.data.augment import EvalTransform, normalize
    from pipeline.data.loader import TrainSamples, eval_batches
    from pipeline.data.synthetic import SyntheticSource
    from pipeline.evaluate import evaluate

    source = SyntheticSource("val", image_size=IMAGE, num_classes=CLASSES, samples=samples)
    batches = eval_batches(
        TrainSamples(source, EvalTransform(IMAGE), channels=3, num_classes=CLASSES),
        rank=world.rank,
        world_size=world.size,
        batch_size=batch_size,
        num_workers=0,
    )
    loss_fn = make_loss("softmax_xent")
    if spec is not None:
        with session(world, spec) as s:
            s.load(DictState(canonical_state()), 7)
            return evaluate(s.engine.predict, batches, loss_fn, world).to_dict()
    model = build_model("cpu").eval()
    state = canonical_state()
    model.load_state_dict({n: t for (n, kind), t in state.items() if kind in (WEIGHT, BUFFER)})

    @torch.no_grad()
    def predict(batch: Batch) -> Tensor:
        return model(normalize(batch.images), None)

    return evaluate(predict, batches, loss_fn, world).to_dict()


def resident_bytes(world: World) -> int:
    """Memory that this rank alone occupies, after a collection."""
    gc.collect()
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[k].split()[0]) for k in ("Private_Clean", "Private_Dirty")) * 1024


def build_and_drop(world: World, spec: Spec, times: int) -> None:
    for _ in range(times):
        with session(world, spec) as s:
            s.load(None)
            s.step(0)


# ------------------------------------------------------------------------------------- for the pool's own tests


def answer(world: World, value: Any) -> Any:
    return world.rank, value, world.sum([1.0])[0]


def fail_on(world: World, rank: int) -> None:
    if world.rank == rank:
        raise ValueError(f"this is rank {rank} speaking")
    world.barrier()


def die_on(world: World, rank: int) -> None:
    import os

    if world.rank == rank:
        os.write(2, b"last words\n")
        os._exit(9)
    world.barrier()


def hang_on(world: World, rank: int) -> None:
    import time

    if world.rank == rank:
        time.sleep(60)
    world.barrier()


def read_whole(folder: str | Path) -> dict[Key, np.ndarray]:
    """Every tensor of a checkpoint, flat."""
    reader = CheckpointReader(Path(folder))
    return {(n, k): reader.tensor(n, k).reshape(-1).numpy() for n, k in reader.manifest.tensors}
