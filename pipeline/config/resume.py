"""What a resumed run may change, and what differs between two configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.tree import Config, get_value, leaf_keys

Kind = Literal["free", "declared", "refused"]

# What a resumed run may change. `free`: where, how far and how fast (the same function, up to the order of fp32 sums),
# and the learning rate with its schedule, which are there to be turned. `declared`: alters what is optimised, the rule
# by which, or the arithmetic; taken after `--allow KEY`. `refused`: the weights or the sample order would no longer be
# those of the run. All changes are recorded.
# "section.*" speaks for the whole section; a full key overrules it.
_ON_RESUME: dict[str, Kind] = {
    "run.name": "free",
    "run.dir": "free",
    "run.seed": "refused",
    "run.init_from": "free",  # only a fresh start reads it
    "run.init_head": "free",
    "run.init_ema": "free",
    "run.init_optimizer": "free",
    "model.*": "refused",
    # A data set that merely moved has another path and the same samples. So the path is free; whether the
    # samples are the run's own is for the manifest's digest to say, once the data set is opened.
    "data.train": "free",
    "data.subset": "free",  # part of that digest
    "data.val": "free",
    "data.num_workers": "free",
    "data.max_bad_fraction": "free",
    "data.corrupt_shards": "free",
    "data.read": "free",
    "data.stream_samples": "refused",
    "data.allow_pipe": "free",
    "data.read_timeout": "free",
    "data.cache_dir": "free",
    "data.cache_size": "free",
    "data.storage_options": "free",
    "data.chunk": "refused",
    "data.window": "refused",
    "data.lanes": "refused",
    "data.scaled_decode": "declared",
    "data.region_decode": "declared",  # the same pixels, but not for a damaged image, nor beside scaled_decode
    "augment.*": "declared",
    "loss.*": "declared",
    "optimizer.name": "refused",
    "optimizer.lr": "free",
    "optimizer.clip_grad_norm": "declared",
    "optimizer.betas": "declared",
    "optimizer.eps": "declared",
    "optimizer.momentum": "declared",
    "optimizer.weight_decay": "declared",
    "scheduler.*": "free",
    "train.duration": "free",
    "train.global_batch_size": "declared",
    "train.micro_batch_size": "free",
    "train.strategy": "free",
    "train.precision": "declared",
    "train.shard_size": "free",
    "train.reshard_after_forward": "free",
    "train.offload": "free",
    "train.compile": "free",
    "train.activation_checkpointing": "free",
    "train.ema_decay": "declared",
    "train.deterministic": "free",
    "eval.*": "free",
    "checkpoint.*": "free",
    "logging.*": "free",
    "health.*": "free",
    "launch.*": "free",
}


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
        Change(key, get_value(old, key), get_value(new, key), resume_kind(key))
        for key in leaf_keys()
        if get_value(old, key) != get_value(new, key)
    ]
