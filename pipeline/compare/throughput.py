"""Images a second of several models side by side on one device: forward pass, and whole training step.

What is timed is the pipeline's own engine (`ddp` of one rank): normalised uint8 images, autocast, loss, backward pass,
clipping, AdamW. Data are random pixels that lie on the device already, so loading is in no figure.

Ratios are what counts, and a machine's clock and neighbours drift. So each model's batch size is chosen first (the
fastest, as in the paper), and then rounds go over all models, in turns forwards and backwards; a model's figure is the
median of its rounds, a ratio the median of the ratios within each round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data_tools.errors import UserError
from pipeline.compare.report import LETTERS, shape_label
from pipeline.data.loader import PADDING, Batch
from pipeline.losses import make_loss
from pipeline.micro_batch import is_out_of_memory
from pipeline.model import ModelCost, create_model, model_cost
from pipeline.optim import param_groups
from pipeline.parallel.engine import EngineOptions, TrainEngine, make_engine
from pipeline.parallel.world import World

INFERENCE, TRAINING = "inference", "training"
MODES = (INFERENCE, TRAINING)
# One of each family, in two sizes where the paper has Mixer and ViT in two; HaloNet's attention wants 256 pixels
MODELS = (
    "mixer_b16", "timm/vit_base_patch16_224", "mixer_l16", "timm/vit_large_patch16_224", "timm/resnetv2_50x1_bit",
    "timm/halonet_h1@256", "timm/dm_nfnet_f0",
)  # fmt: skip
# The same families so small that a CPU times them in seconds
SMALL = (
    "mixer_s16@64:hidden_dim=64,num_blocks=2,tokens_mlp_dim=32,channels_mlp_dim=256",
    "timm/vit_small_patch16_224@64:hidden_dim=64,num_blocks=2",
    "timm/resnetv2_50x1_bit@64:hidden_dim=128,num_blocks=1",
    "timm/halonet26t@256",
    "timm/test_nfnet@64",
)
_TRIAL_SECONDS = 0.3  # to choose a batch size


@dataclass(frozen=True)
class Candidate:
    """A model to be timed: written NAME[@PIXELS][:KEY=VALUE,...] with keys of `model.*`."""

    model: str
    size: int
    overrides: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def parse(text: str, size: int) -> Candidate:
        """size: pixels where the text says none. Raises UserError."""
        head, _, settings = text.partition(":")
        name, _, pixels = head.partition("@")
        overrides = {}
        try:
            size = int(pixels) if pixels else size
            for setting in filter(None, settings.split(",")):
                key, _, value = setting.partition("=")
                if key not in LETTERS:
                    raise UserError(f"{text}: there is no setting {key}; one of {', '.join(LETTERS)}")
                overrides[key] = int(value)
        except ValueError:
            raise UserError(f"{text} is no model: write NAME, NAME@PIXELS or NAME@PIXELS:hidden_dim=64") from None
        return Candidate(name, size, overrides)

    @property
    def name(self) -> str:
        return self.model.removeprefix("timm/")

    @property
    def shape(self) -> str:
        """What is overridden: "C=64 L=2 "; empty where nothing is."""
        shape = shape_label(self.overrides)
        return f"{shape} " if shape else ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.shape}".rstrip()


@dataclass(frozen=True)
class Options:
    """How to measure. seconds: of each model, mode and round."""

    batch_sizes: Sequence[int]
    precision: str = "bf16"
    compile: str = "none"
    rounds: int = 5
    seconds: float = 1.0
    num_classes: int = 1000
    channels_last: bool = False  # of convolutional networks


@dataclass
class Timing:
    """One model's figures. rates[mode]: images a second in each round; empty where no batch size fitted."""

    candidate: Candidate
    cost: ModelCost
    batch_size: dict[str, int] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})

    def rate(self, mode: str) -> float | None:
        """Images a second: the median of the rounds."""
        return statistics.median(self.rates[mode]) if self.rates[mode] else None

    def spread(self, mode: str) -> float:
        """Slowest to fastest round, as a share of the median."""
        rates = self.rates[mode]
        return (max(rates) - min(rates)) / statistics.median(rates) if rates else 0.0

    def ratio(self, other: Timing, mode: str) -> float | None:
        """To another model's rate: the median over rounds, in each of which both were measured."""
        pairs = list(zip(self.rates[mode], other.rates[mode]))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def mfu(self, mode: str, peak: float | None) -> float | None:
        """Share of the device's peak; GEMMs and convolutions alone are counted."""
        rate, macs = self.rate(mode), self.cost.forward_macs
        return rate * macs * (2 if mode == INFERENCE else 6) / peak if rate and peak else None


