"""`mixer data reshard`: one or several finished sets become another one: merged, filtered, cut and split anew.

Byte ranges are copied, nothing is decoded. Which samples go where is planned from the indexes alone; every output
shard is then a task that can be killed and run again, and its bytes depend on the plan alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.finalize import SHEET_NAME, publish_manifest
from data_tools.index import key_hash
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo, index_name
from data_tools.output import Output, alone_in, explained
from data_tools.pack import PackedShard, marker_path
from data_tools.parallel import map_processes
from data_tools.range_copy import CopyTask, Piece, copy_shard, foreign_extents
from data_tools.stats import read_indexes
from data_tools.storage import write_atomic
from data_tools.stores import load_manifest, open_store
from data_tools.tasks import decode_marker
from data_tools.ustar import BLOCK, END

PLAN_NAME = "reshard.json"
# A chosen sample: `shard` counts over all sources, [start, end) are the bytes of its members there.
_ROW = np.dtype(
    [
        ("key", "<u8"),
        ("shard", "<u4"),
        ("row", "<u4"),
        ("start", "<u8"),
        ("end", "<u8"),
        ("label", "<i4"),
        ("split", "<u4"),
    ]
)


@dataclass(frozen=True)
class ReshardOptions:
    """What to make of `sources` (folders or URLs of finished sets) in `out`.

    - shard_size: bytes a tar may take; max_samples: samples a tar may hold, 0 for no limit.
    - order: `source` keeps it, set after set; `shuffled` mixes all, by hash of key and seed.
    - val_fraction: pool all splits and split anew, by hash of key and seed; None keeps the splits.
    - splits: take only these; classes: keep only these, numbered anew in this order; samples without a label, or
      with several, are left out.
    - subset: keep this fraction, by hash of the key: 3% is inside 10% is inside 30%.
    - min_side: pixels the shorter side needs; keys: keep only these; drop_keys: leave these out.
    - duplicates: what to do with a key that came before: `error`, `drop` or `rename`.
    """

    sources: tuple[str, ...]
    out: str
    shard_size: int = 256_000_000
    max_samples: int = 0
    order: str = "source"
    seed: int = 0
    val_fraction: float | None = None
    splits: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    subset: float = 1.0
    min_side: int = 0
    keys: tuple[str, ...] | None = None
    drop_keys: tuple[str, ...] = ()
    duplicates: str = "error"
    workers: int = 0
    storage_options: dict[str, Any] = field(default_factory=dict)
    work: Path | None = None

    def __post_init__(self) -> None:
        checks = [
            (bool(self.sources), "no source given"),
            (self.shard_size >= 10_000, f"shard_size {self.shard_size} bytes: too small, try 256MB"),
            (self.order in ("source", "shuffled"), f"order {self.order!r}: source or shuffled"),
            (0 < self.subset <= 1, f"subset {self.subset}: must be in (0, 1]"),
            (self.val_fraction is None or 0 <= self.val_fraction < 1, f"val_fraction {self.val_fraction}: in [0, 1)"),
            (self.duplicates in ("error", "drop", "rename"), f"duplicates {self.duplicates!r}: error, drop or rename"),
        ]
        for good, message in checks:
            if not good:
                raise UserError(message)


@dataclass(frozen=True)
class _Sources:
    """The opened sources: shard i of the concatenated list lies in set `owner[i]`."""

    manifests: list[DatasetManifest]
    shards: list[tuple[int, str, ShardInfo]]  # (set, split, shard)
    classes: list[str] | None
    relabel: list[dict[int, int] | None]  # per set: old class index -> new one; None keeps numbers


def reshard(options: ReshardOptions, report: Callable[[PackedShard], None] | None = None) -> DatasetManifest:
    """Writes the new set and returns its manifest; the same call goes on where it was stopped.

    Raises UserError: a source that is no finished set or is damaged, nothing left to write, a key twice (see
    `duplicates`), another set in `out`.
    """
    output = Output.at(options.out, options.storage_options, options.work)
    if any(Path(s).resolve() == output.folder.resolve() for s in options.sources):
        raise UserError(f"{options.out} is one of the sources; give another folder")
    with explained(output), alone_in(output):
        sources = _open(options)
        digest = _digest(options, sources)
        _refuse_other(output, digest)
        rows = _choose(options, sources, output)
        names = _split_names(options, sources)
        tasks = _cut(options, sources, rows, names, digest, output)
        write_atomic(output.plan_folder / PLAN_NAME, (json.dumps({"digest": digest}) + "\n").encode())
        if output.url is not None:
            output.store().write(f"plan/{PLAN_NAME}", (output.plan_folder / PLAN_NAME).read_bytes())
        packed = _run(tasks, digest, options.workers, output, report)
        splits: dict[str, list[ShardInfo]] = {}
        for shard in packed:
            splits.setdefault(shard.split, []).append(shard.info())
        source = {
            "kind": "reshard",
            "digest": digest,
            "samples": sum(m.samples(split) for m in sources.manifests for split in m.splits),
            "sets": [{split: m.split_digest(split) for split in m.splits} for m in sources.manifests],
        }
        return publish_manifest(output.store(), splits, sources.classes, source)


# --- sources ------------------------------------------------------------------------------------------------


def _open(options: ReshardOptions) -> _Sources:
    manifests = [load_manifest(open_store(s, options.storage_options)) for s in options.sources]
    shards: list[tuple[int, str, ShardInfo]] = []
    for number, manifest in enumerate(manifests):
        for split, infos in manifest.splits.items():
            if not options.splits or split in options.splits:
                shards += [(number, split, info) for info in infos]
    if not shards:
        there = sorted({s for m in manifests for s in m.splits})
        raise UserError(f"no split named {', '.join(options.splits)}; there are: {', '.join(there)}")
    classes, relabel = _merge_classes([m.classes for m in manifests], options.classes)
    return _Sources(manifests, shards, classes, relabel)


def _merge_classes(
    sets: list[list[str] | None], keep: tuple[str, ...]
) -> tuple[list[str] | None, list[dict[int, int] | None]]:
    """(class names of the result, old -> new numbers of each set). Equal lists stay; others are joined by name."""
    if keep:
        number = {name: i for i, name in enumerate(keep)}
        maps: list[dict[int, int] | None] = []
        for names in sets:
            known = names if names is not None else [str(i) for i in range(10**6)] if _all_digits(keep) else []
            maps.append({i: number[n] for i, n in enumerate(known) if n in number})
        unknown = [name for name in keep if not any(number[name] in (m or {}).values() for m in maps)]
        if unknown:
            raise UserError(f"no set has a class {unknown[0]!r}; see `mixer data inspect`")
        return list(keep), maps
    if all(s == sets[0] for s in sets):
        return sets[0], [None] * len(sets)
    if any(s is None for s in sets):
        raise UserError("some of the sets have class names and others only numbers: they cannot be merged")
    joined = list(dict.fromkeys(name for s in sets for name in s or ()))
    number = {name: i for i, name in enumerate(joined)}
    return joined, [{i: number[n] for i, n in enumerate(s or ())} for s in sets]


def _all_digits(names: tuple[str, ...]) -> bool:
    return all(n.isdecimal() for n in names)


def _digest(options: ReshardOptions, sources: _Sources) -> str:
    """Neither places nor workers enter: copies of the sets elsewhere give the same result."""
    raw = asdict(options)
    for name in ("sources", "out", "workers", "storage_options", "work"):
        del raw[name]
    sets = [[m.split_digest(s) for s in m.splits] for m in sources.manifests]
    return hashlib.sha256(json.dumps([2, raw, sets], sort_keys=True).encode()).hexdigest()[:32]


def _refuse_other(output: Output, digest: str) -> None:
    store = output.store()
    try:
        earlier = json.loads(store.read(f"plan/{PLAN_NAME}")).get("digest")
    except FileNotFoundError:
        earlier = None
    there = sorted(n for n in store.list() if n.endswith(".tar") or n == MANIFEST_NAME)
    if earlier != digest and (there or earlier is not None):
        raise UserError(
            f"{output.place} holds {'the result of another reshard' if earlier else there[0]}; delete it, or give "
            "another folder"
        )


# --- which samples, in which order --------------------------------------------------------------------------


def _mix(keys: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """64 bits of (key, purpose, seed): splitmix64, vectorised."""
    salt = np.uint64(xxhash.xxh3_64_intdigest(purpose.encode(), seed=seed))
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _choose(options: ReshardOptions, sources: _Sources, output: Output) -> np.ndarray:
    """The rows (dtype _ROW) of the chosen samples in their new order, split after split; 36 bytes a sample."""
    names = {name: i for i, name in enumerate(_split_names(options, sources))}
    wanted = None if options.keys is None else np.array([key_hash(k) for k in options.keys], np.uint64)
    unwanted = np.array([key_hash(k) for k in options.drop_keys], np.uint64)
    parts: list[np.ndarray] = []
    at = 0
    for number, place in enumerate(options.sources):
        mine = [(split, info) for n, split, info in sources.shards if n == number]
        store = open_store(place, options.storage_options)
        foreign = sources.manifests[number].source.get("kind") == "indexed"
        extents = foreign_extents(store, [i for _, i in mine], options.workers) if foreign else {}
        for (split, info), (_, rows) in zip(mine, read_indexes(store, [i for _, i in mine])):
            keep = _mask(options, rows, wanted, unwanted)
            part = np.zeros(len(rows), _ROW)
            part["key"], part["shard"], part["row"] = rows["key"], at, np.arange(len(rows))
            part["start"], part["end"] = extents.get(info.name) or _own_extents(rows, info)
            part["label"], keep = _relabel(rows["label"], sources.relabel[number], keep, bool(options.classes))
            part["split"] = 0 if options.val_fraction is not None else names[split]
            parts.append(part[keep])
            at += 1
    rows = np.concatenate(parts)
    rows = _without_twins(rows, options, sources)
    if options.val_fraction:
        rows["split"] = _mix(rows["key"], "split", options.seed) < np.uint64(int(options.val_fraction * 2**64))
    if not len(rows):
        raise UserError("no sample is left: see the filters and --subset")
    if options.order == "shuffled":
        rows = rows[np.argsort(_mix(rows["key"], "order", options.seed), kind="stable")]
    return rows[np.argsort(rows["split"], kind="stable")]


def _mask(options: ReshardOptions, rows: np.ndarray, wanted: np.ndarray | None, unwanted: np.ndarray) -> np.ndarray:
    keep = np.ones(len(rows), bool)
    if options.subset < 1:
        keep &= rows["key"] < np.uint64(int(options.subset * 2**64))
    if options.min_side:
        keep &= np.minimum(rows["width"], rows["height"]) >= options.min_side
    if wanted is not None:
        keep &= np.isin(rows["key"], wanted)
    return keep & ~np.isin(rows["key"], unwanted)


def _relabel(
    labels: np.ndarray, numbers: dict[int, int] | None, keep: np.ndarray, only: bool
) -> tuple[np.ndarray, np.ndarray]:
    if numbers is None:
        return labels, keep
    table = np.full(max([*numbers, int(labels.max(initial=0))]) + 2, -1, np.int32)
    table[list(numbers)] = list(numbers.values())
    new = np.where(labels >= 0, table[labels], -1).astype(np.int32)
    return new, keep & (new >= 0) if only else keep


def _own_extents(rows: np.ndarray, info: ShardInfo) -> tuple[np.ndarray, np.ndarray]:
    """Where each sample's members lie in a tar that this package wrote: the image first, up to the next image."""
    start = rows["offset"] - np.uint64(BLOCK)
    return start, np.append(start[1:], np.uint64(info.bytes - len(END)))


