"""`mixer train` and `mixer eval`, as functions: what runs inside every training process.

The command line itself is in `launch.cli`; torch is imported here, inside the functions.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from pipeline.config import Config, Duration, load_config
from pipeline.logs import StartLogs
from pipeline.pulse import Pulse
from pipeline.run import RunFolder, read_lines, replace_file
from pipeline.stop import StopFlag
from pipeline.takeover import take_over_run

if TYPE_CHECKING:
    from pipeline.parallel.world import World

_LASTING = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip


class FolderTrouble(UserError):
    """The run's folder or its store does not answer: that may be over in a moment, and a launcher tries again."""

    exit_code = 74  # EX_IOERR


EXIT_SAVED = 75  # EX_TEMPFAIL, "try again": saved before the end, to be continued
SMOKE_STEPS = 3


def quiet_libraries() -> None:
    """Third-party chatter that says nothing to a user; warnings of our own and errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="torch|deepspeed|accelerate")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("DeepSpeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_training(config: Config, allow: set[str], logs: StartLogs | None = None, pulse: Pulse | None = None) -> int:
    """Trains in this process, as one rank of the group that the environment describes. Returns the exit code."""
    flag = StopFlag().install()
    quiet_libraries()
    from pipeline.build import build
    from pipeline.parallel.check import check_group
    from pipeline.parallel.world import World
    from pipeline.trainer import Trainer

    world = World.join(group_timeout(config))
    with group_left_last(world):
        problem, kind = None, UserError
        if world.is_main:
            try:
                # the lock goes with the object: kept until this returns
                _held = take_over_run(config, allow, logs.name if logs else "")
            except UserError as e:
                problem = str(e)
            except OSError as e:
                problem, kind = str(e) or repr(e), UserError if e.errno in _LASTING else FolderTrouble
        problem, kind = world.broadcast((problem, kind))
        if problem:
            raise kind(problem)
        if os.environ.get("MIXER_CHECK_GROUP") and world.size > 1:
            speed = check_group(world)
            if world.is_main:
                RunFolder(config.run.dir).record("all_reduce", world_size=world.size, gb_per_s=speed)
        outcome = Trainer(build(config, world, allow), flag=flag, logs=logs, pulse=pulse).train()
        return 0 if outcome == "finished" else EXIT_SAVED


def group_timeout(config: Config) -> float:
    """Seconds until a collective gives up: later than any rank's watchdog, which writes down where everybody stands."""
    stuck, reading = (Duration.parse(text).seconds() for text in (config.health.timeout, config.data.read_timeout))
    return 2 * stuck + 2 * reading + 120


@contextlib.contextmanager
def group_left_last(world: World) -> Iterator[None]:
    """Leaves the process group at the end, after all that trained in it is gone.

    An engine (DDP's reducer) that outlives the group would be its last owner, and run gloo's destructor under the
    interpreter's lock: that was seen to deadlock.
    """
    try:
        yield
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)
        raise
    finally:
        gc.collect()
        world.leave()


def run_smoke(config: Config) -> int:
    """A few steps, save, resume, evaluate: does everything that a long run does, in a throw-away folder."""
    quiet_libraries()
    import tempfile

    from pipeline.build import build
    from pipeline.parallel.world import World
    from pipeline.trainer import Trainer

    world = World.join()
    runs = RunFolder(config.run.dir).path.resolve().parent  # beside the run to be: a folder that all nodes see
    made = world.is_main and not runs.exists()
    if world.is_main:
        runs.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=".smoke-", dir=runs) if world.is_main else contextlib.nullcontext("")
    with scratch as mine:
        folder = world.broadcast(mine)
        config = replace(
            config,
            run=replace(config.run, dir=folder),
            train=replace(config.train, duration=f"{SMOKE_STEPS + 1} steps"),
            scheduler=replace(config.scheduler, warmup="0 steps"),
            eval=replace(config.eval, every=None),
            checkpoint=replace(config.checkpoint, dir=None, mirror=None),  # those of the run to be stay untouched
            logging=replace(config.logging, every="1 steps", to=["tensorboard"]),
        )
        with group_left_last(world):
            Trainer(build(config, world)).train(stop_at=SMOKE_STEPS)
            trainer = Trainer(build(config, world))
            trainer.train()
            metrics = trainer.metrics
            del trainer
            resumed = [e["step"] for e in read_lines(RunFolder(folder).events) if e["event"] == "resume"]
            if world.is_main and resumed != [SMOKE_STEPS]:
                raise UserError("smoke test: the run did not resume from its own checkpoint")
            if world.is_main:
                evaluated = f", evaluated {metrics['samples']:.0f} samples" if metrics else ""
                print(f"smoke test: {SMOKE_STEPS} steps, saved, resumed, 1 more step{evaluated}: fit to submit")
    if made:
        runs.rmdir()
    return 0


def run_audit(run_dir: str, overrides: list[str]) -> int:
    """Prints what the audit found; exit code 1 if anything is wrong."""
    from pipeline.audit import audit

    run = existing_run(run_dir)
    config = load_config(str(run.config), [f"run.dir={run.path}", *overrides]).config
    with progress_bar(run.read_status().get("step", 0), "steps audited", enabled=True) as advance:
        report = audit(config, run, advance)
    print(f"{report.steps} steps of {report.attempts} live starts, {report.superseded} superseded ledger entries")
    several = len({e.name for e in report.epochs}) > 1
    for e in report.epochs:
        rest = " so far" if e.left_out is None else f", {len(e.left_out)} left out"
        of = f" of {e.name}" if several else ""
        print(f"epoch {e.epoch}{of}: {e.samples:,} samples" + ("" if report.faults else f", each once{rest}"))
    if report.masked or report.skipped:
        print(f"{len(report.masked)} masked (unreadable), {report.skipped} passed over after sick steps")
    listed = run.path / "audit.jsonl"
    replace_file(listed, "".join(json.dumps(row) + "\n" for row in report.rows()))
    print(f"every sample that was left out, masked or passed over: {listed}")
    for fault in report.faults[:20]:
        print(f"FAULT {fault}")
    if report.faults:
        raise UserError(f"{len(report.faults)} faults: the run did not see what the order says it should have seen")
    print("exact: what reached the model is what the order and the index say, byte for byte")
    return 0


def existing_run(run_dir: str) -> RunFolder:
    run = RunFolder(run_dir)
    if not run.config.exists():
        hint = "no such folder" if not Path(run_dir).is_dir() else "it has no config.yaml"
        raise UserError(f"{run_dir} is not a run folder: {hint}. Runs are folders that `mixer train` made")
    return run


class progress_bar:
    """A progress bar on a terminal, nothing elsewhere; calling it advances."""

    def __init__(self, total: int, text: str, enabled: bool):
        self._progress = None
        if enabled and sys.stdout.isatty():
            from rich.progress import Progress

            self._progress = Progress(transient=True)
            self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Any:
        if self._progress:
            self._progress.start()
        return self

    def __call__(self, steps: int = 1) -> None:
        if self._progress:
            self._progress.advance(self._task, steps)

    def __exit__(self, *exc: Any) -> None:
        if self._progress:
            self._progress.stop()
