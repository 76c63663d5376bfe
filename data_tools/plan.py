"""What a plan is: which sample goes into which shard, at which place, under which key.

Everything here is a pure function of the listed corpus and the options: the same plan and the same digest on any
machine. `planner` makes plans of any size on disk out of these pieces, `plan_store` reads them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from data_tools import ustar
from data_tools.errors import UserError

PLAN_VERSION = 2  # part of the digest: raise it when the same corpus and options would give other bytes

Order = Literal["shuffled", "source"]


@dataclass(frozen=True)
class PlanOptions:
    """Everything that decides the shards' bytes. Sizes in bytes; `max_samples` 0 means no limit.

    - group_by: the column whose equal values stay in one split; None: every image for itself.
    - dedupe: `exact` keeps the first of images with the same bytes.
    - held_out: what identifies the data sets whose images are kept out.
    - resize: shorter side in pixels, 0 to keep; encode: `keep`, `jpeg:90`, `webp:80`.
    """

    val_fraction: float = 0.0
    shard_size: int = 256_000_000
    max_samples: int = 0
    order: Order = "shuffled"
    seed: int = 0
    verify: bool = True
    max_pixels: int = 100_000_000
    group_by: str | None = None
    dedupe: str = "off"
    held_out: str = ""
    resize: int = 0
    encode: str = "keep"


class PlannedSample(NamedTuple):
    """One sample of a slice. `key` names the tar members; `path` is its identity, as messages show it.

    `place` is the path of its file relative to its source's root, or of the container that holds it; `extra` the
    text of its `.json` member, empty for none. See `sources.rows.Codec` for offset, stored and codec.
    """

    key: str
    path: str
    size: int
    mtime_ns: int
    label: int
    extra: str = ""
    source: int = 0
    place: str = ""
    offset: int = 0
    stored: int = 0
    codec: int = 0


@dataclass(frozen=True)
class PlannedShard:
    """`bytes` is the tar's size when every image is good and kept as it is.

    Its samples begin at `row` of the plan's table `partition` and may go on in the next ones.
    """

    name: str
    split: str
    samples: int
    bytes: int
    partition: int = 0
    row: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """What identifies the corpus, and what became of it.

    - roots, prefixes: of each source, where its files lie and how many bytes of a sample's path name the source.
    - samples, bytes: those planned; listed: all that were found; duplicates and held_out: the difference.
    - digest covers paths, sizes, labels, splits and extra columns; mtimes the change times; ignored counts what the
      listing passed over, by reason; stamp is the state of sources that say it without being listed.
    """

    kind: str
    roots: tuple[str, ...]
    prefixes: tuple[int, ...]
    samples: int
    bytes: int
    listed: int
    duplicates: int
    held_out: int
    digest: str
    mtimes: str
    ignored: dict[str, int]
    stamp: str | None = None

    @property
    def root(self) -> str:
        """The root of the first source."""
        return self.roots[0]


@dataclass(frozen=True)
class ShardPlan:
    """The header of a plan; `digest` is what every finished shard carries."""

    corpus: CorpusSummary
    options: PlanOptions
    classes: list[str] | None
    shards: list[PlannedShard]
    digest: str
    version: int = PLAN_VERSION


# --- order and split ----------------------------------------------------------------------------------------


def order_hashes(paths: list[bytes], seed: int) -> np.ndarray:
    """64 bits of (seed, path) a sample, uint64 [n]: their order is the shuffled order."""
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(p + b"\0order", seed) for p in paths], np.uint64)


def in_val(values: list[bytes], fraction: float, seed: int) -> np.ndarray:
    """bool [n]: which samples (by path, or by group) go to split val.

    The split of a value depends on it and the seed alone: it stays when the corpus grows.
    """
    digest, threshold = xxhash.xxh3_64_intdigest, int(fraction * 2**64)
    return np.array([digest(v + b"\0split", seed) < threshold for v in values], np.bool_)


def split_names(explicit: list[str], options: PlanOptions) -> list[str]:
    """All splits, train first. Raises UserError where `val_fraction` meets a val split of the corpus' own."""
    named = sorted(set(explicit) - {"train"})
    if options.val_fraction and "val" in named:
        raise UserError("the corpus has a val split of its own; leave --val-fraction out")
    return ["train", *named, *(["val"] if options.val_fraction else [])]


def check_split(counts: dict[str, int], options: PlanOptions) -> None:
    """Raises UserError where `val_fraction` leaves train or val empty."""
    train, val = counts.get("train", 0), counts.get("val", 0)
    if options.val_fraction and not (train and val):
        raise UserError(
            f"--val-fraction {options.val_fraction:g} puts {val} of {sum(counts.values())} images into val and "
            f"{train} into train; choose another fraction"
        )


# --- shard boundaries ---------------------------------------------------------------------------------------


def tar_bytes(sizes: np.ndarray, labels: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """What each sample takes in a tar, int64 [n]: image, `.cls` with a label, `.json` with extra bytes."""
    sizes = sizes.astype(np.int64)
    cls = np.where(labels >= 0, 2 * ustar.BLOCK, 0)  # a class index always fits in a block
    member = ustar.BLOCK + sizes + -sizes % ustar.BLOCK
    return member + cls + np.where(extra > 0, ustar.BLOCK + extra + -extra % ustar.BLOCK, 0)


def cut(costs: np.ndarray, options: PlanOptions) -> np.ndarray:
    """Ends of consecutive shards of nearly equal size, int64: shard k holds samples ends[k-1]..ends[k].

    costs: tar bytes a sample, int64 [n]. No shard exceeds either limit unless it holds a single sample.
    """
    scale = 12  # bits: the count limit as a cost, exactly enough for limits up to a million samples
    capacity = (options.shard_size - len(ustar.END)) << scale
    least = capacity // options.max_samples if options.max_samples else 0
    total = np.maximum(costs << scale, least)
    largest = int(total.max(initial=0))
    np.cumsum(total, out=total)
    shards = max(1, -(-int(total[-1]) // capacity))
    for _ in range(64):
        ends = _even_ends(total, shards)
        sizes = np.diff(total[ends - 1], prepend=0)
        fullest = int(sizes.max())
        if fullest <= capacity:
            return ends
        if largest > capacity // 2:
            break
        shards = max(shards + 1, int(shards * (fullest / capacity)))
    return _greedy_ends(total, capacity)


def _even_ends(total: np.ndarray, shards: int) -> np.ndarray:
    """Cuts where the running total is nearest to k/shards of the whole; empty shards are left out."""
    step = total[-1] / shards
    targets = (np.arange(1, shards) * step).astype(np.int64)
    after = np.searchsorted(total, targets)
    before = np.maximum(after - 1, 0)
    ends = np.where(targets - total[before] < total[after] - targets, before, after) + 1
    return np.unique(np.append(ends, len(total)))


def _greedy_ends(total: np.ndarray, capacity: int) -> np.ndarray:
    """Each shard as full as the limit allows: for corpora with images of the size of a shard."""
    ends: list[int] = []
    at = 0
    while at < len(total):
        used = int(total[at - 1]) if at else 0
        at = max(at + 1, int(np.searchsorted(total, used + capacity, side="right")))
        ends.append(at)
    return np.array(ends, np.int64)


# --- digest -------------------------------------------------------------------------------------------------


def plan_digest(kind: str, corpus: str, options: PlanOptions, classes: list[str] | None, dropped: str) -> str:
    """Neither the corpus' place nor its change times enter: a copy elsewhere gives the same shards."""
    text = json.dumps([PLAN_VERSION, kind, corpus, asdict(options), classes, dropped], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
