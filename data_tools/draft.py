"""From sources to a plan: list, compare with the plan that is there, find duplicates, plan.

A `Draft` keeps what it has done in `plan/work/`; a killed run's next one goes on there. It is deleted with the plan's
completion, and with any refusal (not with `Unfinished`), so that a listing never outlives the corpus it describes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools import planner
from data_tools.dedupe import Dropped, dataset_hashes, find_dropped
from data_tools.errors import UserError
from data_tools.hashing import DIGEST, HASH_FOLDER, Spread, hash_listing, on_processes
from data_tools.labels import number_labels, read_classes
from data_tools.plan import PlanOptions, ShardPlan
from data_tools.plan_store import DUPLICATES_NAME, iter_samples
from data_tools.planner import Numbering, Report
from data_tools.reading import Inputs
from data_tools.scan import Listing, fingerprint, prefix_bytes, scan_sources
from data_tools.sources import Columns, Source, open_sources
from data_tools.storage import write_atomic

WORK_FOLDER = "work"
_NOTE = "sources.txt"  # in it: which listing the rest belongs to
_DESCRIBE_ROWS = 5_000_000  # larger corpora are compared by their counts alone


@dataclass(frozen=True)
class Request:
    """Which corpus, and what its columns and labels mean.

    - sources: paths or URLs; columns: see `sources.Columns`; classes: a file with one class name a line.
    - dedupe_against: finished data sets whose images are kept out.
    - storage_options: fsspec's arguments for URLs; workers: processes that hash, 0 for one a core.
    """

    sources: tuple[str, ...]
    columns: Columns = field(default_factory=Columns)
    classes: Path | None = None
    dedupe_against: tuple[str, ...] = ()
    storage_options: dict[str, Any] = field(default_factory=dict)
    workers: int = 0


class Draft:
    """The plan that a request and options ask for. `options.order` may be `auto`. Raises UserError as its parts do."""

    def __init__(
        self,
        request: Request,
        options: PlanOptions,
        folder: Path,
        report: Report | None = None,
        spread: Spread | None = None,
    ) -> None:
        """`spread` runs the tasks that hash contents; default: processes of this machine."""
        self._request, self._folder, self._work, self._report = request, folder, folder / WORK_FOLDER, report
        self._spread = spread or on_processes(request.workers)
        self._sources: list[Source] = open_sources(request.sources, request.columns, request.storage_options)
        self._given = None if request.classes is None else read_classes(request.classes)
        self._held_out = [dataset_hashes(place, request.storage_options) for place in request.dedupe_against]
        self.options = replace(
            options, order=self._order(options.order), held_out=" ".join(digest for digest, _ in self._held_out)
        )
        if self.options.encode == "keep" and self.options.resize < 0:
            raise UserError(f"--resize {self.options.resize}: must not be negative")

    def _order(self, asked: str) -> Any:
        forward = [s.root for s in self._sources if s.forward_only]
        if asked == "shuffled" and forward:
            raise UserError(
                f"a compressed archive in {forward[0]} can only be read from its start to its end: use --order source "
                "(the trainer mixes samples anyway), or decompress it first"
            )
        if asked != "auto":
            return asked
        return "source" if any(s.sequential for s in self._sources) else "shuffled"

    # --- steps ----------------------------------------------------------------------------------------------

    @cached_property
    def listing(self) -> Listing:
        """The sources, listed (or as an earlier, killed run listed them)."""
        self._check_work()
        report = self._report
        tell: Callable[[int], None] | None = None if report is None else lambda rows: report("listing", rows, 0)
        listing = scan_sources(self._sources, self._work / "scan", tell)
        if listing.missing == listing.samples:
            first = os.fsdecode(pq.read_table(listing.part_path(0), columns=["path"]).column("path")[0].as_py())
            raise UserError(
                f"none of the {listing.samples} images of {self._request.sources[0]} exists (the first is {first}); "
                "relative paths are relative to the manifest's folder"
            )
        if self.options.group_by is not None and not any(
            hasattr(s, "own_stamp") or s.sequential for s in self._sources
        ):
            raise UserError("--group-by names a column; an image folder has none")
        return listing

    @cached_property
    def numbering(self) -> Numbering:
        return Numbering(*number_labels(self.listing.labels, self._sources, self._given))

    @property
    def _stamp(self) -> str | None:
        """The state of all sources where they say it without being listed."""
        if any(s.stamp is None for s in self._sources):
            return None
        asked = [asdict(self._request.columns), self._given]
        return fingerprint(self._sources, asked)

    def change_from(self, earlier: ShardPlan) -> str | None:
        """What keeps this request from going on with an earlier plan; None where it can."""
        before, now = asdict(earlier.options), asdict(self.options)
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
        if not changed and self._stamp is not None and self._stamp == earlier.corpus.stamp:
            return None
        listing, corpus = self.listing, earlier.corpus
        if corpus.digest != listing.digest or earlier.classes != self.numbering.classes:
            changed.append(self._corpus_change(earlier))
        elif corpus.mtimes != listing.mtimes:
            changed.append(f"files were written again since ({self._first_rewritten(earlier)})")
        elif corpus.kind != listing.kind:
            changed.append(f"the kind of corpus was {corpus.kind}, is {listing.kind}")
        return "; ".join(changed) or None

    def build(self) -> ShardPlan:
        """Writes the plan into the folder and returns it."""
        listing, numbering = self.listing, self.numbering
        dropped = self._find_dropped()
        runs = self._work / f"runs-{self._runs_mark(dropped)}"
        for other in self._work.glob("runs-*"):  # of other options: the tables below would not be theirs any more
            if other != runs:
                for note in other.glob("*.json"):  # what makes a run count, first: a kill in between is safe
                    note.unlink()
                planner.clear(other)
        if not runs.exists():
            for path in self._folder.glob("samples-*.parquet"):  # of a plan that was never finished
                path.unlink()
        prefixes = tuple(prefix_bytes(self._sources))
        return planner.build_plan(
            listing, self.options, numbering, prefixes, dropped, self._folder, runs, self._stamp, self._report
        )

    def clear(self) -> None:
        """Deletes the work in progress; first what makes it count, so that a kill in between is safe."""
        (self._work / _NOTE).unlink(missing_ok=True)
        planner.clear(self._work)

    # --- parts ----------------------------------------------------------------------------------------------

    def _check_work(self) -> None:
        """Keeps the work of a killed run only where it belongs to the same sources."""
        mark = fingerprint(self._sources, [asdict(self._request.columns)])
        note = self._work / _NOTE
        if note.exists() and note.read_text() == mark:
            return
        self.clear()
        self._work.mkdir(parents=True)
        write_atomic(note, mark.encode())

    def _runs_mark(self, dropped: Dropped) -> str:
        from data_tools.plan import plan_digest

        return plan_digest(self.listing.kind, self.listing.digest, self.options, self.numbering.classes, dropped.digest)

    def _find_dropped(self) -> Dropped:
        exact = self.options.dedupe == "exact"
        if not exact and not self._held_out:
            (self._folder / DUPLICATES_NAME).unlink(missing_ok=True)
            return Dropped()
        import numpy as np

        inputs = Inputs(self.listing.roots, tuple(prefix_bytes(self._sources)), self._request.storage_options)
        spread = self._spread
        if any(s.forward_only for s in self._sources):
            spread = on_processes(1)  # one stream, read once
        files = hash_listing(self.listing, inputs, self._work / HASH_FOLDER, spread, self._report)
        held_out = np.concatenate([np.zeros(0, DIGEST), *(hashes for _, hashes in self._held_out)])
        dropped = find_dropped(self.listing, files, exact, held_out, self._folder)
        if dropped.unread:
            print(
                f"not compared: {dropped.unread:,} images that could not be read; should packing be able to read them, "
                "duplicates may be among them (to compare them too, shard into another folder once they are readable)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        return dropped

    # --- saying what changed --------------------------------------------------------------------------------

    def _corpus_change(self, earlier: ShardPlan) -> str:
        listing = self.listing
        counts = f"{earlier.corpus.listed:,} images then, {listing.samples:,} now"
        if max(earlier.corpus.listed, listing.samples) > _DESCRIBE_ROWS:
            return f"the corpus changed ({counts})"
        before = {s.path: (s.size, s.label) for s in iter_samples(self._folder)}
        number = self.numbering.number
        now: dict[str, tuple[int, int]] = {}
        for table in listing.tables(["path", "size", "label"]):
            columns = (table.column(name).to_pylist() for name in ("path", "size", "label"))
            now |= {os.fsdecode(p): (s, -1 if t is None else number[t]) for p, s, t in zip(*columns)}
        groups = {
            "new": sorted(now.keys() - before.keys()) if not earlier.corpus.listed - earlier.corpus.samples else [],
            "gone": sorted(before.keys() - now.keys()),
            "of another size or label": sorted(p for p in now.keys() & before.keys() if now[p] != before[p]),
        }
        parts = [f"{len(paths)} {what} (first: {paths[0]!r})" for what, paths in groups.items() if paths]
        return f"the corpus changed: {', '.join(parts) or f'splits, classes or extra columns ({counts})'}"

    def _first_rewritten(self, earlier: ShardPlan) -> str:
        if earlier.corpus.listed > _DESCRIBE_ROWS:
            return "change times differ"
        before = {s.path: s.mtime_ns for s in iter_samples(self._folder)}
        paths = []
        for table in self.listing.tables(["path", "mtime_ns"]):
            for path, mtime in zip(table.column("path").to_pylist(), table.column("mtime_ns").to_pylist()):
                if before.get(name := os.fsdecode(path), mtime) != mtime:
                    paths.append(name)
        return f"{len(paths)}, the first is {min(paths)!r}" if paths else "change times differ"
