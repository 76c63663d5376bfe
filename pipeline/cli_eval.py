"""What `mixer eval` and `mixer fewshot` do, on one rank or many."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UserError
from pipeline.cli import progress_bar, quiet_libraries
from pipeline.run import replace_file

if TYPE_CHECKING:
    from pipeline.data.source import SampleSource
    from pipeline.parallel.world import World
    from pipeline.weights.trained import Predictor, TrainedModel

BATCH = 64


def run_eval(
    run_dir: str, which: str, ema: bool, overrides: list[str], real: Path | None = None, write: bool = True
) -> int:
    """Top-1, top-5, per-class figures and throughput of one checkpoint over a split, each sample exactly once."""
    quiet_libraries()
    from pipeline.data.loader import eval_batches
    from pipeline.evaluate import Detail, RealLabels, evaluate
    from pipeline.inputs import eval_samples
    from pipeline.losses import make_loss
    from pipeline.parallel.world import World
    from pipeline.weights.trained import TrainedModel

    trained = TrainedModel.open(run_dir, which, ema, overrides)
    source = _eval_source(trained)
    labels = RealLabels.load(real) if real else None
    world = World.join()
    trained, predictor = _load(trained, world)
    config, classes = trained.config, trained.num_classes
    if source.classes and len(source.classes) > classes:
        raise UserError(f"{source.name} has {len(source.classes)} classes, the model {classes}: another label set?")
    batches = eval_batches(
        eval_samples(config, source, classes),
        rank=world.rank,
        world_size=world.size,
        batch_size=config.eval.batch_size or BATCH,
        num_workers=config.data.num_workers,
    )
    detail = Detail(classes, labels.of_samples(source, world) if labels else None)
    started = time.perf_counter()
    with progress_bar(len(batches), "evaluating", enabled=world.is_main) as advance:
        result = evaluate(
            predictor.logits,
            batches,
            make_loss(config.loss.name, config.loss.label_smoothing),
            world,
            advance,
            detail.add,
        )
    seconds = time.perf_counter() - started
    detail.reduce(world)
    speed = sum(world.gather(predictor.images_per_second(next(iter(batches)))))
    if world.is_main:
        names = source.classes or trained.class_names() or [str(i) for i in range(classes)]
        report: dict[str, Any] = {
            "step": trained.step,
            "weights": "ema" if ema else "raw",
            "data": source.name,
            **result.to_dict(),
            **({"real_top1": detail.real_top1, "real_samples": detail.real_samples} if labels else {}),
            "img_per_s": result.samples / seconds,
            "model_img_per_s": speed,
        }
        name = trained.folder / "eval" / f"step-{trained.step:08d}{'-ema' if ema else ''}"
        written = [name.with_suffix(".json")]
        replace_file(written[0], json.dumps(report, indent=1) + "\n")
        if write:
            written += detail.write(name, names)
        bad = f", {result.bad} unreadable" if result.bad else ""
        also = f", ReaL {detail.real_top1:.2%} (of {detail.real_samples:,})" if labels else ""
        print(
            f"{trained.reader.folder.name}{' (ema)' if ema else ''}: top-1 {result.top1:.2%}, "
            f"top-5 {result.top5:.2%}{also}, loss {result.loss:.4f} on {result.samples:,} samples of {source.name}{bad}"
        )
        print(f"{result.samples / seconds:,.0f} img/s with loading, {speed:,.0f} img/s of the model alone")
        if hard := detail.hardest(names):
            print(f"hardest classes: {', '.join(hard)}")
        print(f"written: {', '.join(map(str, written))}")
    world.leave()
    return 0


def run_fewshot(
    run_dir: str,
    data: str,
    test: str | None,
    which: str,
    ema: bool,
    overrides: list[str],
    shots: list[int],
    seeds: int,
    pool: int | None,
    l2: float,
) -> int:
    """The closed-form probe on frozen features: prints a table, writes it as JSON."""
    quiet_libraries()
    from pipeline.data.source import EVAL_SPLITS
    from pipeline.fewshot import FewShot
    from pipeline.inputs import permutation
    from pipeline.parallel.world import World
    from pipeline.weights.trained import TrainedModel

    trained = TrainedModel.open(run_dir, which, ema, overrides)
    config = trained.config
    fewshot = FewShot.of(
        _open(trained, data, "train"),
        _open(trained, test or data, *EVAL_SPLITS),
        image_size=config.model.image_size,
        channels=config.model.in_chans,
        pool=pool,
        order=permutation(config),
        shots=shots,
        seeds=range(seeds),
        l2=l2,
        batch_size=config.eval.batch_size or BATCH,
        num_workers=config.data.num_workers,
    )
    world = World.join()
    trained, predictor = _load(trained, world)
    with progress_bar(fewshot.num_batches // world.size, "features", enabled=world.is_main) as advance:
        result = fewshot.run(predictor.features, world, advance)
    if world.is_main:
        rows = [{"shots": s, "top1": result.mean(s), "std": result.spread(s)} for s in result.shots()]
        report = {
            "step": trained.step,
            "weights": "ema" if ema else "raw",
            "data": fewshot.train.source.name,
            "test": fewshot.test.source.name,
            "samples": result.samples,
            "seeds": seeds,
            "l2": l2,
            "fewshot": rows,
        }
        path = trained.folder / "eval" / f"fewshot-{trained.name}.json"
        replace_file(path, json.dumps(report, indent=1) + "\n")
        print(f"{trained.name}: {result.samples:,} test images of {fewshot.test.source.name}, {seeds} choices of shots")
        for row in rows:
            print(f"{row['shots']:>4}-shot  top-1 {row['top1']:.2%} ± {row['std']:.2%}")
        print(f"written: {path}")
    world.leave()
    return 0


def _load(trained: TrainedModel, world: World) -> tuple[TrainedModel, Predictor]:
    from pipeline.build import choose_strategy
    from pipeline.checkpoint.layout import CheckpointReader

    # Of a run in progress, ranks may see another last checkpoint
    trained = replace(trained, reader=CheckpointReader(world.broadcast(trained.reader.folder)))
    count = sum(p.numel() for p in trained.network("meta").parameters())
    strategy = choose_strategy(trained.config.train.strategy, count, world)
    return trained, trained.load(world, strategy)


def _eval_source(trained: TrainedModel) -> SampleSource:
    """data.val, else the val split of the training data."""
    from pipeline.data.source import EVAL_SPLITS
    from pipeline.inputs import open_training_data, open_val

    config = trained.config
    if config.data.val not in (None, "none"):
        return _open(trained, config.data.val, *EVAL_SPLITS)
    if config.data.train == "none":
        raise UserError(f"{trained.folder} was imported and has no data of its own: give data.val=FOLDER")
    config = replace(config, data=replace(config.data, val=None, subset=None))
    train = open_training_data(config).source
    source = open_val(config, train)
    if source is None:
        raise UserError(f"{train.name} has no val split: give one with data.val=FOLDER")
    return source


def _open(trained: TrainedModel, path: str, *splits: str) -> SampleSource:
    from pipeline.data.source import Access, TarSource, open_source

    size, classes = trained.config.model.image_size, trained.num_classes
    access = Access.of(trained.config)
    source = open_source(path, *splits, image_size=size, num_classes=classes, access=access)
    if isinstance(source, TarSource):
        source.sequential = "train" not in splits
    return source
