"""From a `Config` to its images: data sets opened, transforms, MixUp, the shape of a batch. No model, no engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data_tools.errors import UserError
from pipeline.config import Config, train_sets
from pipeline.config.sets import parse_share
from pipeline.data.augment import EvalTransform, TrainTransform
from pipeline.data.loader import PADDING, Batch, TrainSamples
from pipeline.data.mixup import MixUp
from pipeline.data.pixel_order import pixel_order
from pipeline.data.randaugment import RandAugment
from pipeline.data.region import require_region_decoder
from pipeline.data.sets import TrainingData, open_data
from pipeline.data.source import EVAL_SPLITS, Access, SampleSource, TarSource, open_source
from pipeline.data.stream import StreamSource, is_stream
from pipeline.fewshot import FewShot


def open_training_data(
    config: Config, folder: Path | None = None, checks: Callable[[str], bool] = lambda path: True
) -> TrainingData:
    """data.train with data.subset. Raises UserError.

    `folder` keeps which samples are in the subset; `checks(path)`: whether to look at every shard's size.
    """
    data, model = config.data, config.model

    def open_set(path: str) -> SampleSource:
        if is_stream(path):
            return StreamSource(
                path,
                samples=data.stream_samples,
                seed=config.run.seed,
                num_classes=model.num_classes,
                allow_pipe=data.allow_pipe,
            )
        access = Access.of(config, checks(path))
        return open_source(path, "train", image_size=model.image_size, num_classes=model.num_classes, access=access)

    sets = [(s.path, s.weight) for s in train_sets(data.train)]
    fraction = parse_share(data.subset) if data.subset else None
    return open_data(sets, open_set, share=data.subset, fraction=fraction, folder=folder)


def open_val(
    config: Config, train: SampleSource, checks: Callable[[str], bool] = lambda path: True
) -> SampleSource | None:
    """The evaluation split: data.val, else that of data.train (of its first set that has one), else none.

    It is called val, validation or test. `checks(path)`: whether to look at every shard's size.
    """
    path = config.data.val
    if path == "none":
        return None
    if path is None:
        sources = getattr(train, "sources", [train])
        paths = [s.path for s in train_sets(config.data.train)]
        path = next((p for p, s in zip(paths, sources) if set(EVAL_SPLITS) & set(s.splits)), None)
        if path is None:
            return None
    source = open_source(
        path,
        *EVAL_SPLITS,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        access=Access.of(config, checks(path)),
    )
    if isinstance(source, TarSource):
        source.sequential = True
    return source


def open_fewshot(config: Config, val: SampleSource | None) -> FewShot | None:
    """The probe of eval.fewshot. Raises UserError where it has one split only, or the run evaluates nothing."""
    path, m = config.eval.fewshot, config.model
    if path is None:
        return None
    if val is None:
        raise UserError("eval.fewshot belongs to the evaluations, and this run has no val split: give it data.val")
    splits = (("train",), EVAL_SPLITS)
    access = Access.of(config)
    opened = (open_source(path, *s, image_size=m.image_size, num_classes=m.num_classes, access=access) for s in splits)
    return FewShot.of(
        *opened,
        image_size=m.image_size,
        channels=m.in_chans,
        order=permutation(config),
        shots=config.eval.fewshot_shots,
        batch_size=config.eval.batch_size or 64,
        num_workers=config.data.num_workers,
    )


def num_classes(config: Config, source: SampleSource) -> int:
    """model.num_classes, else the data set's own number. Raises UserError where neither says, or they differ."""
    known = len(source.classes) if source.classes else None
    asked = config.model.num_classes
    if asked is None:
        asked = known or getattr(source, "num_classes", None)
    if asked is None:
        raise UserError(f"{source.name} does not name its classes: set model.num_classes")
    if known and asked < known:
        raise UserError(f"model.num_classes={asked}, but {source.name} has {known} classes; leave it out or raise it")
    return asked


def patch_size(config: Config) -> int | None:
    """Pixels of a patch's side, for pictures of the token grid; None for models without patches."""
    from pipeline.model import variants

    name = config.model.name
    return variants.resolve(name, **config.model.overrides()).patch_size if name in variants.names() else None


def train_transform(config: Config) -> TrainTransform:
    a = config.augment
    m = a.randaugment_magnitude
    if config.data.region_decode:
        require_region_decoder()
    return TrainTransform(
        config.model.image_size,
        config.run.seed,
        a.crop,
        (a.scale[0], a.scale[1]),
        (a.ratio[0], a.ratio[1]),
        a.hflip,
        None if m is None else RandAugment(a.randaugment_layers, m),
        permutation(config),
        config.data.scaled_decode,
        config.data.region_decode,
    )


def eval_samples(config: Config, source: SampleSource, classes: int) -> TrainSamples:
    e = config.eval
    transform = EvalTransform(config.model.image_size, e.crop_fraction, e.resize, e.method, permutation(config))
    return TrainSamples(source, transform, channels=config.model.in_chans, num_classes=classes)


def permutation(config: Config) -> np.ndarray | None:
    """Order of the pixels of every image; patches are the model's, or of 16 px where it has none (paper, figure 4)."""
    size, a = config.model.image_size, config.augment
    if a.permute == "none":
        return None
    return pixel_order(a.permute, size, a.permute_patch or patch_size(config) or 16, config.run.seed)


def mixup(config: Config) -> MixUp | None:
    a, batch = config.augment, config.train.global_batch_size
    return MixUp(a.mixup_alpha, a.mixup_group or batch, config.run.seed) if a.mixup_alpha else None


def blank_batch(config: Config, size: int, drops: int) -> Batch:
    """`size` slots of padding in the shape of real ones; `drops`: columns of the stochastic-depth masks."""
    side, channels = config.model.image_size, config.model.in_chans
    return Batch(
        torch.zeros(size, channels, side, side, dtype=torch.uint8),
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(size),
        torch.ones(size, drops),
        torch.full((size,), PADDING),
        torch.zeros(size, dtype=torch.int64),
        [],
        *((torch.arange(size), torch.ones(size)) if config.augment.mixup_alpha else (torch.arange(0), torch.ones(0))),
    )
