"""`mixer train` and `mixer eval`, as functions: what runs inside every training process.

The command line itself is in `launch.cli`; torch is imported here, inside the functions.
"""

from __future__ import annotations

import contextlib
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
from pipeline.checkpoint.place import checkpoint_root
from pipeline.config import Config, load_config
from pipeline.logs import StartLogs
from pipeline.pulse import Pulse
from pipeline.run import RunFolder, read_lines, replace_file
from pipeline.stop import StopFlag
from pipeline.takeover import take_over_run

if TYPE_CHECKING:
    from pipeline.parallel.world import World

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

    world = World.join()
    with group_left_last(world):
        problem = None
        if world.is_main:
            try:
                # the lock goes with the object: kept until this returns
                _held = take_over_run(config, allow, logs.name if logs else "")
            except (UserError, OSError) as e:
                problem = str(e)
        problem = world.broadcast(problem)
        if problem:
            raise UserError(problem)
        if os.environ.get("MIXER_CHECK_GROUP") and world.size > 1:
            speed = check_group(world)
            if world.is_main:
                RunFolder(config.run.dir).record("all_reduce", world_size=world.size, gb_per_s=speed)
        outcome = Trainer(build(config, world, allow), flag=flag, logs=logs, pulse=pulse).train()
        return 0 if outcome == "finished" else EXIT_SAVED


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


def run_eval(run_dir: str, which: str, ema: bool, overrides: list[str]) -> int:
    """Top-1 and top-5 of one checkpoint over the val split, each sample once on any number of ranks."""
    quiet_libraries()
    import time

    import torch

    from pipeline.build import eval_samples, num_classes, open_training_data, open_val
    from pipeline.checkpoint.layout import CheckpointReader
    from pipeline.checkpoint.manager import choose
    from pipeline.data.augment import normalize
    from pipeline.data.loader import Batch, eval_batches
    from pipeline.evaluate import evaluate
    from pipeline.losses import make_loss
    from pipeline.model import create_model
    from pipeline.parallel.engine import BUFFER, EMA, WEIGHT
    from pipeline.parallel.world import World

    run = existing_run(run_dir)
    config = load_config(str(run.config), [f"run.dir={run.path}", *overrides]).config
    reader = CheckpointReader(choose(checkpoint_root(config), which))
    damage = reader.damage(reader.manifest.files)
    if damage:
        raise UserError(f"{damage}; evaluate another checkpoint (`--checkpoint step-N`)")
    train = open_training_data(replace(config, data=replace(config.data, subset=None))).source
    source = open_val(config, train)
    if source is None:
        raise UserError(f"{train.name} has no val split: give one with data.val=FOLDER")
    classes = num_classes(config, train)
    world = World.join()
    reader = CheckpointReader(world.broadcast(reader.folder))  # of a run in progress, ranks may see another last one
    model = create_model(config.model.name, classes, config.model.image_size, device="meta", **config.model.overrides())
    model.to_empty(device=world.device)
    kind = EMA if ema else WEIGHT
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not reader.has(name, kind):
                raise UserError(
                    f"{reader.folder} holds no {kind} of {name}"
                    + ("; train with train.ema_decay=0.9999 to have an average" if ema else "")
                )
            p.copy_(reader.tensor(name, kind))
        for name, b in model.named_buffers():
            if reader.has(name, BUFFER):
                b.copy_(reader.tensor(name, BUFFER))
    model.eval()
    bf16 = config.train.precision == "bf16"

    @torch.no_grad()
    def predict(batch: Batch) -> torch.Tensor:
        images = normalize(batch.images.to(world.device, non_blocking=True))
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16):
            return model(images, None).float()

    size = config.eval.batch_size or 64
    batches = eval_batches(
        eval_samples(config, source, classes),
        rank=world.rank,
        world_size=world.size,
        batch_size=size,
        num_workers=config.data.num_workers,
    )
    started = time.perf_counter()
    with _bar(len(batches), enabled=world.is_main) as advance:
        result = evaluate(predict, batches, make_loss(config.loss.name, config.loss.label_smoothing), world, advance)
    seconds = time.perf_counter() - started
    if world.is_main:
        step = reader.manifest.step
        report: dict[str, Any] = {
            "step": step,
            "weights": "ema" if ema else "raw",
            "data": source.name,
            **result.to_dict(),
            "img_per_s": result.samples / seconds,
        }
        name = f"step-{step:08d}{'-ema' if ema else ''}.json"
        replace_file(run.path / "eval" / name, json.dumps(report, indent=1) + "\n")
        bad = f", {result.bad} unreadable" if result.bad else ""
        print(
            f"{reader.folder.name}{' (ema)' if ema else ''}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
            f"loss {result.loss:.4f} on {result.samples:,} samples of {source.name}{bad}  "
            f"[{run.path / 'eval' / name}]"
        )
    world.leave()
    return 0


def run_audit(run_dir: str, overrides: list[str]) -> int:
    """Prints what the audit found; exit code 1 if anything is wrong."""
    from pipeline.audit import audit

    run = existing_run(run_dir)
    config = load_config(str(run.config), [f"run.dir={run.path}", *overrides]).config
    report = audit(config, run)
    print(f"{report.steps} steps of {report.attempts} live starts, {report.superseded} superseded ledger lines")
    for epoch, samples in sorted(report.epochs.items()):
        rest = f", {report.left_out[epoch]} left out" if epoch in report.left_out else " so far"
        print(
            f"epoch {epoch}: {samples:,} samples, each once{rest}"
            if not report.faults
            else f"epoch {epoch}: {samples:,}"
        )
    if report.masked or report.skipped:
        print(f"{report.masked} masked (unreadable), {report.skipped} passed over after sick steps")
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


class _bar:
    """A progress bar on a terminal, nothing elsewhere; calling it advances by one."""

    def __init__(self, total: int, enabled: bool):
        self._progress = None
        if enabled and sys.stdout.isatty():
            from rich.progress import Progress

            self._progress = Progress(transient=True)
            self._task = self._progress.add_task("evaluating", total=total)

    def __enter__(self) -> Any:
        if self._progress:
            self._progress.start()
        return self

    def __call__(self) -> None:
        if self._progress:
            self._progress.advance(self._task)

    def __exit__(self, *exc: Any) -> None:
        if self._progress:
            self._progress.stop()
