"""Sharding a corpus, start to end: plan, pack what is missing, finalise.

`shard_corpus` is the public entry. A run may be killed at any moment; the same call goes on where it stopped.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from data_tools.finalize import QUARANTINE_NAME, finalize
from data_tools.local_pool import LocalPool
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, index_name
from data_tools.pack import PackTask, marker_path, pack_shard, read_marker
from data_tools.plan import Order, PlanOptions, ShardPlan, make_plan
from data_tools.plan_store import PLAN_FOLDER, describe_change, load_plan, save_plan
from data_tools.progress import Board, Progress
from data_tools.sources import scan
from data_tools.storage import lock_folder, remove_leftovers


@dataclass(frozen=True)
class ShardOptions:
    """What `shard_corpus` needs to know.

    - source: a folder of images, or a .csv/.tsv manifest; out: the data set's folder, made if missing.
    - val_fraction: share of the images that goes to split `val`, by hash of their path, in [0, 1).
    - shard_size: bytes a tar may take; max_samples: images a tar may hold, 0 for no limit.
    - order: `shuffled` mixes classes over all shards, by hash of path and seed; `source` keeps the listing.
    - workers: processes, 0 for one a core, at most one a shard.
    - verify: decode every image once, else read its header only; max_pixels: refuse larger images.
    - max_bad: images that may be quarantined: a count, or as a float a fraction.
    - overwrite: discard what an earlier run with other options or another corpus left in `out`.
    """

    source: Path
    out: Path
    val_fraction: float = 0.0
    shard_size: int = 256_000_000
    max_samples: int = 0
    order: Order = "shuffled"
    seed: int = 0
    workers: int = 0
    verify: bool = True
    max_pixels: int = 100_000_000
    max_bad: int | float = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be meant."""
        checks = [
            (0 <= self.val_fraction < 1, f"val_fraction {self.val_fraction}: must be in [0, 1)"),
            (self.shard_size >= 10_000, f"shard_size {self.shard_size} bytes: too small, try 256MB"),
            (self.max_samples >= 0, f"max_samples {self.max_samples}: must not be negative"),
            (self.order in ("shuffled", "source"), f"order {self.order!r}: shuffled or source"),
            (0 <= self.seed < 2**64, f"seed {self.seed}: must be in [0, 2^64)"),
            (self.workers >= 0, f"workers {self.workers}: must not be negative"),
            (self.max_pixels > 0, f"max_pixels {self.max_pixels}: must be positive"),
            (self.max_bad >= 0, f"max_bad {self.max_bad}: must not be negative"),
        ]
        for good, message in checks:
            if not good:
                raise UserError(message)

    def plan_options(self) -> PlanOptions:
        return PlanOptions(
            self.val_fraction,
            self.shard_size,
            self.max_samples,
            self.order,
            self.seed,
            self.verify,
            self.max_pixels,
        )


class Interrupted(UserError):
    """Ctrl-C or SIGTERM: what is committed stays, the same call goes on from there."""

    exit_code = 130


def plan_corpus(options: ShardOptions) -> ShardPlan:
    """Lists the corpus and plans its shards; writes nothing. Raises UserError as `shard_corpus` does."""
    return make_plan(scan(options.source), options.plan_options())[0]


def shard_corpus(options: ShardOptions, report: Callable[[Progress], None] | None = None) -> DatasetManifest:
    """Shards `options.source` into `options.out` and returns the manifest that lies there.

    Goes on where an earlier run with the same corpus and options was stopped; returns at once where that run
    had finished. `report` is called a few times a second. With more than one worker the calling script needs
    the `if __name__ == "__main__":` guard of `multiprocessing`.

    Raises UserError: bad source or options, another plan or another run in `out`, too many bad images, not
    enough space, an interruption (Interrupted). Committed shards stay in every case.
    """
    out = options.out
    if not options.source.exists():
        raise UserError(f"{options.source}: no such file or folder")
    if out.resolve() == options.source.resolve():
        raise UserError(f"{out}: the output folder is the corpus itself; give another one")
    folder = out / PLAN_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(out, folder / "lock"), _terminate_like_interrupt():
            remove_leftovers(out)
            remove_leftovers(folder)
            plan = _settle_plan(options)
            _pack_missing(plan, options, report)
            return finalize(out, options.max_bad)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished shards stay in {out}: the same command goes on") from None
    except OSError as e:
        raise _disk_error(e, out) from e