def _without_twins(rows: np.ndarray, options: ReshardOptions, sources: _Sources) -> np.ndarray:
    _, first = np.unique(rows["key"], return_index=True)
    twins = len(rows) - len(first)
    if not twins or options.duplicates == "rename":
        return rows
    if options.duplicates == "drop":
        return rows[np.sort(first)]
    late = np.setdiff1d(np.arange(len(rows)), first, assume_unique=True)[0]
    raise UserError(
        f"{twins:,} keys occur more than once (one is in {sources.shards[rows['shard'][late]][2].name}); "
        "--duplicates drop keeps the first of each, --duplicates rename keeps all"
    )


def _split_names(options: ReshardOptions, sources: _Sources) -> list[str]:
    if options.val_fraction is not None:
        return ["train", "val"]
    return list(dict.fromkeys(split for _, split, _ in sources.shards))


# --- output shards ------------------------------------------------------------------------------------------


def _cut(
    options: ReshardOptions, sources: _Sources, rows: np.ndarray, names: list[str], digest: str, output: Output
) -> list[CopyTask]:
    """Consecutive shards, each as full as both limits allow; `rows` are sorted by split."""
    twin = _count_twins(sources, rows)
    tasks: list[CopyTask] = []
    for number, split in enumerate(names):
        mine = np.flatnonzero(rows["split"] == number)
        sizes = (rows["end"][mine] - rows["start"][mine]).astype(np.int64)
        limit, count, begin, used = options.shard_size - len(END), 0, 0, 0
        cuts: list[tuple[int, int]] = []
        for i, size in enumerate(sizes.tolist()):
            if count and (used + size > limit or count == options.max_samples):
                cuts.append((begin, i))
                begin, count, used = i, 0, 0
            count, used = count + 1, used + size
        if len(mine):
            cuts.append((begin, len(mine)))
        for shard, (a, b) in enumerate(cuts):
            chosen = mine[a:b]
            pieces = _pieces(options, sources, rows[chosen])
            tasks.append(
                CopyTask(f"{split}-{shard:06d}.tar", split, digest, output, pieces, rows[chosen], twin[chosen])
            )
    return tasks


