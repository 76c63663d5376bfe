"""The audit's count of samples: in every epoch of every set each once, except for those that may be left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.mixture import MixtureOrder
from pipeline.data.sets import TrainingData


@dataclass(frozen=True)
class EpochReport:
    """`left_out`: the samples of a finished epoch that no step took, by their number in the set; None for an epoch
    that is not finished. `jumped`: those passed over after sick steps."""

    name: str  # of the set
    epoch: int
    samples: int
    left_out: np.ndarray | None
    jumped: np.ndarray


class Epochs:
    """Counts over consecutive starts on the same data.

    `points`: these starts. At most B-1 samples of an epoch of a single set may be left out, at most V-1 in a mixture
    (its sets have whole epochs of V*L), besides what was jumped over on purpose after sick steps.
    """

    def __init__(self, data: TrainingData, points: list[dict[str, Any]]):
        self._data, self._points = data, points
        self._order = data.resume(points[0]["order"], global_batch_size=points[0]["global_batch_size"])
        self._starts = np.cumsum([0, *(sum(s.source.shard_sizes) for s in data.sets)])
        self._counts: dict[tuple[int, int], np.ndarray] = {}
        self._samples: dict[tuple[int, int], int] = {}
        self._jumped = self._jumped_ids()
        self._state = self._order.state
        self.reports: list[EpochReport] = []
        self.faults: list[str] = []

    def add(self, ids: np.ndarray, epochs: np.ndarray, state: Any) -> None:
        """Samples of some steps, any shape; `state`: of the order after them."""
        for place, chosen in self._by_epoch(ids.ravel(), epochs.ravel()):
            if place not in self._counts:
                size = int(self._starts[place[0] + 1] - self._starts[place[0]])
                self._counts[place] = np.zeros(size, dtype=np.uint8)
            np.add.at(self._counts[place], chosen, 1)
            self._samples[place] = self._samples.get(place, 0) + len(chosen)
        self._state = state
        for place in [p for p in self._counts if self._finished(p)]:
            self._report(place, finished=True)

    def close(self) -> None:
        for place in sorted(self._counts):
            self._report(place, finished=False)
        self.reports.sort(key=lambda r: (r.epoch, [s.path for s in self._data.sets].index(r.name)))

    def _by_epoch(self, ids: np.ndarray, epochs: np.ndarray) -> list[tuple[tuple[int, int], np.ndarray]]:
        """((set, epoch), ids within the set), for all that occur."""
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        found = []
        for i in np.unique(owner):
            for e in np.unique(epochs[owner == i]):
                found.append(((int(i), int(e)), ids[(owner == i) & (epochs == e)] - self._starts[i]))
        return found

    def _finished(self, place: tuple[int, int]) -> bool:
        """Whether no later step can be of this epoch."""
        i, epoch = place
        if not isinstance(self._order, MixtureOrder):
            return epoch < self._state.epoch
        begun = self._order.own_positions(self._state.position)[i]
        return begun >= (epoch - self._state.epoch + 1) * self._order.orders[i].epoch_length

    def _report(self, place: tuple[int, int], finished: bool) -> None:
        counts, samples = self._counts.pop(place), self._samples.pop(place)
        i, epoch = place
        chosen, name = self._data.sets[i], self._data.sets[i].path
        where = f"epoch {epoch}" + (f" of {name}" if len(self._data.sets) > 1 else "")
        twice = np.flatnonzero(counts > 1)
        if twice.size:
            self.faults.append(f"{where}: {twice.size} samples were seen more than once, the first is {twice[0]}")
        jumped = self._jumped.get(place, np.zeros(0, dtype=np.int64))
        left_out = None
        if finished:
            counts[jumped] = 1
            left_out = np.flatnonzero(counts == 0)
            if chosen.subset is not None:
                left_out = np.intersect1d(left_out, chosen.subset.ids)
            if isinstance(self._order, MixtureOrder):
                allowed = self._order.state.sets[i].lanes - 1
            else:
                allowed = max(p["global_batch_size"] for p in self._points) - 1
            if len(left_out) > allowed:
                self.faults.append(
                    f"{where}: {len(left_out)} samples were never seen; at most {allowed} may be left out"
                )
        self.reports.append(EpochReport(name, epoch, samples, left_out, jumped))

    def _jumped_ids(self) -> dict[tuple[int, int], np.ndarray]:
        ranges = dict.fromkeys(tuple(skip) for p in self._points for skip in p["order"].get("skips", ()))
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        for epoch, first, last in ranges:
            drawn = self._order.draw(epoch, np.arange(first, last))
            for place, ids in self._by_epoch(drawn.ids, drawn.epochs):
                found.setdefault(place, []).append(ids)
        return {place: np.concatenate(parts) for place, parts in found.items()}
