"""From a `Config` to the parts of a training: data, model, engine, checkpoints. The only place that wires them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.errors import UserError
from pipeline.checkpoint.layout import MANIFEST, CheckpointReader, InitialState, load_pieces
from pipeline.checkpoint.manager import CheckpointManager, Retention, choose
from pipeline.checkpoint.place import checkpoint_root, place
from pipeline.config import Config, train_sets
from pipeline.config.sets import parse_share
from pipeline.data.augment import EvalTransform, TrainTransform
from pipeline.data.loader import PADDING, Batch, Share, TrainSamples
from pipeline.data.mixup import MixUp
from pipeline.data.node_cache import CachePlan, NodeCache
from pipeline.data.order import Order, rank_slots
from pipeline.data.pixel_order import pixel_order
from pipeline.data.randaugment import RandAugment
from pipeline.data.region import require_region_decoder
from pipeline.data.sets import TrainingData, open_data, unused_epoch
from pipeline.data.source import EVAL_SPLITS, Access, SampleSource, TarSource, open_source
from pipeline.data.store import is_network_mount, is_url
from pipeline.data.stream import StreamSource, is_stream
from pipeline.duration import Duration
from pipeline.ema import WeightAverage
from pipeline.fewshot import FewShot
from pipeline.losses import Loss, make_loss
from pipeline.micro_batch import find_micro_batch
from pipeline.model import create_model, initial_values, model_cost
from pipeline.model.flops import peak_flops
from pipeline.optim import param_groups
from pipeline.parallel.engine import EMA, EngineOptions, TrainEngine, make_engine
from pipeline.parallel.world import World
from pipeline.run import RunFolder
from pipeline.weights.begin import ForeignWeights, advice
from pipeline.weights.shape import mismatches

STATE_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two moments


@dataclass(frozen=True)
class Schedule:
    """Every duration of the configuration in steps (int); what is of the `float` kind, in seconds."""

    total_steps: int
    warmup_steps: int
    log_every: int
    eval_every: int | None
    save_every: int | float
    keep_every: int | None
    agree_every: int
    pictures_every: int | float | None = None

    @staticmethod
    def of(config: Config, epoch_size: int, step: int = 0, samples: int = 0, on_cpu: bool = True) -> Schedule:
        """`step` and `samples` are those done so far. After a change of the batch size, what remains of a duration
        given in epochs or samples is counted in batches of the new size."""
        batch = config.train.global_batch_size

        def steps(text: str) -> int:
            return max(1, Duration.parse(text).to_steps(batch, epoch_size))

        duration = Duration.parse(config.train.duration)
        total = duration.to_steps(batch, epoch_size)
        if samples != step * batch and duration.unit != "steps":
            total = step + max(0, -(-(total * batch - samples) // batch))

        def steps_or_seconds(text: str) -> int | float:
            return Duration.parse(text).seconds() if Duration.parse(text).is_time else steps(text)

        pictures = config.logging.pictures_every
        return Schedule(
            total,
            Duration.parse(config.scheduler.warmup).to_steps(batch, epoch_size),
            steps(config.logging.every),
            steps(config.eval.every) if config.eval.every else None,
            steps_or_seconds(config.checkpoint.every),
            steps(config.checkpoint.keep_every) if config.checkpoint.keep_every else None,
            # Agreeing costs a round trip: nothing beside a CPU's step, something beside a GPU's
            1 if on_cpu else 10,
            steps_or_seconds(pictures) if pictures else None,
        )


@dataclass
class Parts:
    """What a `Trainer` works with."""

    config: Config
    world: World
    run: RunFolder
    engine: TrainEngine
    average: WeightAverage
    data: TrainingData
    order: Order
    share: Share
    schedule: Schedule
    train_samples: TrainSamples
    val_samples: TrainSamples | None
    loss_fn: Loss
    checkpoints: CheckpointManager
    mixup: MixUp | None = None
    cache: CachePlan | None = None
    allow: set[str] = field(default_factory=set)
    train_flops: float = 0.0  # per image
    peak_flops: float | None = None
    patch_size: int | None = None
    fewshot: FewShot | None = None

    def blank_batch(self) -> Batch:
        """A micro-batch of padding alone, in the shape of a real one."""
        rates = self.train_samples.drop_rates
        return blank_batch(self.config, self.share.micro_batch_size, 0 if rates is None else len(rates))

    def open_cache(self) -> NodeCache | None:
        """From now on samples are looked for in the node's cache first, which the node's first rank fills."""
        return self.cache.open(self.order) if self.cache else None

    def load(self, reader: CheckpointReader | None) -> dict[str, Any]:
        """Overwrites the engine's state from a checkpoint, or with a fresh run's. Returns the checkpoint's state.

        Raises:
            UserError: the checkpoint is of another model, or its data is not `data.train`.
        """
        if reader is None and self.config.run.init_from:
            return self._load_foreign(self.config.run.init_from)
        if reader is None:
            m = self.config.model
            source = InitialState(
                initial_values(
                    m.name,
                    self.train_samples.num_classes,
                    m.image_size,
                    self.engine.shapes,
                    seed=self.config.run.seed,
                    head_bias=self.config.loss.head_bias,
                    **m.overrides(),
                )
            )
            load_pieces(self.engine.pieces(), source)
            self.average.load(source, has=True)
            self.engine.finish_load(0)
            return {}
        state = reader.state()
        if "order" not in state:
            raise UserError(f"{self.run.path} holds imported weights, no run to go on with: see `mixer finetune`")
        self._check_model(reader)
        mine, theirs = self.run.identity(), state.get("run_id")
        if mine and theirs and mine != theirs:
            raise UserError(
                f"{reader.folder} belongs to another run: choose another checkpoint.dir or mirror, or begin with its "
                f"weights (run.init_from). If it is this run's after all, write {theirs} into {self.run.path}/run_id"
            )
        load_pieces(self.engine.pieces(), reader)
        self.average.load(reader, has=any(kind == EMA for _, kind in reader.manifest.tensors))
        self.engine.finish_load(state["optimizer_step"])
        batch = self.config.train.global_batch_size
        stored = state["order"]
        if not self.data.matches(stored) and "data.train" in self.allow:
            self.order.state = replace(self.order.state, epoch=unused_epoch(stored))
        else:
            self.order = self.data.resume(stored, global_batch_size=batch, facts=self.run.data)
        self.schedule = Schedule.of(
            self.config, self.order.num_samples, state["step"], state["samples"], self.world.device.type == "cpu"
        )
        return state

    def _load_foreign(self, where: str) -> dict[str, Any]:
        """A new run from another run's weights: step 0, own order and schedule; moments only if asked for."""
        folder = place(where, self.config.checkpoint.storage_options)
        if not (folder / MANIFEST).exists():
            folder = choose(folder / "checkpoints" if (folder / "checkpoints").exists() else folder, "last")
        reader = CheckpointReader(folder)
        damage = reader.damage(reader.manifest.files[self.world.rank :: self.world.size])
        damage = next((d for d in self.world.gather(damage) if d), None)
        if damage:
            raise UserError(f"run.init_from: {damage}")
        c = self.config.run
        if c.init_optimizer:
            self._check_model(reader)
            load_pieces(self.engine.pieces(), reader)
            self.average.load(reader, has=any(kind == EMA for _, kind in reader.manifest.tensors))
            self.engine.finish_load(reader.state()["optimizer_step"])
            return {}
        source = ForeignWeights(
            reader,
            self.engine.shapes,
            patch_size=self.patch_size,
            new_head=c.init_head == "zero",
            head_bias=self.config.loss.head_bias,
            average=c.init_ema,
        )
        wrong = mismatches(source.shapes(), self.engine.shapes)
        if wrong:
            hints = advice(source, self.engine.shapes)
            raise UserError("\n".join([f"run.init_from: {folder} is of another model:", *wrong, *hints]))
        load_pieces(self.engine.pieces(), source)
        self.average.load(source, has=False)
        self.engine.finish_load(0)
        if source.tiles > 1 and self.world.is_main:
            print(f"token MLPs grown for {source.tiles}x{source.tiles} tiles (paper, appendix C)", flush=True)
        return {}

    def _check_model(self, reader: CheckpointReader) -> None:
        mine, stored = self.engine.tensors(), reader.manifest.tensors
        for (name, kind), shape in mine.items():
            if stored.get((name, kind)) != shape:
                there = list(stored[name, kind]) if (name, kind) in stored else "nothing"
                raise UserError(
                    f"{reader.folder} is of another model: {kind} of {name} is {list(shape)} here and "
                    f"{there} there. Take the run's own configuration ({self.run.config})"
                )

    def summary(self, running: str, step: int, previous: dict[str, Any] | None) -> str:
        """The first block of a training's output: what is run, on what, and from where it goes on."""
        c, share, world = self.config, self.share, self.world
        count = sum(torch.Size(s).numel() for s in self.engine.shapes.values())
        device = f"{world.size} x {torch.cuda.get_device_name() if world.device.type == 'cuda' else 'CPU process'}"
        start = "a fresh start"
        if previous is not None:
            start = (
                f"RESUMED from step {step}, written by {previous.get('strategy')} on "
                f"{previous.get('world_size')} ranks; now {c.train.strategy} on {world.size}"
            )
        val = f"; val: {sum(self.val_samples.source.shard_sizes):,} samples" if self.val_samples else "; no val split"
        rows = [
            (
                "model",
                f"{c.model.name}, {count / 1e6:.2f}M parameters, {c.model.image_size} px, "
                f"{self.train_samples.num_classes} classes, {c.train.precision}"
                + _elasticity(self.engine.buffer_shapes),
            ),
            ("strategy", running),
            ("devices", device),
            (
                "batch",
                f"{c.train.global_batch_size} = {share.micro_batch_size} x {world.size} ranks x "
                f"{share.micro_steps} accumulated" + _padding(share, world.size, c.train.global_batch_size),
            ),
            ("data", self.data.describe(self.schedule.total_steps * c.train.global_batch_size) + val),
            (
                "length",
                f"{self.schedule.total_steps:,} steps ({c.train.duration}), {self.order.steps_per_epoch:,} an epoch",
            ),
            ("run", f"{self.run.path}: {start}"),
        ]
        return "\n".join(f"{name:>9}  {text}" for name, text in rows)