def _count_twins(sources: _Sources, rows: np.ndarray) -> np.ndarray:
    """For each row, 0 where its key is new; else the how-manieth repetition of the key in the row's own set it is."""
    _, first = np.unique(rows["key"], return_index=True)
    late = np.ones(len(rows), bool)
    late[first] = False
    seen: Counter[tuple[int, int]] = Counter()
    twin = np.zeros(len(rows), np.uint32)
    for i in np.flatnonzero(late).tolist():
        this = int(rows["key"][i]), sources.shards[rows["shard"][i]][0]
        seen[this] += 1
        twin[i] = seen[this]
    return twin


def _pieces(options: ReshardOptions, sources: _Sources, rows: np.ndarray) -> dict[int, Piece]:
    """Every source shard that these rows need."""
    pieces: dict[int, Piece] = {}
    for number in np.unique(rows["shard"]).tolist():
        owner, _, info = sources.shards[number]
        pieces[number] = Piece(options.sources[owner], info, owner, sources.relabel[owner])
    return pieces


def _run(
    tasks: list[CopyTask], digest: str, workers: int, output: Output, report: Callable[[PackedShard], None] | None
) -> list[PackedShard]:
    store = output.store()
    there, markers = store.list(), store.list("plan")
    done: dict[str, PackedShard] = {}
    for task in tasks:
        name = marker_path(Path(), task.name).name
        packed = decode_marker(store.read(f"plan/{name}")) if name in markers else None
        fits = packed and packed.digest == digest and there.get(task.name) == packed.bytes
        if packed and fits and index_name(task.name) in there:
            done[task.name] = packed
            if report is not None:
                report(packed)
    missing = [t for t in tasks if t.name not in done]
    if missing and SHEET_NAME in there:
        store.delete([SHEET_NAME, MANIFEST_NAME])
    for packed in map_processes(copy_shard, missing, workers):
        done[packed.name] = packed
        if report is not None:
            report(packed)
    return [done[t.name] for t in tasks]
