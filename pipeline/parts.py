"""The parts of a training, put together by `pipeline.build`, and how a checkpoint's state gets into them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader, InitialState, load_pieces
from pipeline.checkpoint.manager import CheckpointManager
from pipeline.checkpoint.place import place
from pipeline.config import Config
from pipeline.data.loader import Batch, Share, TrainSamples
from pipeline.data.mixup import MixUp
from pipeline.data.node_cache import CachePlan, NodeCache
from pipeline.data.order import Order
from pipeline.data.sets import TrainingData, unused_epoch
from pipeline.duration import Duration
from pipeline.ema import WeightAverage
from pipeline.fewshot import FewShot
from pipeline.inputs import blank_batch
from pipeline.losses import Loss
from pipeline.model import initial_values
from pipeline.parallel.engine import EMA, TrainEngine
from pipeline.parallel.world import World
from pipeline.run import RunFolder
from pipeline.weights.begin import ForeignWeights, advice
from pipeline.weights.shape import mismatches
from pipeline.weights.trained import newest_checkpoint


@dataclass(frozen=True)
class Schedule:
    """Every duration of the configuration in steps (int); what is of the `float` kind, in seconds."""

    total_steps: int
    warmup_steps: int
    log_every: int
    eval_every: int | None
    save_every: int | float
    keep_every: int | None
    agree_every: int
    pictures_every: int | float | None = None

    @staticmethod
    def of(config: Config, epoch_size: int, step: int = 0, samples: int = 0, on_cpu: bool = True) -> Schedule:
        """`step` and `samples` are those done so far. After a change of the batch size, what remains of a duration
        given in epochs or samples is counted in batches of the new size."""
        batch = config.train.global_batch_size

        def steps(text: str) -> int:
            return max(1, Duration.parse(text).to_steps(batch, epoch_size))

        duration = Duration.parse(config.train.duration)
        total = duration.to_steps(batch, epoch_size)
        if samples != step * batch and duration.unit != "steps":
            total = step + max(0, -(-(total * batch - samples) // batch))

        def steps_or_seconds(text: str) -> int | float:
            return Duration.parse(text).seconds() if Duration.parse(text).is_time else steps(text)

        pictures = config.logging.pictures_every
        return Schedule(
            total,
            Duration.parse(config.scheduler.warmup).to_steps(batch, epoch_size),
            steps(config.logging.every),
            steps(config.eval.every) if config.eval.every else None,
            steps_or_seconds(config.checkpoint.every),
            steps(config.checkpoint.keep_every) if config.checkpoint.keep_every else None,
            # Agreeing costs a round trip: nothing beside a CPU's step, something beside a GPU's
            1 if on_cpu else 10,
            steps_or_seconds(pictures) if pictures else None,
        )


@dataclass
class Parts:
    """What a `Trainer` works with."""

    config: Config
    world: World
    run: RunFolder
    engine: TrainEngine
    average: WeightAverage
    data: TrainingData
    order: Order
    share: Share
    schedule: Schedule
    train_samples: TrainSamples
    val_samples: TrainSamples | None
    loss_fn: Loss
    checkpoints: CheckpointManager
    mixup: MixUp | None = None
    cache: CachePlan | None = None
    allow: set[str] = field(default_factory=set)
    train_flops: float = 0.0  # per image
    peak_flops: float | None = None
    patch_size: int | None = None
    fewshot: FewShot | None = None

    def blank_batch(self) -> Batch:
        """A micro-batch of padding alone, in the shape of a real one."""
        rates = self.train_samples.drop_rates
        return blank_batch(self.config, self.share.micro_batch_size, 0 if rates is None else len(rates))

    def open_cache(self) -> NodeCache | None:
        """From now on samples are looked for in the node's cache first, which the node's first rank fills."""
        return self.cache.open(self.order) if self.cache else None

    def load(self, reader: CheckpointReader | None) -> dict[str, Any]:
        """Overwrites the engine's state from a checkpoint, or with a fresh run's. Returns the checkpoint's state.

        Raises:
            UserError: the checkpoint is of another model, or its data is not `data.train`.
        """
        if reader is None and self.config.run.init_from:
            return self._load_foreign(self.config.run.init_from)
        if reader is None:
            m = self.config.model
            source = InitialState(
                initial_values(
                    m.name,
                    self.train_samples.num_classes,
                    m.image_size,
                    self.engine.shapes,
                    seed=self.config.run.seed,
                    head_bias=self.config.loss.head_bias,
                    **m.overrides(),
                )
            )
            load_pieces(self.engine.pieces(), source)
            self.average.load(source, has=True)
            self.engine.finish_load(0)
            return {}
        state = reader.state()
        if "order" not in state:
            raise UserError(f"{self.run.path} holds imported weights, no run to go on with: see `mixer finetune`")
        self._check_model(reader)
        mine, theirs = self.run.identity(), state.get("run_id")
        if mine and theirs and mine != theirs:
            raise UserError(
                f"{reader.folder} belongs to another run: choose another checkpoint.dir or mirror, or begin with its "
                f"weights (run.init_from). If it is this run's after all, write {theirs} into {self.run.path}/run_id"
            )
        load_pieces(self.engine.pieces(), reader)
        self.average.load(reader, has=any(kind == EMA for _, kind in reader.manifest.tensors))
        self.engine.finish_load(state["optimizer_step"])
        batch = self.config.train.global_batch_size
        stored = state["order"]
        if not self.data.matches(stored) and "data.train" in self.allow:
            self.order.state = replace(self.order.state, epoch=unused_epoch(stored))
        else:
            self.order = self.data.resume(stored, global_batch_size=batch, facts=self.run.data)
        self.schedule = Schedule.of(
            self.config, self.order.num_samples, state["step"], state["samples"], self.world.device.type == "cpu"
        )
        return state

    def _load_foreign(self, where: str) -> dict[str, Any]:
        """A new run from another run's weights: step 0, own order and schedule; moments only if asked for."""
        folder = newest_checkpoint(place(where, self.config.checkpoint.storage_options))
        reader = CheckpointReader(folder)
        damage = reader.damage(reader.manifest.files[self.world.rank :: self.world.size])
        damage = next((d for d in self.world.gather(damage) if d), None)
        if damage:
            raise UserError(f"run.init_from: {damage}")
        c = self.config.run
        if c.init_optimizer:
            self._check_model(reader)
            load_pieces(self.engine.pieces(), reader)
            self.average.load(reader, has=any(kind == EMA for _, kind in reader.manifest.tensors))
            self.engine.finish_load(reader.state()["optimizer_step"])
            return {}
        source = ForeignWeights(
            reader,
            self.engine.shapes,
            patch_size=self.patch_size,
            new_head=c.init_head == "zero",
            head_bias=self.config.loss.head_bias,
            average=c.init_ema,
        )
        wrong = mismatches(source.shapes(), self.engine.shapes)
        if wrong:
            hints = advice(source, self.engine.shapes)
            raise UserError("\n".join([f"run.init_from: {folder} is of another model:", *wrong, *hints]))
        load_pieces(self.engine.pieces(), source)
        self.average.load(source, has=False)
        self.engine.finish_load(0)
        if source.tiles > 1 and self.world.is_main:
            print(f"token MLPs grown for {source.tiles}x{source.tiles} tiles (paper, appendix C)", flush=True)
        return {}

    def _check_model(self, reader: CheckpointReader) -> None:
        mine, stored = self.engine.tensors(), reader.manifest.tensors
        for (name, kind), shape in mine.items():
            if stored.get((name, kind)) != shape:
                there = list(stored[name, kind]) if (name, kind) in stored else "nothing"
                raise UserError(
                    f"{reader.folder} is of another model: {kind} of {name} is {list(shape)} here and "
                    f"{there} there. Take the run's own configuration ({self.run.config})"
                )

    def written_by(self) -> dict[str, Any]:
        """Who trains here, for checkpoints and events."""
        return {"world_size": self.world.size, "strategy": self.config.train.strategy}

    def order_facts(self) -> dict[str, Any]:
        """What an audit needs to know of a start: where in the order it began."""
        return {
            "order": self.order.state.to_dict(),
            "data": {"train": self.config.data.train, "subset": self.config.data.subset},
            "global_batch_size": self.config.train.global_batch_size,
        }
