"""Checks of values, alone and as they fit together: one line for each problem, saying what to change."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator

from omegaconf import MISSING

from data_tools.errors import UserError
from pipeline.config.sets import subset_problems, train_problems
from pipeline.config.tree import Config, alternatives, get_value, schema
from pipeline.duration import Duration
from pipeline.parallel.registry import STRATEGIES
from pipeline.sizes import parse_bytes

_CHOICES: dict[str, tuple[str, ...]] = {
    "run.init_head": ("keep", "zero"),
    "data.corrupt_shards": ("fail", "mask"),
    "data.read": ("auto", "pread", "chunk"),
    "augment.crop": ("inception", "resize"),
    "augment.permute": ("none", "patches", "pixels"),
    "eval.resize": ("short", "square"),
    "eval.method": ("bilinear", "area"),
    "loss.name": ("softmax_xent", "sigmoid_xent"),
    "optimizer.name": ("adamw", "sgd"),
    "scheduler.name": ("linear", "cosine", "constant"),
    "checkpoint.best": ("top1", "top5", "loss"),
    "train.strategy": ("auto", *STRATEGIES),
    "train.precision": ("bf16", "fp32"),
    "train.compile": ("none", "block", "model"),
    "train.offload": ("none", "optimizer"),
    "train.activation_checkpointing": ("none", "block", "selective"),
    "logging.to": ("tensorboard", "wandb"),
    "launch.requeue": ("auto", "scontrol", "resubmit", "never"),
}

_PATTERNS = (
    ("launch.nodes", r"[1-9]\d*(-[1-9]\d*)?", "8 or 6-8"),
    ("launch.time", r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE", '"24:00:00", "2-12:00:00" or "90" (minutes)'),
)

HOW_TO_SET = {
    "data.train": "data.train=FOLDER (what `mixer shard` wrote), or data.train=synthetic to run without data",
    "train.duration": 'train.duration="14 epochs" (or steps, or samples)',
}


def refuse_missing(keys: Iterable[str]) -> None:
    lines = [f"{k} has no value; set it with {HOW_TO_SET.get(k, f'{k}=VALUE')}" for k in sorted(keys)]
    if lines:
        raise UserError("\n".join(lines))


def validate(config: Config) -> None:
    """Check every value and how they fit together. Raises one UserError with a line for each problem."""
    refuse_missing(key for key in HOW_TO_SET if get_value(config, key) == MISSING)
    data = [*train_problems(config.data.train), *subset_problems(config.data.subset)]
    problems = [*_choice_problems(config), *_range_problems(config), *data]
    if not problems:  # what fits together is only worth saying of values that make sense alone
        problems = [*_duration_problems(config), *_cross_problems(config)]
    if problems:
        raise UserError("\n".join(problems))


def _choice_problems(config: Config) -> Iterator[str]:
    for key, choices in _CHOICES.items():
        value = get_value(config, key)
        for item in value if isinstance(value, list) else [value]:
            if item not in choices:
                near = difflib.get_close_matches(str(item).lower(), choices, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                yield f"{key}: {item!r} is not one of its choices. {hint}(choices: {', '.join(choices)})"
    for key, pattern, example in _PATTERNS:
        value = get_value(config, key)
        if value is not None and not re.fullmatch(pattern, value):
            yield f"{key}: {value!r} must look like {example}"
    low, _, high = config.launch.nodes.partition("-")
    if low.isdigit() and high.isdigit() and int(high) < int(low):
        yield f"launch.nodes: {config.launch.nodes!r} must be MIN-MAX, the smaller number first"
    micro = config.train.micro_batch_size
    if isinstance(micro, str) and micro != "auto":
        yield f"train.micro_batch_size: {micro!r} is neither a whole number nor auto"


def _range_problems(config: Config) -> Iterator[str]:
    at_least = {
        "run.seed": 0,
        "model.image_size": 1,
        "model.in_chans": 1,
        "model.num_classes": 1,
        "model.patch_size": 1,
        "model.hidden_dim": 1,
        "model.num_blocks": 1,
        "model.tokens_mlp_dim": 1,
        "model.channels_mlp_dim": 1,
        "data.num_workers": 0,
        "data.chunk": 1,
        "data.window": 1,
        "data.stream_samples": 1,
        "data.lanes": 1,
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "eval.batch_size": 1,
        "checkpoint.keep_last": 1,
        "launch.nproc": 1,
        "launch.max_restarts": 0,
        "launch.gpus_per_node": 0,
        "launch.cpus_per_node": 1,
        "launch.signal_lead": 1,
        "launch.max_requeues": 0,
        "train.shard_size": 1,
        "health.max_skipped": 1,
        "health.spike_factor": 1,
        "optimizer.weight_decay": 0,
        "augment.randaugment_magnitude": 0,
        "augment.randaugment_layers": 1,
        "augment.mixup_alpha": 0,
        "augment.permute_patch": 1,
        "augment.mixup_group": 1,
    }
    for key, low in at_least.items():
        value = get_value(config, key)
        if value is None or isinstance(value, str):
            continue
        if not (low <= value < math.inf):
            yield f"{key}: {value} must be at least {low}"
    if config.run.seed >= 2**63:
        yield f"run.seed: {config.run.seed} must be below 2**63"

    for key in ("optimizer.lr", "optimizer.eps", "optimizer.clip_grad_norm"):
        value = get_value(config, key)
        if value is not None and not (0 < value < math.inf):
            off = "; write null for no clipping" if key == "optimizer.clip_grad_norm" else ""
            yield f"{key}: {value} must be above 0{off}"
    if not math.isfinite(config.loss.head_bias):
        yield f"loss.head_bias: {config.loss.head_bias} must be a finite number"
    for key in ("data.max_bad_fraction", "augment.hflip", "scheduler.end_factor"):
        if not (0 <= get_value(config, key) <= 1):
            yield f"{key}: {get_value(config, key)} must lie between 0 and 1"
    for key in ("model.drop_path_rate", "model.drop_rate", "loss.label_smoothing", "optimizer.momentum"):
        if not (0 <= get_value(config, key) < 1):
            yield f"{key}: {get_value(config, key)} must be at least 0 and below 1"
    ema = config.train.ema_decay
    if ema is not None and not (0 < ema < 1):
        yield f"train.ema_decay: {ema} must lie strictly between 0 and 1; write null for no averaging"

    betas, scale, ratio = config.optimizer.betas, config.augment.scale, config.augment.ratio
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        yield f"optimizer.betas: {betas} must be two numbers, each at least 0 and below 1"
    if len(scale) != 2 or not (0 < scale[0] <= scale[1] <= 1):
        yield f"augment.scale: {scale} must be [low, high], shares of the area, with 0 < low <= high <= 1"
    if len(ratio) != 2 or not (0 < ratio[0] <= ratio[1] < math.inf):
        yield f"augment.ratio: {ratio} must be [low, high], widths over heights, with 0 < low <= high"
    for key in ("run.name", "run.dir", "model.name", "data.val"):
        if get_value(config, key) == "":
            yield f"{key}: must not be empty"
    if config.data.cache_size is not None:
        try:
            parse_bytes(config.data.cache_size)
        except UserError as error:
            yield f"data.cache_size: {error}"
    if config.data.val == "None":
        yield "data.val: None is read as a folder's name; write none (no evaluation) or null (the val split)"


_DURATIONS = (
    "scheduler.warmup",
    "train.duration",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep_every",
    "logging.every",
    "logging.pictures_every",
    "health.timeout",
    "data.read_timeout",
)
_LONGEST_READ = 1200  # s; the process group gives up after 1800
# May be, and must be, a time; nothing else may depend on a clock
_TIMES = ("checkpoint.every", "logging.pictures_every", "health.timeout", "data.read_timeout")


def _duration_problems(config: Config) -> Iterator[str]:
    """What rank 0 decides, saves and pictures, may depend on a clock; nothing else may."""
    for key in _DURATIONS:
        text = get_value(config, key)
        if text is None:
            continue
        try:
            duration = Duration.parse(text)
        except UserError as error:
            yield f"{key}: {error}"
            continue
        if duration.is_time and key not in _TIMES:
            free = "only checkpoint.every and logging.pictures_every may be"
            yield f"{key}: '{text}' is a time ({free}); write steps, epochs or samples"
        elif not duration.is_time and key in ("health.timeout", "data.read_timeout"):
            yield f"{key}: '{text}' is not a time; write for example '30 min'"
        elif key == "data.read_timeout" and duration.seconds() > _LONGEST_READ:
            yield f"{key}: '{text}' is longer than the {_LONGEST_READ} s for which other ranks can wait; shorten it"
        elif duration.value == 0 and key not in ("scheduler.warmup", "data.read_timeout"):
            off = "; write null for never" if type(None) in alternatives(schema()[key]) else ""
            yield f"{key}: '{text}' must be longer than nothing{off}"


def _cross_problems(config: Config) -> Iterator[str]:
    train, data = config.train, config.data
    if config.run.init_optimizer and (config.run.init_head != "keep" or config.run.init_ema):
        yield "run.init_optimizer takes the moments of the very same model: leave out run.init_head and run.init_ema"
    total = train.global_batch_size
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size > total:
        yield (
            f"train.micro_batch_size ({train.micro_batch_size}) is larger than train.global_batch_size "
            f"({total}); lower it to {total} or less, write auto, or raise train.global_batch_size"
        )
    if data.lanes is not None and total % data.lanes:
        divisors = [v for v in range(1, total + 1) if total % v == 0]
        near = min(divisors, key=lambda v: abs(v - (data.lanes or 0)))
        yield (
            f"data.lanes ({data.lanes}) does not divide train.global_batch_size ({total}); "
            f"write data.lanes={near}, or null for one lane a sample of the batch"
        )
    group = config.augment.mixup_group
    if group is not None and total % group:
        yield f"augment.mixup_group ({group}) does not divide train.global_batch_size ({total}); choose a divisor"
    if config.eval.fewshot is not None and train.compile == "model":
        yield "eval.fewshot looks into the model, which train.compile=model does not allow: write block, or null for it"
    if not config.eval.fewshot_shots or min(config.eval.fewshot_shots) < 1:
        yield f"eval.fewshot_shots: {config.eval.fewshot_shots} must be numbers of images, each at least 1"
    if data.val == "none" and config.eval.every is not None:
        yield "eval.every is set but data.val is none: give data.val a data set, or write eval.every=null"
    if train.offload == "optimizer" and train.strategy == "ddp":
        yield (
            "train.offload=optimizer is there for every train.strategy but ddp; write none, or fsdp, hsdp, zero1, "
            "zero2, zero3"
        )
    if train.strategy == "zero3" and train.activation_checkpointing == "selective":
        # Measured: DeepSpeed frees gathered weights that the kept GEMMs' gradients need; losses differ at step 3
        yield (
            "train.activation_checkpointing=selective gives wrong gradients under train.strategy=zero3; "
            "write block, or another strategy"
        )
    warmup, duration = _length(config.scheduler.warmup, total), _length(train.duration, total)
    if warmup and duration and warmup[1] == duration[1] and warmup[0] >= duration[0]:
        yield (
            f"scheduler.warmup ({config.scheduler.warmup}) is not shorter than train.duration "
            f"({train.duration}): the learning rate would never come down; shorten one or lengthen the other"
        )


def _length(text: str, global_batch_size: int) -> tuple[float, str] | None:
    """(amount, unit), samples told in steps so that more pairs compare; None where the text is at fault."""
    try:
        d = Duration.parse(text)
        return (float(d.value), "epochs") if d.unit == "epochs" else (d.to_steps(global_batch_size, 0), "steps")
    except UserError:  # already told by _duration_problems
        return None
