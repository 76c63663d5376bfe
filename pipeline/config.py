"""The configuration of a run: its shape (a dataclass tree), how it is loaded, checked, shown and compared.

Values come from, later over earlier: the defaults below < a recipe (YAML) < the command line (`key=value`).
Loading is strict: an unknown key or a wrong type is a `UserError` with the full dotted key and the way out.
Imports no torch, so that `mixer --help` and `--print-config` stay quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.errors import UserError
from pipeline.duration import Duration

__all__ = [
    "AugmentConfig",
    "Change",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Duration",
    "EvalConfig",
    "HealthConfig",
    "LaunchConfig",
    "LoadedConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SchedulerConfig",
    "TrainConfig",
    "diff_configs",
    "find_recipe",
    "format_config",
    "leaf_keys",
    "list_recipes",
    "load_config",
    "resume_kind",
    "to_yaml",
    "validate",
]


# -------------------------------------------------------------------------------------------- the tree


@dataclass
class RunConfig:
    """`init_from`: a run or checkpoint folder whose weights a new run begins with."""

    name: str = "mixer"
    dir: str = "runs/${run.name}"
    seed: int = 0
    init_from: str | None = None
    init_optimizer: bool = False  # moments too: for a cool-down, or to go on with other data


@dataclass
class ModelConfig:
    """`name` is a variant of `pipeline.model`; what is None below it takes the variant's own value."""

    name: str = "mixer_b16"
    image_size: int = 224
    in_chans: int = 3
    num_classes: int | None = None  # None: as many as the data set has
    drop_path_rate: float = 0.0
    patch_size: int | None = None
    hidden_dim: int | None = None
    num_blocks: int | None = None
    tokens_mlp_dim: int | None = None
    channels_mlp_dim: int | None = None


@dataclass
class DataConfig:
    train: str = MISSING  # a data set's folder, or `synthetic`
    val: str | None = None  # None: the val split of `train`; a folder; or `none`
    num_workers: int = 4
    max_bad_fraction: float = 1e-4
    chunk: int = 16
    window: int = 64
    lanes: int | None = None  # None: train.global_batch_size


@dataclass
class AugmentConfig:
    crop: str = "inception"
    scale: list[float] = field(default_factory=lambda: [0.05, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333333])
    hflip: float = 0.5


@dataclass
class LossConfig:
    name: str = "softmax_xent"
    label_smoothing: float = 0.0
    head_bias: float = 0.0  # where the head's bias starts; -ln(classes) suits sigmoid_xent


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
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
    offload: str = "none"
    precision: str = "bf16"
    compile: str = "none"
    activation_checkpointing: str = "none"
    ema_decay: float | None = None


@dataclass
class EvalConfig:
    every: str | None = None  # None: only at the end
    batch_size: int | None = None  # per device; None: the micro-batch
    crop_fraction: float = 0.875  # of the resized image's shorter side; 1 keeps all of a square image


@dataclass
class CheckpointConfig:
    every: str = "15 min"
    keep_last: int = 3
    background: bool = True  # write beside training, from a copy in host memory
    dir: str | None = None  # None: checkpoints/ in the run folder; else a folder or URL (s3://bucket/run)
    mirror: str | None = None  # every checkpoint is copied here too: a folder or URL
    storage_options: dict[str, str] = field(default_factory=dict)  # of fsspec, for dir and mirror
    keep_every: str | None = None


@dataclass
class LoggingConfig:
    every: str = "50 steps"
    to: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
class HealthConfig:
    """What to do when training goes wrong without an error."""

    max_skipped: int = 5  # steps with a non-finite loss or gradient in a row; then back to the last checkpoint
    timeout: str = "30 min"  # without a step: the stacks are dumped, the processes end and are started again
    spike_factor: float | None = None  # a loss above this multiple of its running mean counts as such a step too


@dataclass
class LaunchConfig:
    nproc: int | None = None  # None: one process a device
    max_restarts: int = 3


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


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and, for every dotted key, "default", the recipe's file or "command line"."""

    config: Config
    origins: dict[str, str]


