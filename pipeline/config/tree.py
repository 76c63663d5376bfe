"""The shape of a configuration: one dataclass a section, and the flat table of its dotted keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING


@dataclass
class RunConfig:
    """`init_from`: a run or checkpoint folder whose weights a new run begins with."""

    name: str = "mixer"
    dir: str = "runs/${run.name}"
    seed: int = 0
    init_from: str | None = None
    init_head: str = "keep"  # zero: a new head, for other classes
    init_ema: bool = False  # its averaged weights
    init_optimizer: bool = False  # moments too: for a cool-down, or to go on with other data


@dataclass
class ModelConfig:
    """`name` is a variant of `pipeline.model`; what is None below it takes the variant's own value."""

    name: str = "mixer_b16"
    image_size: int = 224
    in_chans: int = 3
    num_classes: int | None = None  # None: as many as the data set has
    drop_path_rate: float = 0.0
    drop_rate: float = 0.0  # dropout, of timm/ models
    patch_size: int | None = None
    hidden_dim: int | None = None
    num_blocks: int | None = None
    tokens_mlp_dim: int | None = None
    channels_mlp_dim: int | None = None

    def overrides(self) -> dict[str, Any]:
        """What `create_model` takes beside name, classes and image size."""
        taken = ("name", "image_size", "num_classes")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in taken}


@dataclass
class DataConfig:
    train: Any = MISSING  # a data set's folder, `synthetic`, or a mixture: a list of {path, weight}
    subset: str | None = None  # "10%" of each set, by the hash of the samples' keys: 3% lies inside 10%; None: all
    val: str | None = None  # None: the val split of `train` (of its first set with one); a folder; or `none`
    num_workers: int = 4
    scaled_decode: bool = False  # JPEGs whose crop is twice the model's size and more: decoded at 1/2, 1/4 or 1/8
    region_decode: bool = False  # of a JPEG only what its crop shows: the same pixels; needs the extra `region`
    max_bad_fraction: float = 1e-4
    corrupt_shards: str = "fail"  # a shard that is missing or not the indexed one; mask: its samples get weight 0
    stream_samples: int | None = None  # what counts as an epoch where `train` names tars without an index
    allow_pipe: bool = False  # may `train` be a pipe: or a URL of tars? webdataset runs a shell for both
    read: str = "auto"  # pread: local files, sample by sample; chunk: network file systems and URLs, through the cache
    cache_dir: str | None = None  # of what `chunk` reads, on a disk of the node; None: TMPDIR
    cache_size: str | None = None  # hard limit, such as 400GiB; None: half of what is free; 0: no cache
    read_timeout: str = "5 min"  # how long a store may be out of reach before the run saves and ends
    storage_options: dict[str, Any] = field(default_factory=dict)  # of fsspec, for URLs: endpoint_url, profile, ...
    chunk: int = 16
    window: int = 64
    lanes: int | None = None  # None: train.global_batch_size


@dataclass
class AugmentConfig:
    crop: str = "inception"
    scale: list[float] = field(default_factory=lambda: [0.05, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333])
    hflip: float = 0.5
    randaugment_magnitude: float | None = None  # None: no RandAugment; the paper's m is 10 to 20
    randaugment_layers: int = 2  # operations an image
    mixup_alpha: float = 0.0  # the paper's p; 0: no MixUp
    mixup_group: int | None = None  # slots that share one weight; None: train.global_batch_size
    permute: str = "none"  # patches or pixels: the same for all images, in evaluation too (paper, figure 4)
    permute_patch: int | None = None  # pixels of a permuted patch's side; None: the model's, 16 where it has none


@dataclass
class LossConfig:
    name: str = "softmax_xent"
    label_smoothing: float = 0.0
    head_bias: float = 0.0  # where the head's bias starts; -ln(classes) suits sigmoid_xent


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of adamw
    eps: float = 1e-8  # of adamw
    momentum: float = 0.9  # of sgd, which adds weight_decay to the gradient (adamw decouples it)
    weight_decay: float = 0.1
    clip_grad_norm: float | None = 1.0  # None: no clipping


