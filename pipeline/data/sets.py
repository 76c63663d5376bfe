"""The training data of a run: one data set or several, each whole or a subset, and the order over them.

Joins what is stored (`source`, `subset`) with what is arithmetic (`order`, `mixture`), and says in what way data
differs from the data that a run was started with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pipeline.data.decode import Choose
from pipeline.data.mixture import MIXTURE_VERSION, MixedSet, MixtureOrder, quotas
from pipeline.data.order import ORDER_VERSION, Order, SampleOrder, changed_data
from pipeline.data.source import RawSample, SampleSource
from pipeline.data.subset import Subset


class JoinedSource:
    """Several sources as one: sample ids, and shards, count through them in order. Classes must agree.

    Raises:
        UserError: sets whose classes have other names.
    """

    def __init__(self, sources: Sequence[SampleSource]):
        self.sources = list(sources)
        self.name = " + ".join(s.name for s in sources)
        self.digest = "+".join(s.digest for s in sources)
        self.shard_sizes = [n for s in sources for n in s.shard_sizes]
        self.splits = list(dict.fromkeys(split for s in sources for split in s.splits))
        self.classes: list[str] | None = None
        for s in sources:
            if self.classes and s.classes and s.classes != self.classes:
                raise UserError(f"data.train: {s.name} has other classes than {sources[0].name}: {_differ(self, s)}")
            self.classes = self.classes or s.classes
        self._starts = np.cumsum([0, *(sum(s.shard_sizes) for s in sources)])

    @property
    def num_classes(self) -> int | None:
        return max((getattr(s, "num_classes", None) or 0 for s in self.sources), default=0) or None

    def read(self, sample_id: int, channels: int, choose: Choose | None = None) -> RawSample:
        i = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.sources[i].read(sample_id - int(self._starts[i]), channels, choose)

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        owner = np.searchsorted(self._starts, sample_ids, side="right") - 1
        crcs = np.empty(len(sample_ids), dtype=np.int64)
        for i in np.unique(owner):
            here = owner == i
            crcs[here] = self.sources[i].crc32(sample_ids[here] - self._starts[i])
        return crcs

    def labels(self) -> np.ndarray:
        return np.concatenate([s.labels() for s in self.sources])

    def sample_name(self, sample_id: int) -> str:
        i = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.sources[i].sample_name(sample_id - int(self._starts[i]))

    def keys(self, shard: int) -> np.ndarray:
        for s in self.sources:
            if shard < len(s.shard_sizes):
                return s.keys(shard)
            shard -= len(s.shard_sizes)
        raise IndexError(shard)


def _differ(a: Any, b: Any) -> str:
    if len(a.classes) != len(b.classes):
        return f"{len(b.classes)} instead of {len(a.classes)}"
    i = next(i for i, (x, y) in enumerate(zip(a.classes, b.classes)) if x != y)
    return f"number {i} is {b.classes[i]!r} instead of {a.classes[i]!r}"


@dataclass(frozen=True)
class DataSet:
    """One set as a run takes it: a share of what `source` holds, with a weight among others."""

    path: str
    source: SampleSource
    weight: float = 1.0
    share: str | None = None  # as in data.subset
    subset: Subset | None = None

    @property
    def digest(self) -> str:
        return self.subset.digest if self.subset else self.source.digest

    @property
    def shard_sizes(self) -> list[int]:
        return self.subset.shard_sizes if self.subset else self.source.shard_sizes

    @property
    def samples(self) -> int:
        return sum(self.shard_sizes)

    def facts(self) -> dict[str, Any]:
        """What is written down of a set, so that a later start can say how its data differs."""
        shards = getattr(self.source, "shards", [])
        return {
            "path": self.path,
            "name": self.source.name,
            "subset": self.share,
            "samples": self.samples,
            "shards": [[s.name, s.samples, s.bytes, s.index_hash] for s in shards],
        }


class TrainingData:
    """The sets that a run trains on: `source` reads their samples, `begin` and `resume` give the order over them."""

    def __init__(self, sets: Sequence[DataSet]):
        self.sets = list(sets)
        self.source: SampleSource = sets[0].source if len(sets) == 1 else JoinedSource([s.source for s in sets])

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.sets)

    def begin(
        self, *, seed: int, global_batch_size: int, lanes: int | None = None, chunk: int = 16, window: int = 64
    ) -> Order:
        """The order of a new run. Raises UserError where the data is too small, or a weight."""
        options: dict[str, Any] = {"seed": seed, "lanes": lanes, "chunk": chunk, "window": window}
        if len(self.sets) > 1:
            return MixtureOrder(self._mixed(), global_batch_size=global_batch_size, **options)
        s = self.sets[0]
        if not s.samples and s.share:
            raise UserError(f"data.subset={s.share}: none of {s.source.name} is in it; take a larger share")
        return SampleOrder(
            s.shard_sizes, manifest_sha=s.digest, global_batch_size=global_batch_size, select=s.subset, **options
        )

    def resume(self, stored: dict[str, Any], *, global_batch_size: int, facts: Path | None = None) -> Order:
        """The order at a stored state. `facts`: where `record` wrote of the run's data.

        Raises:
            UserError: another order version; other data (how it differs is said); a batch that does not fit.
        """
        if stored.get("version") not in (ORDER_VERSION, MIXTURE_VERSION):
            raise UserError(
                f"the checkpoint's sample order has version {stored.get('version')}, this release has "
                f"{ORDER_VERSION} and {MIXTURE_VERSION}; resume with the release that wrote it"
            )
        if not self.matches(stored):
            raise changed_data(self.difference(stored, facts))
        if len(self.sets) > 1:
            return MixtureOrder.resume(stored, self._mixed(), global_batch_size=global_batch_size)
        s = self.sets[0]
        return SampleOrder.resume(
            stored, s.shard_sizes, manifest_sha=s.digest, global_batch_size=global_batch_size, select=s.subset
        )

    def matches(self, stored: dict[str, Any]) -> bool:
        """Whether these are the samples, subsets and proportions of a stored order."""
        return _digests(stored) == [s.digest for s in self.sets] and _quotas(stored) == self._quotas(stored)

    def difference(self, stored: dict[str, Any], facts: Path | None = None) -> str:
        """In words; where nothing was written down of the former data, by its digest."""
        before = [_read_facts(facts, digest) for digest in _digests(stored)]
        if len(before) != len(self.sets):
            were = ", ".join(str(b.get("path", "?")) for b in before)
            return f"{len(self.sets)} set{'s' * (len(self.sets) > 1)}, was {len(before)} ({were})"
        words = []
        for s, digest, old in zip(self.sets, _digests(stored), before):
            if digest != s.digest:
                words.append(f"{s.path}: {_set_difference(old, s.facts(), digest, s.digest)}")
        if not words:
            then, now = _quotas(stored), self._quotas(stored)
            words = [f"shares of {now} of {sum(now)} slots, were {then}"]
        return "; ".join(words)

    def record(self, folder: Path) -> None:
        """Writes down, once, what each set is."""
        for s in self.sets:
            path = folder / f"{s.digest}.json"
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                temporary.write_text(json.dumps(s.facts(), separators=(",", ":")) + "\n")
                os.replace(temporary, path)

    def describe(self, samples: int) -> str:
        """For people: what a run of so many samples takes from where."""
        if len(self.sets) == 1:
            s = self.sets[0]
            part = f", {s.share} of them" if s.share else ""
            return f"{s.source.name}{part}, {s.samples:,} samples"
        total = sum(s.weight for s in self.sets)
        return "; ".join(
            f"{s.weight / total:.3g} of {s.source.name}{f' ({s.share})' if s.share else ''}, {s.samples:,} samples, "
            f"{samples * s.weight / total / s.samples:.3g} epochs"
            for s in self.sets
        )

    def _mixed(self) -> list[MixedSet]:
        return [
            MixedSet(s.path, s.weight, s.shard_sizes, s.digest, sum(s.source.shard_sizes), s.subset) for s in self.sets
        ]

    def _quotas(self, stored: dict[str, Any]) -> list[int]:
        return quotas([s.weight for s in self.sets], sum(_quotas(stored)))


def unused_epoch(stored: dict[str, Any]) -> int:
    """A number above every epoch that a stored order has begun: for other data to begin under, so that what stays of
    the data is not seen again in the same order and augmentation."""
    block, slot = divmod(stored["position"], sum(_quotas(stored)))
    # The epochs of a mixture's sets run ahead of its own: at most as if the block's slots so far were all the set's
    begun = [
        (block * s["quota"] + min(s["quota"], slot)) // (s["samples"] // s["lanes"] * s["lanes"])
        for s in stored.get("sets", ())
    ]
    return stored["epoch"] + 1 + max(begun, default=0)


def _digests(stored: dict[str, Any]) -> list[str]:
    return [s["manifest_sha"] for s in stored.get("sets", [stored])]


def _quotas(stored: dict[str, Any]) -> list[int]:
    return [s.get("quota", 1) for s in stored.get("sets", [stored])]


def _read_facts(folder: Path | None, digest: str) -> dict[str, Any]:
    try:
        return json.loads((folder / f"{digest}.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}


def _set_difference(old: dict[str, Any], new: dict[str, Any], old_digest: str, new_digest: str) -> str:
    if not old:
        return f"digest {new_digest[:12]}, was {old_digest[:12]}"
    if old["subset"] != new["subset"]:
        return f"data.subset is {new['subset'] or 'all'}, was {old['subset'] or 'all'}"
    then, now = ({row[0]: row[1:] for row in facts["shards"]} for facts in (old, new))
    words = [f"{n} is new" for n in now if n not in then] + [f"{n} is missing" for n in then if n not in now]
    for name in (n for n in now if n in then and now[n] != then[n]):
        a, b = then[name][0], now[name][0]
        words.append(f"{name} has {b:,} samples, had {a:,}" if a != b else f"{name} holds other samples")
    if not words:
        words = ["the same shards in another order"] if then else [f"{new['name']}, was {old['name']}"]
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return (
        f"{new['samples']:,} samples in {len(now)} shards, were {old['samples']:,} in {len(then)}: "
        f"{', '.join(words[:3])}{more}"
    )


def open_data(
    sets: Sequence[tuple[str, float]],
    open_set: Callable[[str], SampleSource],
    *,
    share: str | None = None,
    fraction: Fraction | None = None,
    folder: Path | None = None,
) -> TrainingData:
    """Opens (path, weight) after (path, weight); `fraction` is what `share` says. `folder`: see `Subset.of`."""
    opened = [DataSet(path, open_set(path), weight) for path, weight in sets]
    if fraction is None or fraction == 1:
        return TrainingData(opened)
    return TrainingData([replace(s, share=share, subset=Subset.of(s.source, fraction, folder)) for s in opened])