_CHOICES: dict[str, tuple[str, ...]] = {
    "augment.crop": ("inception", "resize"),
    "loss.name": ("softmax_xent", "sigmoid_xent"),
    "optimizer.name": ("adamw",),
    "scheduler.name": ("linear", "cosine", "constant"),
    "train.strategy": ("auto", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"),
    "train.precision": ("bf16", "fp32"),
    "train.compile": ("none", "block", "model"),
    "train.offload": ("none", "optimizer"),
    "train.activation_checkpointing": ("none", "block", "selective"),
    "logging.to": ("tensorboard", "wandb"),
}

_HOW_TO_SET = {
    "data.train": "data.train=FOLDER (what `mixer shard` wrote), or data.train=synthetic to run without data",
    "train.duration": 'train.duration="14 epochs" (or steps, or samples)',
}

Kind = Literal["free", "declared", "refused"]

# What a resumed run may change. `free`: takes effect. `declared`: alters what is being optimised; taken after
# `--allow KEY`, and recorded. `refused`: the weights or the sample order would no longer be those of the run.
# "section.*" speaks for the whole section; a full key overrules it.
_ON_RESUME: dict[str, Kind] = {
    "run.name": "free",
    "run.dir": "free",
    "run.seed": "refused",
    "run.init_from": "free",  # only a fresh start reads it
    "run.init_optimizer": "free",
    "model.*": "refused",
    # A data set that merely moved has another path and the same samples. So the path is free; whether the
    # samples are the run's own is for the manifest's digest to say, once the data set is opened.
    "data.train": "free",
    "data.val": "free",
    "data.num_workers": "free",
    "data.max_bad_fraction": "free",
    "data.chunk": "refused",
    "data.window": "refused",
    "data.lanes": "refused",
    "augment.*": "declared",
    "loss.*": "declared",
    "optimizer.name": "refused",
    "optimizer.lr": "free",
    "optimizer.clip_grad_norm": "free",
    "optimizer.betas": "declared",
    "optimizer.eps": "declared",
    "optimizer.weight_decay": "declared",
    "scheduler.*": "free",
    "train.duration": "free",
    "train.global_batch_size": "declared",
    "train.micro_batch_size": "free",
    "train.strategy": "free",
    "train.precision": "free",
    "train.shard_size": "free",
    "train.reshard_after_forward": "free",
    "train.offload": "free",
    "train.compile": "free",
    "train.activation_checkpointing": "free",
    "train.ema_decay": "declared",
    "eval.*": "free",
    "checkpoint.*": "free",
    "logging.*": "free",
    "health.*": "free",
    "launch.*": "free",
}


@functools.cache
def _schema() -> dict[str, Any]:
    """Dotted leaf key -> its type, in the order of the tree."""
    schema: dict[str, Any] = {}
    for section, cls in get_type_hints(Config).items():
        for name, hint in get_type_hints(cls).items():
            schema[f"{section}.{name}"] = hint
    return schema


@functools.cache
def _sections() -> tuple[str, ...]:
    return tuple(get_type_hints(Config))


def leaf_keys() -> list[str]:
    """All keys that hold a value, dotted, in the order of the tree."""
    return list(_schema())


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


# --------------------------------------------------------------------------------------------- recipes


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = importlib.resources.files("configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: an existing file, else the shipped recipe of that name. Raises UserError."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = list_recipes()
    name = name_or_path.removesuffix(".yaml")
    if name in names:
        # The package's files are always real ones: setuptools' wheels are unpacked.
        return Path(str(importlib.resources.files("configs") / f"{name}.yaml"))
    if path.is_dir():
        problem = f"{name_or_path}: is a folder, not a recipe"
        if (path / "config.yaml").is_file():
            problem += f"; for this run's configuration give {path / 'config.yaml'}"
    else:
        problem = f"{name_or_path}: no such file and no recipe of that name"
        near = difflib.get_close_matches(path.name.removesuffix(".yaml"), names, n=3, cutoff=0.4)
        if near:
            problem += f"; did you mean {' or '.join(near)}?"
    raise UserError(f"{problem}\nrecipes: {', '.join(names)}; or give the path of a YAML file")


# --------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class _Assignment:
    """One value for one leaf. `where` opens a message about it: "digits.yaml:12" or "command line"."""

    key: str
    value: Any
    origin: str
    where: str


def load_config(name_or_path: str | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Defaults < recipe < `key=value` overrides: typed, interpolations resolved, and checked by `validate`.

    `name_or_path` is a recipe's name or file (None: defaults only). Raises UserError.
    """
    assignments: list[_Assignment] = []
    if name_or_path is not None:
        assignments += _read_file(find_recipe(name_or_path))
    for override in overrides:
        assignments += _read_override(override)

    tree = OmegaConf.structured(Config)
    origins = dict.fromkeys(leaf_keys(), "default")
    wheres: dict[str, str] = {}
    for a in assignments:
        try:
            OmegaConf.update(tree, a.key, a.value)
        except OmegaConfBaseException as error:
            raise UserError(f"{a.where}: {_explain_value(a.key, a.value, error)}") from None
        origins[a.key], wheres[a.key] = a.origin, a.where

    written: Any = OmegaConf.to_container(tree, resolve=False)  # ${...} still as they stand
    _refuse_missing(k for k in _HOW_TO_SET if _lookup(written, k) == MISSING)
    for key in leaf_keys():
        try:
            value = _lookup(tree, key)
            if isinstance(value, ListConfig):
                OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, RecursionError) as error:
            where = wheres.get(key, "default")
            raise UserError(f"{where}: {_explain_interpolation(key, _lookup(written, key), error)}") from None
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    # From the environment a number arrives as text, and OmegaConf does not convert inside a union.
    if isinstance(config.train.micro_batch_size, str) and config.train.micro_batch_size.isdecimal():
        config.train.micro_batch_size = int(config.train.micro_batch_size)
    validate(config)
    return LoadedConfig(config, origins)


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return tree[section][name]


def _refuse_missing(keys: Iterable[str]) -> None:
    lines = [f"{k} has no value; set it with {_HOW_TO_SET.get(k, f'{k}=VALUE')}" for k in sorted(keys)]
    if lines:
        raise UserError("\n".join(lines))


def _read_file(path: Path) -> list[_Assignment]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        # OmegaConf's loader, not yaml's: it reads 1e-3 as a number and refuses a key given twice.
        raw = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        row = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {problem}{_yaml_hint(row)}") from None
    except OmegaConfBaseException as error:  # a malformed ${...} is already refused here
        key = getattr(error, "full_key", None) or ""
        line = _line_of(text, key)
        raise UserError(f"{path}{line}: {key}: {_first_line(error)} {_INTERPOLATION}") from None
    except OSError:  # OmegaConf's way of saying that the document is a bare number
        raw, root = None, None
    if not isinstance(raw, dict) or not (root is None or isinstance(root, yaml.MappingNode)):
        raise UserError(f"{path}: must hold sections of keys, such as `train: {{duration: 14 epochs}}`")
    nodes = _index(root) if root is not None else {}

    def where(key: str) -> str:
        return f"{path}:{nodes[key][0]}" if key in nodes else str(path)

    assignments: list[_Assignment] = []
    problems: list[str] = []
    for section, body in raw.items():
        section = str(section)
        if section not in _sections():
            problems.append(f"{where(section)}: {_explain_unknown(section)}")
        elif body is None:
            continue  # a section whose keys are all commented out
        elif not isinstance(body, dict):
            problems.append(f"{where(section)}: {_explain_section(section, body)}")
        else:
            for name, value in body.items():
                key = f"{section}.{name}"
                if key not in _schema():
                    problems.append(f"{where(key)}: {_explain_unknown(key)}")
                    continue
                if _is_text(key) and key in nodes:
                    value = _as_written(nodes[key][1], value)
                assignments.append(_Assignment(key, value, str(path), where(key)))
    if problems:
        raise UserError("\n".join(problems))
    return assignments


def _yaml_hint(row: str) -> str:
    """The two mistakes that YAML's own message does not lead to."""
    if "\t" in row:
        return "; indent with spaces, not tabs"
    return '; inside {...} and [...] write an interpolation in quotes: "${...}"' if "${" in row else ""


def _read_override(override: str) -> list[_Assignment]:
    where = "command line"
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals:
        known = key.lstrip("-") in _schema()
        hint = f"; write {key.lstrip('-')}=VALUE" if known else " (no spaces around =, quotes around spaces)"
        raise UserError(f"{where}: {override!r} is not of the form key=value{hint}")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        bare = key.lstrip("-+~")
        hint = f"; write {bare}={text}" if bare in _schema() else ", such as train.duration='14 epochs'"
        raise UserError(f"{where}: {key!r} is not a key; overrides are key=value{hint}")
    if key in _schema():
        if not text:
            raise UserError(f"{where}: {key}= has no value; write {key}=VALUE, or {key}=null for none")
        return [_Assignment(key, _parse_value(key, text), where, where)]
    if key in _sections():
        value = _parse_value(key, text)
        if not isinstance(value, dict):
            raise UserError(f"{where}: {_explain_section(key, value)}")
        unknown = [f"{key}.{name}" for name in value if f"{key}.{name}" not in _schema()]
        if unknown:
            raise UserError("\n".join(f"{where}: {_explain_unknown(k)}" for k in unknown))
        return [_Assignment(f"{key}.{name}", v, where, where) for name, v in value.items()]
    raise UserError(f"{where}: {_explain_unknown(key)}")


def _parse_value(key: str, text: str) -> Any:
    """The value of `key=text`, read as YAML; text keys keep what was typed (the shell has delimited it)."""
    try:
        if _is_text(key):
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            whole = isinstance(node, yaml.ScalarNode) and (node.style or node.tag == _NULL)
            return _as_written(node, text) if whole and node.end_mark.index == len(text) else text
        # One key around the value, so that OmegaConf's loader sees a document of the kind that it expects.
        document = "value: " + text
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(document)), resolve=False)
        assert isinstance(loaded, dict)
        return loaded["value"]
    except yaml.YAMLError as error:
        if _is_text(key):
            return text
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"command line: {key}={text}: {problem}{_yaml_hint(text)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"command line: {key}={text}: {_first_line(error)}") from None


_NULL = "tag:yaml.org,2002:null"


def _is_text(key: str) -> bool:
    """Whether the key holds text (or none): then no YAML rule may turn it into something else."""
    return str in _alternatives(_schema().get(key)) and int not in _alternatives(_schema().get(key))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """`int | None` -> (int, NoneType); a plain type -> itself alone."""
    return get_args(hint) if get_origin(hint) in (Union, type(int | None)) else (hint,)


def _as_written(node: yaml.Node | None, value: Any) -> Any:
    """A scalar's own characters: `off`, `007` and `12:30` are not what YAML 1.1 makes of them."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else node.value
    return value


def _index(root: yaml.Node) -> dict[str, tuple[int, yaml.Node]]:
    """Dotted key -> (line, value node), two levels deep; what comes in through `<<` is left out."""
    index: dict[str, tuple[int, yaml.Node]] = {}
    if isinstance(root, yaml.MappingNode):
        for name, body in root.value:
            index[str(name.value)] = (name.start_mark.line + 1, body)
            if isinstance(body, yaml.MappingNode):
                for sub, value in body.value:
                    index[f"{name.value}.{sub.value}"] = (sub.start_mark.line + 1, value)
    return index


def _line_of(text: str, key: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    index = _index(root) if root is not None else {}
    return f":{index[key][0]}" if key in index else ""


# ----------------------------------------------------------------------------------- what messages say


_INTERPOLATION = "(an interpolation is written ${section.key} or ${oc.env:NAME})"

# What people type first, where nothing in the spelling leads to the key.
_ALIASES = {"learning_rate": "optimizer.lr", "epochs": "train.duration", "steps": "train.duration"}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _explain_unknown(key: str) -> str:
    """What to say of a key that the tree does not have."""
    section, _, rest = key.partition(".")
    if key in _schema():  # right, but written with a dot inside a file
        return f"{key}: write it nested, {section}: {{{rest}: ...}}"
    parent = key.rpartition(".")[0]
    if parent in _schema():
        return f"{key}: no such key; {parent} is a single value, give it whole: {parent}={_example(parent)}"
    near = _nearest(key)
    if near:
        return f"{key}: no such key; did you mean {near}?"
    if section in _sections():
        names = [k.partition(".")[2] for k in _schema() if k.startswith(section + ".")]
        return f"{key}: no such key; {section} has {', '.join(names)}"
    return f"{key}: no such key; the sections are {', '.join(_sections())}"


def _nearest(key: str) -> str | None:
    """The key or keys most likely meant: a sibling, the same name in another section, or anything alike."""
    section, _, name = key.rpartition(".")
    if not section and (close := difflib.get_close_matches(name, _sections(), n=1)):
        return close[0]
    homes = [section] if section in _sections() else difflib.get_close_matches(section, _sections(), n=1)
    for home in homes:
        names = [k.partition(".")[2] for k in _schema() if k.startswith(home + ".")]
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
            return f"{home}.{close[0]}"
    if name in _ALIASES:
        return _ALIASES[name]
    names = {k: k.partition(".")[2] for k in _schema()}
    same = [k for k, n in names.items() if n == name or n.endswith("_" + name)]
    close = same or [k for k, n in names.items() if difflib.get_close_matches(name, [n], cutoff=0.75)]
    return " or ".join(close) if close else None


def _explain_section(section: str, value: Any) -> str:
    names = [k for k in _schema() if k.startswith(section + ".")]
    first = f"{section}.name" if f"{section}.name" in names else names[0]
    return f"{section} is a section and takes no value ({value!r}); set one of its keys, such as {first}"


def _expected(key: str) -> str:
    hint = _schema()[key]
    if key == "train.micro_batch_size":
        return "a whole number or auto"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        return {float: "a list of numbers", str: "a list of texts"}[item]
    return " or ".join(names[t] for t in _alternatives(hint))


def _example(key: str) -> str:
    """The key's default, as one types it."""
    return yaml.safe_dump(_get(Config(), key), default_flow_style=True).strip().replace(", ", ",")


def _explain_value(key: str, value: Any, error: Exception) -> str:
    """What to say of a value that OmegaConf did not take."""
    hint = _schema()[key]
    if isinstance(value, str) and "${" in value:
        return f"{key}: {_first_line(error)} {_INTERPOLATION}"
    message = f"{key}: expected {_expected(key)}, not {'null' if value is None else repr(value)}"
    if value in ("None", "none", "Null") and type(None) in _alternatives(hint):
        message += f"; for none write {key}=null"
    elif get_origin(hint) is list:
        message += f"; write for example {_example(key)}"
    elif isinstance(value, bool):
        message += " (YAML reads on, off, yes and no as true and false)"
    elif isinstance(value, float) and value.is_integer() and int in _alternatives(hint):
        message += f"; write {int(value)}"
    return message


def _explain_interpolation(key: str, value: Any, error: Exception) -> str:
    """What to say of a `${...}` that leads nowhere."""
    text = str(value)
    missing = re.search(r"Environment variable '([^']*)' not found", str(error))
    if missing:
        name = missing[1]
        return (
            f"{key}: {text!r} needs the environment variable {name}, which is not set; "
            f"export {name}=... or give {key}=VALUE"
        )
    unknown = re.search(r"Interpolation key '([^']*)' not found", str(error))
    if unknown:
        return f"{key}: {text!r}: {_explain_unknown(unknown[1])}"
    if isinstance(error, RecursionError) or "ecursi" in str(error):
        return f"{key}: {text!r} refers to itself"
    # An interpolation that gave a value of the wrong type, an unknown resolver, ...
    return f"{key}: {text!r} (expected {_expected(key)}): {_first_line(error)}"


# ------------------------------------------------------------------------------------------ validation


def validate(config: Config) -> None:
    """Check every value and how they fit together. Raises one UserError with a line for each problem."""
    _refuse_missing(key for key in _HOW_TO_SET if _get(config, key) == MISSING)
    problems = [*_choice_problems(config), *_range_problems(config)]
    if not problems:  # what fits together is only worth saying of values that make sense alone
        problems = [*_duration_problems(config), *_cross_problems(config)]
    if problems:
        raise UserError("\n".join(problems))


def _choice_problems(config: Config) -> Iterator[str]:
    for key, choices in _CHOICES.items():
        value = _get(config, key)
        for item in value if isinstance(value, list) else [value]:
            if item not in choices:
                near = difflib.get_close_matches(str(item).lower(), choices, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                yield f"{key}: {item!r} is not one of its choices. {hint}(choices: {', '.join(choices)})"
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
        "data.lanes": 1,
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "eval.batch_size": 1,
        "checkpoint.keep_last": 1,
        "launch.nproc": 1,
        "launch.max_restarts": 0,
        "train.shard_size": 1,
        "health.max_skipped": 1,
        "health.spike_factor": 1,
        "optimizer.weight_decay": 0,
    }
    for key, low in at_least.items():
        value = _get(config, key)
        if value is None or isinstance(value, str):
            continue
        if not (low <= value < math.inf):
            yield f"{key}: {value} must be at least {low}"
    if config.run.seed >= 2**63:
        yield f"run.seed: {config.run.seed} must be below 2**63"

    for key in ("optimizer.lr", "optimizer.eps", "optimizer.clip_grad_norm"):
        value = _get(config, key)
        if value is not None and not (0 < value < math.inf):
            off = "; write null for no clipping" if key == "optimizer.clip_grad_norm" else ""
            yield f"{key}: {value} must be above 0{off}"
    if not math.isfinite(config.loss.head_bias):
        yield f"loss.head_bias: {config.loss.head_bias} must be a finite number"
    for key in ("data.max_bad_fraction", "augment.hflip", "scheduler.end_factor"):
        if not (0 <= _get(config, key) <= 1):
            yield f"{key}: {_get(config, key)} must lie between 0 and 1"
    for key in ("model.drop_path_rate", "loss.label_smoothing"):
        if not (0 <= _get(config, key) < 1):
            yield f"{key}: {_get(config, key)} must be at least 0 and below 1"
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
    for key in ("run.name", "run.dir", "model.name", "data.train", "data.val"):
        if _get(config, key) == "":
            yield f"{key}: must not be empty"
    if config.data.val == "None":
        yield "data.val: None is read as a folder's name; write none (no evaluation) or null (the val split)"


_DURATIONS = (
    "scheduler.warmup",
    "train.duration",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep_every",
    "logging.every",
    "health.timeout",
)
_TIMES = ("checkpoint.every", "health.timeout")  # may be, and must be, a time; nothing else may depend on a clock


def _duration_problems(config: Config) -> Iterator[str]:
    """`checkpoint.every` alone may be a time (rank 0 decides); all else must not depend on a clock."""
    for key in _DURATIONS:
        text = _get(config, key)
        if text is None:
            continue
        try:
            duration = Duration.parse(text)
        except UserError as error:
            yield f"{key}: {error}"
            continue
        if duration.is_time and key not in _TIMES:
            yield f"{key}: '{text}' is a time (only checkpoint.every may be); write steps, epochs or samples"
        elif not duration.is_time and key == "health.timeout":
            yield f"{key}: '{text}' is not a time; write for example '30 min'"
        elif duration.value == 0 and key != "scheduler.warmup":
            off = "; write null for never" if type(None) in _alternatives(_schema()[key]) else ""
            yield f"{key}: '{text}' must be longer than nothing{off}"


def _cross_problems(config: Config) -> Iterator[str]:
    train, data = config.train, config.data
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
    if data.val == "none" and config.eval.every is not None:
        yield "eval.every is set but data.val is none: give data.val a data set, or write eval.every=null"
    if train.offload == "optimizer" and train.strategy not in ("fsdp", "hsdp"):
        yield (
            f"train.offload=optimizer is there for train.strategy=fsdp and hsdp, not for {train.strategy}; "
            "write none, or one of these strategies"
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


# ------------------------------------------------------------------------------- writing and comparing


_ONE_LINE = 10**6  # wider than any value: one key, one line


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same values."""
    tree = _escaped(dataclasses.asdict(config))
    return yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, allow_unicode=True, width=_ONE_LINE)


def _escaped(value: Any) -> Any:
    """Values are final here: a literal `${` must not become an interpolation when the file is read again."""
    if isinstance(value, Mapping):
        return {k: _escaped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_escaped(v) for v in value]
    if isinstance(value, str) and "${" in value:
        # OmegaConf reads backslashes in front of ${ in pairs, and only there.
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def format_config(loaded: LoadedConfig) -> str:
    """The configuration as YAML with the origin of every value as a comment: what `--print-config` prints."""
    rows: list[tuple[str, str]] = []
    section = ""
    for key in leaf_keys():
        head, name = key.split(".")
        if head != section:
            section = head
            rows.append((f"{head}:", ""))
        # In a list, so that text is quoted where a flow needs it and no document end follows.
        value = [_escaped(_get(loaded.config, key))]
        dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=_ONE_LINE).strip()
        rows.append((f"  {name}: {dumped[1:-1]}", loaded.origins[key]))
    # One long path should not push every comment off the screen.
    width = min(max(len(text) for text, _ in rows), 48)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows) + "\n"


@dataclass(frozen=True)
class Change:
    """One key that differs between two configurations, and what a resumed run does about it."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def resume_kind(key: str) -> Kind:
    """Whether a resumed run may change `key`. Raises KeyError for a key that is not in the table."""
    return _ON_RESUME[key] if key in _ON_RESUME else _ON_RESUME[key.partition(".")[0] + ".*"]


def diff_configs(old: Config, new: Config) -> list[Change]:
    """All keys whose values differ, in the order of the tree."""
    return [
        Change(key, _get(old, key), _get(new, key), resume_kind(key))
        for key in leaf_keys()
        if _get(old, key) != _get(new, key)
    ]
