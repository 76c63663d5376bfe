"""From a `Config` to the `Parts` of a training: data, model, engine, checkpoints. The only place that wires them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_tools.errors import UserError
from pipeline.checkpoint.manager import CheckpointManager, Retention
from pipeline.checkpoint.place import checkpoint_root, place
from pipeline.config import Config
from pipeline.data.loader import Share, TrainSamples
from pipeline.data.mixup import MixUp
from pipeline.data.node_cache import CachePlan
from pipeline.data.order import rank_slots
from pipeline.data.store import is_network_mount, is_url
from pipeline.duration import Duration
from pipeline.ema import WeightAverage
from pipeline.inputs import (
    eval_samples,
    mixup,
    num_classes,
    open_fewshot,
    open_training_data,
    open_val,
    patch_size,
    train_transform,
)
from pipeline.losses import make_loss
from pipeline.micro_batch import find_micro_batch
from pipeline.model import create_model, model_cost
from pipeline.model.flops import peak_flops
from pipeline.optim import param_groups
from pipeline.parallel.engine import EngineOptions, TrainEngine, make_engine
from pipeline.parallel.world import World
from pipeline.parts import Parts, Schedule
from pipeline.run import RunFolder

STATE_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two moments


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


def node_slots(world: World, batch: int, mixup: MixUp | None) -> np.ndarray:
    """Slots of the global batch whose samples this node's ranks read: their own, and the partners of those."""
    first = world.rank - world.local_rank
    slots = np.arange(
        rank_slots(first, world.size, batch)[0], rank_slots(first + world.local_size - 1, world.size, batch)[1]
    )
    return slots if mixup is None else np.union1d(slots, mixup.partners(slots))