class Bench:
    """One model on the device, ready to be timed."""

    def __init__(self, candidate: Candidate, options: Options, world: World):
        self.candidate, self.options, self.world = candidate, options, world
        self._turn_s: dict[tuple[str, int], float] = {}
        self._engine = self._build()

    def rebuild(self) -> None:
        """After running out of memory in the middle of a step."""
        del self._engine
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self._engine = self._build()

    def time(self, mode: str, batch_size: int, seconds: float) -> float:
        """Images a second over about so long. What is compiled, tuned or allocated in first turns is not timed."""
        batch = self._batch(batch_size)
        warm_up = 1 if (mode, batch_size) in self._turn_s else 3
        for _ in range(warm_up):
            last = self._elapsed(mode, batch, 1)
        turns = max(1, round(seconds / self._turn_s.get((mode, batch_size), last)))
        elapsed = self._elapsed(mode, batch, turns)
        self._turn_s[mode, batch_size] = elapsed / turns
        return turns * batch_size / elapsed

    def _build(self) -> TrainEngine:
        c, o = self.candidate, self.options
        model: Any = create_model(c.model, o.num_classes, c.size, device="cpu", **c.overrides)
        if self._channels_last(model):
            model.to(memory_format=torch.channels_last)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        options = EngineOptions("ddp", o.precision, 1, 1, 1, (0.9, 0.999), 1e-8, 1.0, o.compile)
        engine = make_engine(model, param_groups(model, 0.1), make_loss("sigmoid_xent"), options, self.world)
        with torch.no_grad():  # the engine has set them to zero, and a GPU is faster at computing with zeros
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in values:
                    tensor.copy_(values[name].view(tensor.shape))
        return engine

    def _channels_last(self, model: torch.nn.Module) -> bool:
        convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
        return self.options.channels_last and convolutions > 1  # a ViT's or Mixer's only one cuts patches

    def _batch(self, size: int) -> Batch:
        side, device = self.candidate.size, self.world.device
        images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
        if self._channels_last(self._engine.model):
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, self.options.num_classes, (size,), device=device)
        nothing = torch.full((size,), PADDING)
        return Batch(images, labels, torch.ones(size, device=device), torch.empty(size, 0), nothing, nothing, [])

    def _elapsed(self, mode: str, batch: Batch, turns: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(turns):
            if mode == INFERENCE:
                self._engine.predict(batch)
            else:
                self._engine.train_step([batch], lr=1e-6)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    candidates: Sequence[Candidate], options: Options, world: World, say: Callable[[str], None] = lambda text: None
) -> list[Timing]:
    """Times all candidates, interleaved.

    Raises:
        UserError: a model that does not exist, does not take its image size, or for which no batch fits.
    """
    timings = [Timing(c, cost_of(c, options.num_classes)) for c in candidates]
    benches = []
    for timing in timings:
        try:
            bench = Bench(timing.candidate, options, world)
            benches.append(bench)
            for mode in MODES:
                _choose_batch_size(bench, timing, mode)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            names = ", ".join(t.candidate.label for t in timings[: len(benches)])
            raise UserError(
                f"no memory left for {timing.candidate.label} beside {names}: compare fewer models at once"
            ) from e
        chosen = ", ".join(f"{size} for {mode}" for mode, size in timing.batch_size.items())
        say(f"{timing.candidate.label}: batch size {chosen}")
    for number in range(options.rounds):
        turn = list(zip(benches, timings))
        for bench, timing in reversed(turn) if number % 2 else turn:
            for mode, size in timing.batch_size.items():
                timing.rates[mode].append(bench.time(mode, size, options.seconds))
        say(f"round {number + 1} of {options.rounds}")
    return timings


def cost_of(candidate: Candidate, num_classes: int) -> ModelCost:
    """Parameters and MACs. Raises UserError for what does not exist or does not take its image size."""
    try:
        return model_cost(candidate.model, num_classes, candidate.size, **candidate.overrides)
    except (AssertionError, RuntimeError, ValueError) as e:  # timm's own checks; HaloNet's says nothing
        raise UserError(
            f"{candidate.label} does not take images of {candidate.size} px{f' ({e})' if str(e) else ''}: "
            f"write another size, such as {candidate.model}@256"
        ) from e


def _choose_batch_size(bench: Bench, timing: Timing, mode: str) -> None:
    """The fastest of those that fit."""
    best, seconds = 0.0, _TRIAL_SECONDS if len(bench.options.batch_sizes) > 1 else 0.0
    for size in sorted(bench.options.batch_sizes):
        rate = None
        try:
            rate = bench.time(mode, size, seconds)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        if rate is None:  # out here, where the error no longer holds the memory of the failed step
            bench.rebuild()
            break  # nor would larger ones fit
        if rate > best:
            best, timing.batch_size[mode] = rate, size
    if mode not in timing.batch_size:
        raise UserError(
            f"{timing.candidate.label}: {min(bench.options.batch_sizes)} images do not fit for {mode}; "
            "give smaller --batch-size"
        )
