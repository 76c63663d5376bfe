"""The configuration of a run: its shape (a dataclass tree), how it is loaded, checked, shown and compared.

Values come from, later over earlier: the defaults in `tree` < a recipe (YAML) < the command line (`key=value`).
Loading is strict: an unknown key or a wrong type is a `UserError` with the full dotted key and the way out.
Imports no torch, so that `mixer --help` and `--print-config` stay quick.

A new key: its field in `tree`, its kind in `resume`, its limits in `check`.
"""

from pipeline.config.check import validate
from pipeline.config.load import LoadedConfig, load_config
from pipeline.config.recipes import find_recipe, list_recipes
from pipeline.config.resume import Change, diff_configs, resume_kind
from pipeline.config.sets import TrainSet, train_sets
from pipeline.config.show import format_config, to_yaml
from pipeline.config.tree import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    HealthConfig,
    LaunchConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SchedulerConfig,
    TrainConfig,
    leaf_keys,
)
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
    "TrainSet",
    "diff_configs",
    "find_recipe",
    "format_config",
    "leaf_keys",
    "list_recipes",
    "load_config",
    "resume_kind",
    "to_yaml",
    "train_sets",
    "validate",
]
