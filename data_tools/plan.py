"""From a listed corpus to a plan: which sample goes into which shard, at which place, under which key.

Pure: the same corpus and options give the same plan and the same digest on any machine. A plan on disk is
`plan/plan.json` (this header, small) and `plan/samples.jsonl` (one line a sample, in tar order); each shard
knows its byte range there, so that a packing task reads its own slice and nothing else.
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
from data_tools.keys import member_keys, raw_path
from data_tools.sources import Corpus, Sample

PLAN_VERSION = 1  # part of the digest: raise it when the same corpus and options would give other bytes

Order = Literal["shuffled", "source"]


@dataclass(frozen=True)
class PlanOptions:
    """Everything that decides the shards' bytes. Sizes in bytes; `max_samples` 0 means no limit."""

    val_fraction: float = 0.0
    shard_size: int = 256_000_000
    max_samples: int = 0
    order: Order = "shuffled"
    seed: int = 0
    verify: bool = True
    max_pixels: int = 100_000_000


class PlannedSample(NamedTuple):
    """One line of `samples.jsonl`. `key` names the tar member, `path` is where the image lies."""

    key: str
    path: str
    size: int
    mtime_ns: int
    label: int


@dataclass(frozen=True)
class PlannedShard:
    """`bytes` is the tar's size when every image is good; `offset` and `length` the slice of
    samples.jsonl."""

    name: str
    split: str
    samples: int
    bytes: int
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class CorpusSummary:
    """What identifies the corpus. `digest` covers paths, sizes, labels and splits; `mtimes` the change times;
    `ignored` counts what the listing passed over, by reason."""

    kind: str
    root: str
    samples: int
    bytes: int
    digest: str
    mtimes: str
    ignored: dict[str, int]


@dataclass(frozen=True)
class ShardPlan:
    """The header of a plan; `digest` is what every finished shard carries."""

    corpus: CorpusSummary
    options: PlanOptions
    classes: list[str] | None
    shards: list[PlannedShard]
    digest: str
    version: int = PLAN_VERSION


def make_plan(corpus: Corpus, options: PlanOptions) -> tuple[ShardPlan, list[PlannedSample]]:
    """The plan and all its samples in tar order, shard after shard.

    Raises UserError where a split would be empty, where `val_fraction` meets an explicit val split, or where
    two samples would share a key.
    """
    names, owner = _splits(corpus.samples, options)
    keys = member_keys(corpus.samples)
    order = _order(corpus.samples, options)
    samples: list[PlannedSample] = []
    shards: list[PlannedShard] = []
    for number, split in enumerate(names):
        members = order[owner[order] == number]
        samples += (
            PlannedSample(keys[i], s.path, s.size, s.mtime_ns, s.label)
            for i in members.tolist()
            for s in (corpus.samples[i],)
        )
        shards += _cut(split, [corpus.samples[i] for i in members.tolist()], options)
    summary = _summary(corpus)
    digest = _digest(summary, options, corpus.classes)
    return ShardPlan(summary, options, corpus.classes, shards, digest), samples


# --- order and split ----------------------------------------------------------------------------------------


def _keyed_hash(path: str, purpose: bytes, seed: int) -> int:
    """64 bits of (seed, purpose, path): order and split are independent of each other and of other
    samples."""
    return xxhash.xxh3_64_intdigest(raw_path(path) + b"\0" + purpose, seed=seed)


def _order(samples: list[Sample], options: PlanOptions) -> np.ndarray:
    if options.order == "source":
        return np.arange(len(samples))
    hashes = (_keyed_hash(s.path, b"order", options.seed) for s in samples)
    return np.argsort(np.fromiter(hashes, np.uint64, len(samples)), kind="stable")


def _splits(samples: list[Sample], options: PlanOptions) -> tuple[list[str], np.ndarray]:
    """(split names, train first; number of the split of each sample).

    The split of a sample depends on its path and the seed alone: it stays when the corpus grows.
    """
    explicit = sorted({s.split or "train" for s in samples} - {"train"})
    if options.val_fraction and "val" in explicit:
        raise UserError("the corpus has a val split of its own; leave --val-fraction out")
    names = ["train", *explicit]
    if options.val_fraction:
        names.append("val")
    number = {name: i for i, name in enumerate(names)}
    owner = np.fromiter((number[s.split or "train"] for s in samples), np.int32, len(samples))
    if options.val_fraction:
        threshold = int(options.val_fraction * 2**64)
        hashes = (_keyed_hash(s.path, b"split", options.seed) < threshold for s in samples)
        owner[np.fromiter(hashes, np.bool_, len(samples)) & (owner == 0)] = number["val"]
    counts = np.bincount(owner, minlength=len(names))
    if options.val_fraction and not (counts[0] and counts[-1]):
        raise UserError(
            f"--val-fraction {options.val_fraction:g} puts {counts[-1]} of {len(samples)} images "
            f"into val and {counts[0]} into train; choose another fraction"
        )
    return [name for name, n in zip(names, counts) if n], _renumber(owner, counts)


def _renumber(owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Closes the gaps that splits without samples leave in the numbering."""
    return (np.cumsum(counts > 0) - 1)[owner]


def _cut(split: str, samples: list[Sample], options: PlanOptions) -> list[PlannedShard]:
    """Consecutive shards, each as full as both limits allow, with at least one sample."""
    shards: list[PlannedShard] = []

    def close(count: int, size: int) -> None:
        shards.append(PlannedShard(f"{split}-{len(shards):06d}.tar", split, count, size + len(ustar.END)))

    count = size = 0
    limit = options.shard_size - len(ustar.END)
    for sample in samples:
        more = ustar.member_bytes(sample.size)
        if sample.label >= 0:
            more += ustar.member_bytes(len(str(sample.label)))
        if count and (size + more > limit or count == options.max_samples):
            close(count, size)
            count = size = 0
        count += 1
        size += more
    close(count, size)
    return shards


# --- digests ------------------------------------------------------------------------------------------------


def _summary(corpus: Corpus) -> CorpusSummary:
    content, mtimes = xxhash.xxh3_128(), xxhash.xxh3_128()
    for s in corpus.samples:
        content.update(b"%b\0%d\0%d\0%b\n" % (raw_path(s.path), s.size, s.label, (s.split or "").encode()))
        mtimes.update(b"%d\n" % s.mtime_ns)
    total = sum(s.size for s in corpus.samples)
    return CorpusSummary(
        kind=corpus.kind,
        root=str(corpus.root),
        samples=len(corpus.samples),
        bytes=total,
        digest=content.hexdigest(),
        mtimes=mtimes.hexdigest(),
        ignored=dict(sorted(corpus.ignored.items())),
    )


def _digest(corpus: CorpusSummary, options: PlanOptions, classes: list[str] | None) -> str:
    """Neither the corpus' place nor its change times enter: a copy elsewhere gives the same shards."""
    text = json.dumps([PLAN_VERSION, corpus.kind, corpus.digest, asdict(options), classes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
