"""Sharding a corpus, start to end: plan, pack what is missing, finalise.

`shard_corpus` is the public entry; it runs the same tasks on processes of this machine, on Ray or as a SLURM array.
A run may be killed at any moment; the same call goes on where it stopped.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from data_tools.draft import WORK_FOLDER, Draft, Request
from data_tools.errors import UserError
from data_tools.estimate import estimate_seconds
from data_tools.finalize import finalize
from data_tools.hashing import HASH_FOLDER, on_processes, waiting_tasks
from data_tools.local_pool import LocalPool
from data_tools.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.output import Output, alone_in, explained, terminated_like_interrupted
from data_tools.parallel import available_cores
from data_tools.plan import Order, PlanOptions, ShardPlan
from data_tools.plan_store import load_plan
from data_tools.progress import Board, PlanPrinter, Progress
from data_tools.reading import Inputs
from data_tools.settle import settle_plan
from data_tools.sources import Columns
from data_tools.storage import lock_folder
from data_tools.tasks import Task, make_tasks, read_markers, run_task
from data_tools.transform import check_encode

Engine = Literal["local", "ray", "slurm"]
OrderChoice = Literal["auto", "shuffled", "source"]
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class ShardOptions:
    """What `shard_corpus` needs to know.

    - source: one or several corpora (paths or URLs, see `sources`); out: the data set's folder, made if missing.
    - val_fraction: share of the images that goes to split `val`, by hash of their path, in [0, 1).
    - shard_size: bytes a tar may take; max_samples: images a tar may hold, 0 for no limit.
    - order: `shuffled` mixes classes over all shards, by hash of path and seed; `source` keeps the listing;
      `auto` is `source` for archives and Parquet files with images, else `shuffled`.
    - workers: processes, 0 for one a core, at most one a shard.
    - verify: decode every image once, else read its header only; max_pixels: refuse larger images.
    - max_bad: images that may be quarantined: a count, or as a float a fraction.
    - overwrite: discard what an earlier run with other options or another corpus left in `out`.
    - engine: who runs the tasks; num_tasks: of a SLURM array, 0 for one a shard, at most 100; sbatch: more arguments
      for `sbatch`.
    - storage_options: fsspec's arguments for URLs; work: the local folder that an `out` URL needs, by default one
      in the user's cache (several machines: one that all see).
    - columns: what the columns of a manifest mean; classes: a file with one class name a line; group_by: the column
      whose equal values stay in one split.
    - dedupe: `exact` keeps the first of images with the same bytes; dedupe_against: data sets to keep out.
    - resize: shorter side in pixels, 0 to keep; encode: `keep`, `jpeg:QUALITY` or `webp:QUALITY`.
    """

    source: Path | str | Sequence[Path | str]
    out: Path | str
    val_fraction: float = 0.0
    shard_size: int = 256_000_000
    max_samples: int = 0
    order: OrderChoice = "auto"
    seed: int = 0
    workers: int = 0
    verify: bool = True
    max_pixels: int = 100_000_000
    max_bad: int | float = 0
    overwrite: bool = False
    engine: Engine = "local"
    num_tasks: int = 0
    sbatch: tuple[str, ...] = ()
    storage_options: dict[str, Any] = field(default_factory=dict)
    work: Path | None = None
    columns: Columns = field(default_factory=Columns)
    classes: Path | None = None
    group_by: str | None = None
    dedupe: Literal["off", "exact"] = "off"
    dedupe_against: tuple[Path | str, ...] = ()
    resize: int = 0
    encode: str = "keep"

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be meant."""
        checks = [
            (0 <= self.val_fraction < 1, f"val_fraction {self.val_fraction}: must be in [0, 1)"),
            (self.shard_size >= 10_000, f"shard_size {self.shard_size} bytes: too small, try 256MB"),
            (self.max_samples >= 0, f"max_samples {self.max_samples}: must not be negative"),
            (self.order in ("auto", "shuffled", "source"), f"order {self.order!r}: auto, shuffled or source"),
            (0 <= self.seed < 2**64, f"seed {self.seed}: must be in [0, 2^64)"),
            (self.workers >= 0, f"workers {self.workers}: must not be negative"),
            (self.max_pixels > 0, f"max_pixels {self.max_pixels}: must be positive"),
            (self.max_bad >= 0, f"max_bad {self.max_bad}: must not be negative"),
            (self.engine in ("local", "ray", "slurm"), f"engine {self.engine!r}: local, ray or slurm"),
            (self.resize >= 0, f"resize {self.resize}: must not be negative"),
            (self.dedupe in ("off", "exact"), f"dedupe {self.dedupe!r}: off or exact"),
            (self.num_tasks >= 0, f"num_tasks {self.num_tasks}: must not be negative"),
        ]
        for good, message in checks:
            if not good:
                raise UserError(message)

    def output(self) -> Output:
        return Output.at(self.out, self.storage_options, self.work)

    def plan_options(self) -> PlanOptions:
        return PlanOptions(
            self.val_fraction,
            self.shard_size,
            self.max_samples,
            cast(Order, self.order),  # `auto` is settled by the draft
            self.seed,
            self.verify,
            self.max_pixels,
            group_by=self.group_by,
            dedupe=self.dedupe,
            resize=self.resize,
            encode=check_encode(self.encode),
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source, as text."""
        given = [self.source] if isinstance(self.source, (str, Path)) else self.source
        return tuple(map(str, given))

    def request(self) -> Request:
        return Request(
            self.sources, replace(self.columns, group=self.group_by), self.classes,
            tuple(map(str, self.dedupe_against)), self.storage_options, self.workers,
        )  # fmt: skip


def plan_corpus(options: ShardOptions) -> ShardPlan:
    """Lists the corpus and plans its shards; writes nothing. Raises UserError as `shard_corpus` does."""
    return preview_corpus(options)[0]


def preview_corpus(options: ShardOptions) -> tuple[ShardPlan, float]:
    """(the plan, an estimate of the seconds that packing takes here, from a sample of the images); writes nothing."""
    with tempfile.TemporaryDirectory(prefix="mixer-plan-") as folder:
        plan = Draft(options.request(), options.plan_options(), Path(folder)).build()
        seconds = estimate_seconds(plan, Path(folder), Inputs.of(plan.corpus, options.storage_options))
        workers = min(options.workers or available_cores(), len(plan.shards))
        return plan, seconds / workers


def shard_corpus(options: ShardOptions, report: Report | None = None) -> DatasetManifest:
    """Shards `options.source` into `options.out` and returns the manifest that lies there.

    Goes on where an earlier run with the same corpus and options was stopped; returns at once where that run
    had finished. `report` is called a few times a second. With more than one worker the calling script needs
    the `if __name__ == "__main__":` guard of `multiprocessing`.

    Raises UserError: bad source or options, another plan or another run in `out`, too many bad images, not
    enough space, an interruption (Interrupted), a store or an engine that fails. Committed shards stay in every
    case.
    """
    if options.engine == "slurm":
        from data_tools.slurm_array import wait_for_array

        job = submit_corpus(options)
        with explained(options.output()):
            wait_for_array(job, options.output(), report)
        return finalize_corpus(options.out, options.max_bad, options.storage_options, options.work)
    output = options.output()
    with explained(output), alone_in(output):
        plan = settle_plan(options, output, None if report is None else PlanPrinter())
        tasks = make_tasks(plan, Inputs.of(plan.corpus, options.storage_options), output)
        _run_missing(plan, tasks, options.workers, options.engine, report)
        return finalize(output, options.max_bad)


def plan_into(options: ShardOptions) -> ShardPlan:
    """Writes the plan into the output folder and packs nothing: `run_part` does, then `finalize_corpus`."""
    output = options.output()
    with explained(output), alone_in(output):
        return settle_plan(options, output, PlanPrinter())


def submit_corpus(options: ShardOptions) -> str:
    """Plans, submits a SLURM array that packs what is missing, and returns its job id; see `finalize_corpus`."""
    from data_tools.slurm_array import submit_array

    plan = plan_into(options)
    num_tasks = options.num_tasks or 100
    return submit_array(options.output(), min(num_tasks, len(plan.shards)), options.workers, options.sbatch)


def run_part(output: Output, task_id: int, num_tasks: int, workers: int = 0, report: Report | None = None) -> None:
    """Packs every `num_tasks`-th shard of the plan in `output`, beginning with `task_id`: one task of an array.
    While that plan is being made and needs content hashes, takes its part of those instead.

    Any number of parts may run at once, each on its own machine. Raises UserError as `shard_corpus` does, and
    where the same part is running already.
    """
    if not 0 <= task_id < num_tasks:
        raise UserError(f"--task-id {task_id}: must be from 0 to {num_tasks - 1} (--num-tasks {num_tasks})")
    folder = output.plan_folder
    hashing = waiting_tasks(folder / WORK_FOLDER / HASH_FOLDER, output.storage_options)
    if hashing is not None and load_plan(folder) is None:  # the plan is still being made
        with explained(output), terminated_like_interrupted():
            missing = [t for t in hashing[task_id::num_tasks] if not t.out.exists()]
            deque(on_processes(workers)(missing), maxlen=0)
        return
    plan = stored_plan(output)
    with (
        explained(output),
        terminated_like_interrupted(),
        lock_folder(output.folder, folder / "lock", shared=True),
        lock_folder(output.folder, folder / f"lock-{task_id}-of-{num_tasks}"),
    ):
        tasks = make_tasks(plan, Inputs.of(plan.corpus, output.storage_options), output)[task_id::num_tasks]
        output.remove_leftovers([t.name for t in tasks])
        _run_missing(plan, tasks, workers, "local", report)


def finalize_corpus(
    out: Path | str,
    max_bad: int | float = 0,
    storage_options: dict[str, Any] | None = None,
    work: Path | None = None,
) -> DatasetManifest:
    """The last step alone, for a plan whose shards were packed by `run_part`. Raises UserError as it does."""
    output = Output.at(out, storage_options, work)
    stored_plan(output)
    with explained(output), alone_in(output):
        return finalize(output, max_bad)


def stored_plan(output: Output) -> ShardPlan:
    """The plan that lies in `output`. Raises UserError where there is none."""
    plan = load_plan(output.plan_folder)
    if plan is None:
        raise UserError(f"{output.folder} holds no plan; make one with `mixer shard SOURCE {output.place} --plan-only`")
    return plan


# --- packing ------------------------------------------------------------------------------------------------


def _run_missing(plan: ShardPlan, tasks: list[Task], workers: int, engine: Engine, report: Report | None) -> None:
    """Runs those of `tasks` that no marker calls done."""
    if not tasks:
        return
    output = tasks[0].output
    store = output.store()
    # Files that could not be opened may be readable now; once the set is published it stays as it is.
    retry_unreadable = MANIFEST_NAME not in store.list()
    board = Board(plan, report, [t.pack.shard for t in tasks])
    missing: list[Task] = []
    mine = {t.name: t for t in tasks}
    for shard, packed in zip(plan.shards, read_markers(store, plan)):
        if shard.name not in mine:
            continue
        if packed is None or (retry_unreadable and not all(b.content for b in packed.bad)):
            missing.append(mine[shard.name])
        else:
            board.finished_earlier(packed)
    board.show(now=True)
    if not missing:
        return
    if engine == "ray":
        from data_tools.ray_pool import RayPool

        _check_space(output, missing, workers or len(missing))
        RayPool(missing, workers, board).run()
        board.show(now=True)
        return
    workers = min(workers or available_cores(), len(missing))
    _check_space(output, missing, workers)
    if workers == 1:
        _pack_here(missing, board)
    else:
        LocalPool(missing, workers, board).run()
    board.show(now=True)


def _check_space(output: Output, tasks: list[Task], workers: int) -> None:
    """For what stays here: all shards, or those in work where finished ones move to an object store."""
    sizes = sorted((t.pack.shard.bytes for t in tasks), reverse=True)
    needed = sum(sizes if output.url is None else sizes[:workers])
    usage = shutil.disk_usage(output.folder)
    if usage.total and usage.free < needed:
        raise UserError(
            f"{output.folder}: {needed / 1e6:,.0f} MB are to be written, {usage.free / 1e6:,.0f} MB are free"
        )


def _pack_here(tasks: list[Task], board: Board) -> None:
    """Packs in this process: no pool, no pickling, needs no guard in the caller's script."""
    for task in tasks:
        last = (0, 0, 0)

        def progress(done: int, bad: int, source_bytes: int) -> bool:
            nonlocal last
            last = (done, bad, source_bytes)
            board.show(*last)
            return True

        packed = run_task(task, progress)
        board.finished(packed, last[2])