def _disk_error(e: OSError, out: Path) -> UserError:
    place = e.filename or out
    known = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota is used up"}
    what = known.get(e.errno or 0, e.strerror or str(e))
    return UserError(f"{place}: {what}; committed shards stay: mend that and run the same command to go on")


# --- plan ---------------------------------------------------------------------------------------------------


def _settle_plan(options: ShardOptions) -> ShardPlan:
    """The plan to work on: the one in the output folder where it is the same, else a new one."""
    out, folder = options.out, options.out / PLAN_FOLDER
    plan, samples = make_plan(scan(options.source), options.plan_options())
    earlier = load_plan(folder)
    if earlier is None:
        _refuse_foreign(out)
        return save_plan(plan, samples, folder)
    change = describe_change(earlier, plan, samples, folder)
    if change is None:
        return earlier
    if not options.overwrite:
        raise UserError(
            f"{out} was begun with another plan: {change}.\n"
            "Undo that to go on, give another output folder, or discard its shards with --overwrite"
        )
    _discard(out, earlier)
    return save_plan(plan, samples, folder)


def _refuse_foreign(out: Path) -> None:
    found = sorted(p.name for p in out.iterdir() if p.suffix == ".tar" or p.name == MANIFEST_NAME)
    if found:
        raise UserError(
            f"{out} already holds {found[0]}, which this command did not make; give another folder"
        )


def _discard(out: Path, plan: ShardPlan) -> None:
    """Deletes what `plan` made and nothing else; the plan last, so that a kill in between is safe."""
    folder = out / PLAN_FOLDER
    for shard in plan.shards:
        marker_path(out, shard.name).unlink(missing_ok=True)
    for shard in plan.shards:
        (out / shard.name).unlink(missing_ok=True)
        (out / index_name(shard.name)).unlink(missing_ok=True)
    for path in (out / MANIFEST_NAME, out / QUARANTINE_NAME, folder / "samples.jsonl", folder / "plan.json"):
        path.unlink(missing_ok=True)


# --- packing on this machine --------------------------------------------------------------------------------


def _pack_missing(plan: ShardPlan, options: ShardOptions, report: Callable[[Progress], None] | None) -> None:
    out = options.out
    # Files that could not be opened may be readable now; once the set is published it stays as it is.
    retry_unreadable = not (out / MANIFEST_NAME).exists()
    root = options.source if options.source.is_dir() else options.source.parent
    board = Board(plan, report)
    tasks: list[PackTask] = []
    for shard in plan.shards:
        packed = read_marker(out, shard, plan.digest)
        if packed is None or (retry_unreadable and not all(b.content for b in packed.bad)):
            tasks.append(PackTask(out, root, plan.digest, shard, plan.options))
        else:
            board.finished_earlier(packed)
    board.show(now=True)
    if not tasks:
        return
    _check_space(out, sum(t.shard.bytes for t in tasks))
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers == 1:
        _pack_here(tasks, board)
    else:
        LocalPool(tasks, workers, board).run()
    board.show(now=True)


def _check_space(out: Path, needed: int) -> None:
    usage = shutil.disk_usage(out)
    if usage.total and usage.free < needed:
        raise UserError(
            f"{out}: {needed / 1e9:,.2f} GB are to be written, {usage.free / 1e9:,.2f} GB are free"
        )


def _pack_here(tasks: list[PackTask], board: Board) -> None:
    """Packs in this process: no pool, no pickling, needs no guard in the caller's script."""
    for task in tasks:
        last = (0, 0, 0)

        def progress(done: int, bad: int, source_bytes: int) -> bool:
            nonlocal last
            last = (done, bad, source_bytes)
            board.show(*last)
            return True

        packed = pack_shard(task, progress)
        board.finished(packed, last[2])


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM (a scheduler's or a container's way to ask) ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