@dataclass
class SchedulerConfig:
    name: str = "linear"
    warmup: str = "0 steps"
    end_factor: float = 1e-5  # of optimizer.lr, at the last step


@dataclass
class TrainConfig:
    duration: str = MISSING
    global_batch_size: int = 1024
    micro_batch_size: int | str = "auto"
    strategy: str = "auto"
    shard_size: int | None = None  # hsdp: ranks that share one copy of the state; None: those of a node
    reshard_after_forward: bool = True  # fsdp, hsdp: False keeps gathered weights until the backward pass
    offload: str = "none"  # optimizer: its state in host memory, updated there (fsdp, hsdp: the weights too)
    precision: str = "bf16"
    compile: str = "none"
    activation_checkpointing: str = "none"
    ema_decay: float | None = None
    deterministic: bool = False  # the same bits from run to run on a GPU too, at some cost; a CPU gives them anyhow


@dataclass
class EvalConfig:
    every: str | None = None  # None: only at the end
    batch_size: int | None = None  # per device; None: the micro-batch
    crop_fraction: float = 0.875  # of the resized image's shorter side; 1 keeps all of a square image
    resize: str = "short"  # the shorter side, keeping the aspect ratio; square: both sides
    method: str = "bilinear"  # antialiased; area: as big_vision evaluates
    fewshot: str | None = None  # a set with a train and a test split: the few-shot probe, at every evaluation
    fewshot_shots: list[int] = field(default_factory=lambda: [5])  # images of each class; the mean of three choices


@dataclass
class CheckpointConfig:
    every: str = "15 min"
    keep_last: int = 3
    best: str = "top1"  # the val metric whose best checkpoint is kept, and is `best` to other commands
    background: bool = True  # write beside training, from a copy in host memory
    dir: str | None = None  # None: checkpoints/ in the run folder; else a folder or URL (s3://bucket/run)
    mirror: str | None = None  # every checkpoint is copied here too: a folder or URL
    storage_options: dict[str, str] = field(default_factory=dict)  # of fsspec, for dir and mirror
    keep_every: str | None = None


@dataclass
class LoggingConfig:
    every: str = "50 steps"
    pictures_every: str | None = "30 min"  # of the weights, at the next save: from its files; None: never
    to: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
class HealthConfig:
    """What to do when training goes wrong without an error."""

    max_skipped: int = 5  # steps with a non-finite loss or gradient in a row; then back to the last checkpoint
    timeout: str = "30 min"  # without a step: the stacks are dumped, the processes end and are started again
    spike_factor: float | None = None  # a loss above this multiple of its running mean counts as such a step too


@dataclass
class LaunchConfig:
    """How many machines and processes, and what to do when they go away. `mixer launch slurm` sets most of it."""

    nproc: int | None = None  # processes a machine; None: one a device
    max_restarts: int = 3  # of processes that die, in a row, without a new checkpoint in between
    nodes: str = "1"  # or "6-8": as many as SLURM has, also after a requeue
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None  # None: all of them, and nobody else on the node
    time: str | None = None  # as SLURM takes it: "24:00:00", "2-12:00:00", "90" (minutes)
    signal_lead: int = 600  # seconds between the signal to save and the time limit: at least two steps and two saves
    requeue: str = "auto"  # auto | scontrol | resubmit | never: how a job that saved goes on
    max_requeues: int = 1000  # starts of the run's jobs since it was submitted
    preflight: bool = True  # check every node before the first step


@dataclass
class Config:
    """Everything a run is made from. Instances from `load_config` hold plain values, no interpolations."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


@functools.cache
def schema() -> dict[str, Any]:
    """Dotted leaf key -> its type, in the order of the tree."""
    schema: dict[str, Any] = {}
    for section, cls in get_type_hints(Config).items():
        for name, hint in get_type_hints(cls).items():
            schema[f"{section}.{name}"] = hint
    return schema


@functools.cache
def sections() -> tuple[str, ...]:
    return tuple(get_type_hints(Config))


def leaf_keys() -> list[str]:
    """All keys that hold a value, dotted, in the order of the tree."""
    return list(schema())


def get_value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); a plain type -> itself alone."""
    return get_args(hint) if get_origin(hint) in (Union, type(int | None)) else (hint,)