def _elasticity(buffers: Iterable[str]) -> str:
    """BatchNorm computes with the statistics of a micro-batch: other ranks or micro-batches, another function."""
    norm = any(name.endswith("running_mean") for name in buffers)
    return "; BatchNorm: elastic in its data only" if norm else ""


def _padding(share: Share, ranks: int, batch: int) -> str:
    spare = share.micro_batch_size * share.micro_steps * ranks - batch
    return f" - {spare} of weight 0" if spare else ""


def build(config: Config, world: World, allow: set[str] | None = None) -> Parts:
    """Opens the data, makes model and engine. Loads no state yet. Raises UserError."""
    c = config
    deterministic(c.train.deterministic)
    run = RunFolder(c.run.dir, checkpoint_root(c))
    mirror = place(c.checkpoint.mirror, c.checkpoint.storage_options) if c.checkpoint.mirror else None

    def checks(path: str) -> bool:
        """One process looks at all shards: of the run where all nodes read the same ones, of each node where disks may
        be its own."""
        shared = is_url(path) or is_network_mount(Path(path))
        return world.is_main if shared else world.local_rank == 0

    if c.data.subset and not world.is_main:
        world.barrier()  # rank 0 chooses the samples, the others find its file
    data = open_training_data(c, run.data, checks)
    if c.data.subset and world.is_main:
        world.barrier()
    source = data.source
    classes = num_classes(config, source)
    val_source = open_val(config, source, checks)
    batch = c.train.global_batch_size
    if world.size > batch:
        raise UserError(
            f"{world.size} ranks, but train.global_batch_size={batch}: start at most {batch} processes, or "
            "raise the batch"
        )
    order = data.begin(
        seed=c.run.seed,
        global_batch_size=batch,
        lanes=c.data.lanes,
        chunk=c.data.chunk,
        window=c.data.window,
    )
    overrides = config.model.overrides()
    cost = model_cost(c.model.name, classes, c.model.image_size, **overrides)
    c.train.strategy = choose_strategy(c.train.strategy, cost.parameters, world, c.train.offload)
    model = create_model(c.model.name, classes, c.model.image_size, device="meta", **overrides)
    micro = c.train.micro_batch_size
    if isinstance(micro, str):
        known = replace(c, model=replace(c.model, num_classes=classes))
        largest = -(-batch // world.size)
        found = find_micro_batch(known, world, model, largest, cost.parameters * STATE_BYTES_PER_PARAMETER)
        micro = found.size
    share = Share.of(world.rank, world.size, batch, micro)
    train_samples = TrainSamples(
        source,
        train_transform(c),
        channels=c.model.in_chans,
        num_classes=classes,
        drop_rates=model.drop_rates(),
        seed=c.run.seed,
    )
    mix, cache = mixup(config), None
    if CachePlan.wanted(config, source):
        cache = CachePlan(
            config,
            order,
            source,
            node_slots(world, batch, mix),
            read_ahead=-(-c.data.num_workers * share.read_ahead(c.data.num_workers) // share.micro_steps) + 1,
            first_rank=world.rank - world.local_rank,
            local_rank=world.local_rank,
        )
    engine, average = build_engine(c, world, model, share)
    keep_every = c.checkpoint.keep_every
    steps = Duration.parse(keep_every).to_steps(batch, order.num_samples) if keep_every else None
    on_cpu = world.device.type == "cpu"
    return Parts(
        config,
        world,
        run,
        engine,
        average,
        data,
        order,
        share,
        Schedule.of(config, order.num_samples, on_cpu=on_cpu),
        train_samples,
        None if val_source is None else eval_samples(config, val_source, classes),
        engine.loss_fn,
        CheckpointManager(run.checkpoints, world, Retention(c.checkpoint.keep_last, steps), mirror=mirror),
        mix,
        cache,
        allow or set(),
        cost.training_flops,
        None if on_cpu else peak_flops(torch.cuda.get_device_name(), c.train.precision),
        patch_size(config),
        open_fewshot(config, val_source),
    )


def deterministic(wanted: bool) -> None:
    """The same bits from the same run, on a GPU too; an operation that cannot promise it raises an error."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] - slow, for bugs only


def build_engine(
    config: Config, world: World, model: torch.nn.Module, share: Share
) -> tuple[TrainEngine, WeightAverage]:
    """The engine of `train.strategy` around a model, and the average beside it. Holds no state yet."""
    c = config
    options = EngineOptions(
        c.train.strategy,
        c.train.precision,
        c.train.global_batch_size,
        share.micro_batch_size,
        share.micro_steps,
        (c.optimizer.betas[0], c.optimizer.betas[1]),
        c.optimizer.eps,
        c.optimizer.clip_grad_norm or 0.0,
        c.train.compile,
        c.train.activation_checkpointing,
        c.train.offload,
        c.train.shard_size or 0,
        c.train.reshard_after_forward,
        c.optimizer.name,
        c.optimizer.momentum,
        c.run.seed,
    )
    loss_fn = make_loss(c.loss.name, c.loss.label_smoothing)
    engine = make_engine(model, param_groups(model, c.optimizer.weight_decay), loss_fn, options, world)
    return engine, WeightAverage(engine, c.train.ema_decay)


def blank_batch(config: Config, size: int, drops: int) -> Batch:
    """`size` slots of padding in the shape of real ones; `drops`: columns of the stochastic-depth masks."""
    side, channels = config.model.image_size, config.model.in_chans
    return Batch(
        torch.zeros(size, channels, side, side, dtype=torch.uint8),
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(size),
        torch.ones(size, drops),
        torch.full((size,), PADDING),
        torch.zeros(size, dtype=torch.int64),
        [],
        *((torch.arange(size), torch.ones(size)) if config.augment.mixup_alpha else (torch.arange(0), torch.ones(0))),
    )


def node_slots(world: World, batch: int, mixup: MixUp | None) -> np.ndarray:
    """Slots of the global batch whose samples this node's ranks read: their own, and the partners of those."""
    first = world.rank - world.local_rank
    slots = np.arange(
        rank_slots(first, world.size, batch)[0], rank_slots(first + world.local_size - 1, world.size, batch)[1]
    )
    return slots if mixup is None else np.union1d(slots, mixup.partners(slots))


def train_transform(config: Config) -> TrainTransform:
    a = config.augment
    m = a.randaugment_magnitude
    if config.data.region_decode:
        require_region_decoder()
    return TrainTransform(
        config.model.image_size,
        config.run.seed,
        a.crop,
        (a.scale[0], a.scale[1]),
        (a.ratio[0], a.ratio[1]),
        a.hflip,
        None if m is None else RandAugment(a.randaugment_layers, m),
        permutation(config),
        config.data.scaled_decode,
        config.data.region_decode,
    )


def permutation(config: Config) -> np.ndarray | None:
    """Order of the pixels of every image; patches are the model's, or of 16 px where it has none (paper, figure 4)."""
    size, a = config.model.image_size, config.augment
    if a.permute == "none":
        return None
    return pixel_order(a.permute, size, a.permute_patch or patch_size(config) or 16, config.run.seed)


def mixup(config: Config) -> MixUp | None:
    a, batch = config.augment, config.train.global_batch_size
    return MixUp(a.mixup_alpha, a.mixup_group or batch, config.run.seed) if a.mixup_alpha else None


def open_training_data(
    config: Config, folder: Path | None = None, checks: Callable[[str], bool] = lambda path: True
) -> TrainingData:
    """data.train with data.subset. Raises UserError.

    `folder` keeps which samples are in the subset; `checks(path)`: whether to look at every shard's size.
    """
    data, model = config.data, config.model

    def open_set(path: str) -> SampleSource:
        if is_stream(path):
            return StreamSource(
                path,
                samples=data.stream_samples,
                seed=config.run.seed,
                num_classes=model.num_classes,
                allow_pipe=data.allow_pipe,
            )
        access = Access.of(config, checks(path))
        return open_source(path, "train", image_size=model.image_size, num_classes=model.num_classes, access=access)

    sets = [(s.path, s.weight) for s in train_sets(data.train)]
    fraction = parse_share(data.subset) if data.subset else None
    return open_data(sets, open_set, share=data.subset, fraction=fraction, folder=folder)


def patch_size(config: Config) -> int | None:
    """Pixels of a patch's side, for pictures of the token grid; None for models without patches."""
    from pipeline.model import variants

    name = config.model.name
    return variants.resolve(name, **config.model.overrides()).patch_size if name in variants.names() else None


def num_classes(config: Config, source: SampleSource) -> int:
    """model.num_classes, else the data set's own number. Raises UserError where neither says, or they differ."""
    known = len(source.classes) if source.classes else None
    asked = config.model.num_classes
    if asked is None:
        asked = known or getattr(source, "num_classes", None)
    if asked is None:
        raise UserError(f"{source.name} does not name its classes: set model.num_classes")
    if known and asked < known:
        raise UserError(f"model.num_classes={asked}, but {source.name} has {known} classes; leave it out or raise it")
    return asked


def open_val(
    config: Config, train: SampleSource, checks: Callable[[str], bool] = lambda path: True
) -> SampleSource | None:
    """The evaluation split: data.val, else that of data.train (of its first set that has one), else none.

    It is called val, validation or test. `checks(path)`: whether to look at every shard's size.
    """
    path = config.data.val
    if path == "none":
        return None
    if path is None:
        sources = getattr(train, "sources", [train])
        paths = [s.path for s in train_sets(config.data.train)]
        path = next((p for p, s in zip(paths, sources) if set(EVAL_SPLITS) & set(s.splits)), None)
        if path is None:
            return None
    source = open_source(
        path,
        *EVAL_SPLITS,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        access=Access.of(config, checks(path)),
    )
    if isinstance(source, TarSource):
        source.sequential = True
    return source


def open_fewshot(config: Config, val: SampleSource | None) -> FewShot | None:
    """The probe of eval.fewshot. Raises UserError where it has one split only, or the run evaluates nothing."""
    path, m = config.eval.fewshot, config.model
    if path is None:
        return None
    if val is None:
        raise UserError("eval.fewshot belongs to the evaluations, and this run has no val split: give it data.val")
    splits = (("train",), EVAL_SPLITS)
    access = Access.of(config)
    opened = (open_source(path, *s, image_size=m.image_size, num_classes=m.num_classes, access=access) for s in splits)
    return FewShot.of(
        *opened,
        image_size=m.image_size,
        channels=m.in_chans,
        order=permutation(config),
        shots=config.eval.fewshot_shots,
        batch_size=config.eval.batch_size or 64,
        num_workers=config.data.num_workers,
    )


def eval_samples(config: Config, source: SampleSource, classes: int) -> TrainSamples:
    e = config.eval
    transform = EvalTransform(config.model.image_size, e.crop_fraction, e.resize, e.method, permutation(config))
    return TrainSamples(source, transform, channels=config.model.in_chans, num_classes=classes)


def choose_strategy(asked: str, parameters: int, world: World, offload: str = "none") -> str:
    """`auto` is ddp while the training state takes at most half of the device, else fsdp; fsdp to offload it."""
    if asked != "auto":
        return asked
    if offload != "none":
        return "fsdp"
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
    return "ddp" if parameters * STATE_BYTES_PER_PARAMETER <= memory / 2 else "fsdp"
