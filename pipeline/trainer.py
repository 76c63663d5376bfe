"""The training loop. It knows a `TrainEngine` and never asks which; `pipeline.build` puts the parts together.

One step: micro-batches from the loader -> engine -> ledger -> now and then metrics, evaluation, checkpoint. What
the ranks must decide together (save now, stop now, too many bad samples) is agreed upon in `_agree`, by one small
all-reduce.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from data_tools.errors import UserError
from pipeline.build import Parts
from pipeline.checkpoint.layout import CheckpointError, CheckpointReader
from pipeline.checkpoint.manager import best_score, score, step_folder
from pipeline.checkpoint.stager import BackgroundSaver, SaveResult
from pipeline.data.feed import Feed
from pipeline.data.loader import Batch, eval_batches, masked_slots, step_digest, train_batches
from pipeline.data.node_cache import NodeCache
from pipeline.duration import Duration
from pipeline.evaluate import EvalResult, evaluate
from pipeline.health import EXIT_HUNG, SickSteps, Watchdog, slowest_rank
from pipeline.ledger import LedgerWriter
from pipeline.logs import StartLogs
from pipeline.metrics import Display, MetricWriter
from pipeline.micro_batch import is_out_of_memory, out_of_memory_message
from pipeline.optim import lr_scale
from pipeline.parallel.engine import WEIGHT, StepStats
from pipeline.pictures import tile_grid
from pipeline.pulse import Pulse
from pipeline.run import read_lines
from pipeline.stop import StopFlag
from pipeline.takeover import accept_data
from pipeline.weights.filters import training_pictures
from pipeline.weights.trained import features_of

Outcome = Literal["finished", "stopped"]
RETRY_SAVE_SECONDS = 60.0
LOOK_FOR_STOP_SECONDS = 2.0
MAX_ROLLBACKS = 3  # to one checkpoint


@dataclass
class Clock:
    """Wall time of the steps since the last log line, and the parts of it that were not computation."""

    since: float
    steps: int = 0
    data_wait: float = 0.0
    last_wait: float = 0.0
    stall: float = 0.0  # saving

    @staticmethod
    def now() -> Clock:
        return Clock(time.perf_counter())


class Trainer:
    """Trains one run from wherever it stands to its end. Collective: every rank runs the same."""

    def __init__(
        self,
        parts: Parts,
        *,
        flag: StopFlag | None = None,
        quiet: bool = False,
        logs: StartLogs | None = None,
        pulse: Pulse | None = None,
    ):
        self.parts, self.config, self.world = parts, parts.config, parts.world
        self.engine, self.run, self.schedule = parts.engine, parts.run, parts.schedule
        self.step = self.samples = 0  # completed so far
        self.metrics: dict[str, float] = {}  # of the last evaluation, valid at `self.evaluated_at`
        self.evaluated_at = self.saved_at = self._save_begun_at = -1
        self.bad_samples = 0
        self.flag = flag or StopFlag().install()
        self.logs, self._pulse = logs or StartLogs(self.run.path / "logs" / "local.0"), pulse or Pulse(None)
        self._look_for_stop_at = 0.0
        self._last_save, self._retry_save_at = time.monotonic(), math.inf
        h = self.config.health
        self.sick = SickSteps(h.max_skipped, h.spike_factor)
        self._cache: NodeCache | None = None
        self._positions: dict[int, tuple[int, int]] = {}  # step -> (epoch, position), of the latest steps
        self._own_seconds: list[float] = []
        self._rollbacks: dict[int, int] = {}
        self._pictures_at: tuple[int, float] | None = None  # step and clock of the last pictures of the weights
        self._watchdog = Watchdog(math.inf, self.logs.stacks(self.world.rank), enabled=False)  # until it starts
        self._display = Display(0, 0, quiet=True)
        self._quiet = quiet or not self.world.is_main
        self._writer: MetricWriter | None = None

    # -- the loop ---------------------------------------------------------------------------------------------

    def train(self, stop_at: int | None = None) -> Outcome:
        """Until the end of the schedule, a signal, or `stop_at` completed steps. The state is saved in any case.

        Raises:
            UserError: more bad samples than `data.max_bad_fraction` allows; the run is saved first. Or out of memory.
        """
        try:
            return self._train(stop_at)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            message = out_of_memory_message(self.config, self.step, self.parts.share.micro_batch_size)
            raise UserError(f"rank {self.world.rank}: {message}") from e
        finally:
            self._watchdog.stop()
            self._display.close()
            if self._cache:
                self._cache.close()

    def _train(self, stop_at: int | None) -> Outcome:
        self._start()
        end = min(self.schedule.total_steps, stop_at or self.schedule.total_steps)
        stop = self.step >= end
        while not stop:
            with contextlib.closing(Feed(self._batches, self._say_of_rank)) as feed:
                while not (stop or self.sick.must_roll_back):
                    batches = self._next(feed)
                    stop = batches is None or self._step(batches, end)
            if not stop:
                self._roll_back()
        return self._end()

    def _next(self, feed: Feed) -> list[Batch] | None:
        """This step's micro-batches, once every rank has its own; None, after a save, where somebody wants to stop.

        Until all have them nobody begins the step: so a rank that cannot read can end the run between two steps.

        Raises:
            UserError: data could not be read, on whichever rank; the run is saved first.
        """
        started = time.perf_counter()
        self._wait_for_data()
        got = feed.next(give_up=lambda: self.flag.name is not None)
        failure = got if isinstance(got, UserError) else None
        stop, failed = self.world.sum([got is None, failure is not None])
        self._watchdog.beat()
        self._clock.last_wait = time.perf_counter() - started
        self._clock.data_wait += self._clock.last_wait
        if failed:
            failure = next(f for f in self.world.gather(failure) if f)
            self._save()
            self._finish_saving()
            if self.world.is_main:
                self.run.record("unreadable", attempt=self.attempt, step=self.step, why=str(failure))
                self._write_status("saved")
            raise type(failure)(
                f"{failure}; saved at step {self.step}: when that is mended, `mixer resume {self.run.path}`"
            )
        if stop:
            self._save()
            return None
        assert isinstance(got, list)
        return got

    def _step(self, batches: list[Batch], end: int) -> bool:
        """One optimizer step and what is due after it. True when training ends here."""
        self._show_batch(batches[0])
        stats, norm = self.engine.train_step(batches, self.learning_rate(self.step), self.step)
        self._complete_step(batches)
        self.sick.add(self.step, stats.loss, stats.weight, norm)
        self._watchdog.step(self.step, self._own_seconds[-1])
        if self._due(self.schedule.log_every):
            self._log(stats, norm)
        else:
            self._display.step(self.step)
        finished = self.step >= end
        if finished or (self.schedule.eval_every and self._due(self.schedule.eval_every)):
            self._evaluate()
        save, stop = self._agree()
        best = self._is_best()
        # Nobody should resume into the middle of sick steps; at the end it is the last healthy state that is saved
        if stop or finished or ((save or best) and not self.sick.in_a_row):
            self._save()
        return finished or stop

    def learning_rate(self, step: int) -> float:
        """Of update number `step`, counted from 0."""
        c = self.config.scheduler
        return self.config.optimizer.lr * lr_scale(
            step,
            total_steps=self.schedule.total_steps,
            warmup_steps=self.schedule.warmup_steps,
            name=c.name,
            end_factor=c.end_factor,
        )

    def _say_of_rank(self, text: str) -> None:
        print(f"rank {self.world.rank}: {text}", flush=True)

    def _wait_for_data(self) -> None:
        """The watchdog leaves the end of a wait to data.read_timeout; an index may be read before a sample."""
        self._watchdog.beat(grace=2 * Duration.parse(self.config.data.read_timeout).seconds() + 60)

    def _batches(self) -> Iterator[list[Batch]]:
        return train_batches(
            self.parts.train_samples,
            self.parts.order,
            self.parts.share,
            num_workers=self.config.data.num_workers,
            pin_memory=self.world.device.type == "cuda",
            mixup=self.parts.mixup,
        )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.schedule.total_steps

    def _complete_step(self, batches: list[Batch]) -> None:
        """Books the step: ledger, order, average, counts."""
        order, share = self.parts.order, self.parts.share
        self._own_seconds.append(self.engine.own_seconds + self._clock.last_wait)
        errors = masked_slots(share, batches)
        digest = step_digest(order.state.position, share, batches)
        self._ledger.add(self.step + 1, order.state.epoch, order.state.position, digest, errors)
        if errors:
            self.bad_samples += len(errors)
            print(f"rank {self.world.rank}: bad sample, counted with weight 0: {errors[0][2]}", flush=True)
        self._positions[self.step + 1] = order.state.epoch, order.state.position
        self._positions.pop(self.step + 1 - 10 * self.sick.max_in_a_row - 100, None)
        order.state = order.next_state(order.state)
        if self._cache:
            self._cache.progress(order.state)
        self.parts.average.update()
        self.step += 1
        self.samples += self.config.train.global_batch_size
        self._clock.steps += 1

    def _agree(self) -> tuple[bool, bool]:
        """(save now, stop now), the same on all ranks; looked at every few steps only, where steps are short."""
        every, keep = self.schedule.save_every, self.schedule.keep_every
        saving = (isinstance(every, int) and self._due(every)) or bool(keep and self.step % keep == 0)
        if not saving and self.step % self.schedule.agree_every and self.step < self.schedule.total_steps:
            return False, False
        self._book(self.saver.poll())
        for step, why in self.sick.look(self.world):
            if self.world.is_main:
                self.run.record("sick", attempt=self.attempt, step=step, why=why)
                self._display.say(f"warning: step {step}: {why}")
        now = time.monotonic()
        # What depends on a clock is rank 0's to say
        overdue = now >= self._retry_save_at or (isinstance(every, float) and now - self._last_save >= every)
        due = saving or (self.world.is_main and overdue)
        self._look_for_stop()
        save, stop, bad = self.world.sum([due, self.flag.name is not None, self.bad_samples])
        seen = max(self.samples, self.parts.order.num_samples)
        if bad > self.config.data.max_bad_fraction * seen:
            self._save()
            self._finish_saving()
            raise UserError(
                f"{int(bad)} samples could not be read, more than data.max_bad_fraction="
                f"{self.config.data.max_bad_fraction:g} of {seen:,}; see `masked` in {self.run.path}/ledger, check the "
                "set with `mixer data verify`, or raise the limit and `mixer resume`"
            )
        return save > 0, stop > 0

    def _look_for_stop(self) -> None:
        """`mixer stop` leaves a file, which also reaches a run on another machine; rank 0 looks, all agree."""
        if self.world.is_main and time.monotonic() >= self._look_for_stop_at:
            self._look_for_stop_at = time.monotonic() + LOOK_FOR_STOP_SECONDS
            if self.run.stop_request() == "save":  # for "now" the pulses look, also while this thread hangs
                self.flag.name = self.flag.name or "mixer stop"

    # -- start and end ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Fresh start or resume: the same procedure, only the source of the state differs."""
        parts, world = self.parts, self.world
        started = time.perf_counter()
        timeout = Duration.parse(self.config.health.timeout).seconds()
        self._watchdog = Watchdog(
            timeout,
            self.logs.stacks(world.rank),
            pulse=self._pulse,
            on_hang=lambda error: self.logs.write_error(world.rank, error, EXIT_HUNG),
        )
        self.saver = BackgroundSaver(parts.checkpoints, world, background=self.config.checkpoint.background)
        self.engine.warm_up(parts.blank_batch())
        with self._watchdog.paused("loading"):
            reader = parts.checkpoints.newest_good(warn=self._warn_damage)
            state = parts.load(reader)
        self.step, self.samples = state.get("step", 0), state.get("samples", 0)
        self.schedule = parts.schedule
        self.saved_at = self._save_begun_at = self.step if reader else -1
        if reader and reader.manifest.metrics:
            self.metrics, self.evaluated_at = reader.manifest.metrics, self.step
        self.saver.prepare([*self.engine.owned(), *parts.average.pieces()])
        running = self.engine.verify()
        self.attempt = world.broadcast(self.run.next_attempt() if world.is_main else None)
        self._ledger = self._open_ledger()
        parts.checkpoints.clean()
        self._display = Display(self.schedule.total_steps, self.step, self._quiet)
        facts = {
            **self._order_facts(),
            "logs": self.logs.name,
            "hosts": sorted(set(world.gather(socket.gethostname()))),
            "attempt": self.attempt,
            "step": self.step,
            "world_size": world.size,
            "strategy": self.config.train.strategy,
            "running": running,
            "device": str(world.device),
        }
        if world.is_main:
            parts.data.record(self.run.data)
            accept_data(self.run, self.config)
            previous = state.get("written_by", {})
            event = "resume" if reader else "start"
            self.run.record(event, **facts, previous=previous, seconds=round(time.perf_counter() - started, 3))
            self._open_writer()
            self._display.say(parts.summary(running, self.step, previous if reader else None))
            self._write_status("training")
        self._cache = parts.open_cache()
        world.barrier()  # nobody reads before the first chunks are on their way
        self._pulse.enter("training")
        self._clock = Clock.now()
        self._last_save = time.monotonic()
        self._show_next_batch = True

    def _open_ledger(self, unwritten: bytes = b"") -> LedgerWriter:
        """For this attempt; `unwritten` is what the previous one's writer could not write."""
        share = self.parts.share
        return LedgerWriter(
            self.run.ledger,
            self.world.rank,
            attempt=self.attempt,
            first=share.first,
            last=share.last,
            batch=self.config.train.global_batch_size,
            unwritten=unwritten,
        )

    def _open_writer(self) -> None:
        """A writer for this attempt: what earlier ones wrote beyond this step is purged from the curves."""
        if self._writer:
            self._writer.close()
        self._pictures_at = None
        self._writer = MetricWriter(
            self.run,
            attempt=self.attempt,
            first_step=self.step,
            to=self.config.logging.to,
            run_name=self.config.run.name,
            config=asdict(self.config),
        )

    def _end(self) -> Outcome:
        self._finish_saving()
        finished = self.step >= self.schedule.total_steps
        outcome: Outcome = "finished" if finished else "stopped"
        if self.world.is_main:
            name = self.flag.name
            if finished:
                self.run.finished.write_text(f"step {self.step}\n")
                if not any(e["event"] == "finish" and e["step"] == self.step for e in read_lines(self.run.events)):
                    self.run.record("finish", attempt=self.attempt, step=self.step, metrics=self.metrics)
            elif name:
                self.run.record("signal", attempt=self.attempt, step=self.step, name=name)
            self._write_status("finished" if finished else "saved")
            self._display.close()
            if name and not finished:
                self._display.say(f"saved at step {self.step} after {name}; go on with `mixer resume {self.run.path}`")
            elif not finished:
                self._display.say(f"saved at step {self.step}")
            elif self.evaluated_at == self.step:
                self._display.say(
                    f"finished: {self.step} steps, top-1 {self.metrics['top1']:.2%}, "
                    f"top-5 {self.metrics['top5']:.2%} of {self.metrics['samples']:.0f} val samples"
                )
            else:
                self._display.say(f"finished: {self.step} steps; evaluate with `mixer eval {self.run.path}`")
            if self._writer:
                self._writer.close()
        self.world.barrier()
        return outcome

    # -- now and then -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begins to save this step, once; what is written is a copy, so training goes on meanwhile."""
        if self._save_begun_at == self.step:
            return
        started = time.perf_counter()
        self._save_begun_at = self.step
        self._ledger.sync()
        metrics = self.metrics if self.evaluated_at == self.step else {}
        slow = self.saver.busy
        with self._watchdog.paused("saving"):  # the one before may be slow
            previous = self.saver.save(
                self.step,
                [*self.engine.owned(), *self.parts.average.pieces()],
                tensors=self.engine.tensors() | self.parts.average.tensors(),
                state=self.state(),
                metrics=metrics,
                written_by={**self._written_by(), "attempt": self.attempt, "best": self.config.checkpoint.best},
            )
        self._last_save, self._retry_save_at = time.monotonic(), math.inf
        stall = time.perf_counter() - started
        self._clock.stall += stall
        if slow and previous and self.world.is_main:
            self.run.record("slow_save", attempt=self.attempt, step=previous.step, seconds=round(previous.seconds, 3))
            self._display.say(
                f"warning: saving step {previous.step} took {previous.seconds:.1f} s, until after the next was due; "
                f"training waited {stall:.1f} s: save less often, or to a faster disk"
            )
        self._book(previous)

    def _book(self, result: SaveResult | None) -> None:
        """Takes note of how a save ended. A failed one warns and is tried again; the last good checkpoint stays."""
        if result is None:
            return
        if result.error:
            self._retry_save_at = time.monotonic() + RETRY_SAVE_SECONDS
            if self._save_begun_at == result.step:
                self._save_begun_at = -1
            if self.world.is_main:
                self.run.record("save_failed", attempt=self.attempt, step=result.step, why=result.error)
                self._display.say(
                    f"warning: checkpoint at step {result.step} failed, the previous one stays: {result.error}"
                )
            return
        self.saved_at = result.step
        if self.world.is_main and result.warning:
            self.run.record("mirror_failed", attempt=self.attempt, step=result.step, why=result.warning)
            self._display.say(f"warning: {result.warning}")
        if self.world.is_main:
            seconds = {"seconds": round(result.seconds, 3), "stall": round(result.stall, 4)}
            self.run.record("save", attempt=self.attempt, step=result.step, **seconds, **self._written_by())
            # Pruned, out of reach, or of tokens that are no square: it is only a picture
            with contextlib.suppress(CheckpointError, OSError, UserError):
                self._show_weights(result.step)

    def _finish_saving(self) -> None:
        """Waits for the save in flight; tries again where the last one failed.

        Raises:
            CheckpointError: this step could not be saved in three tries.
        """
        tries = 3
        while True:
            with self._watchdog.paused("saving"):
                result = self.saver.wait()
            self._book(result)
            if self._save_begun_at == self.step:
                return
            if not tries:
                raise CheckpointError(
                    f"step {self.step} could not be saved; {self.run.path} stands at step {self.saved_at}. See "
                    f"save_failed in {self.run.events}, then `mixer resume {self.run.path}`"
                )
            tries -= 1
            self._save()

    def _order_facts(self) -> dict[str, Any]:
        """What an audit needs to know of a start: where in the order it began."""
        return {
            "order": self.parts.order.state.to_dict(),
            "data": {"train": self.config.data.train, "subset": self.config.data.subset},
            "global_batch_size": self.config.train.global_batch_size,
        }

    def _written_by(self) -> dict[str, Any]:
        return {"world_size": self.world.size, "strategy": self.config.train.strategy}

    def _roll_back(self) -> None:
        """Back to the last good checkpoint, and past the samples on which training went wrong.

        Raises:
            UserError: there is no checkpoint to go back to.
        """
        first, last = self.sick.in_a_row[0], self.sick.in_a_row[-1]
        batch = self.config.train.global_batch_size
        skips = tuple((epoch, at, at + batch) for epoch, at in (self._positions[s] for s in range(first, last + 1)))
        self.sick.forget()
        with self._watchdog.paused("saving"):
            result = self.saver.wait()
        self._book(result)
        reader = self.parts.checkpoints.newest_good(warn=self._warn_damage)
        if reader is None:
            raise UserError(
                f"steps {first} to {last} had no finite update and there is no checkpoint to go back to: "
                "lower optimizer.lr, lengthen scheduler.warmup, or look at the data"
            )
        earlier = self.parts.order.state.skips  # of rollbacks that the checkpoint does not know of yet
        with self._watchdog.paused("loading"):
            state = self.parts.load(reader)
        order = self.parts.order
        skips = tuple(dict.fromkeys((*order.state.skips, *earlier, *skips)))
        order.state = order.settle(replace(order.state, skips=skips))
        if self._cache:
            self._cache.progress(order.state)
        self._rollbacks[state["step"]] = self._rollbacks.get(state["step"], 0) + 1
        if self._rollbacks[state["step"]] > MAX_ROLLBACKS:
            raise UserError(
                f"{MAX_ROLLBACKS} times back to step {state['step']} and sick again: it is not the samples. Lower "
                "optimizer.lr or look at the model, then `mixer resume`"
            )
        self.step, self.samples = state["step"], state["samples"]
        self.saved_at = self._save_begun_at = self.step
        self.metrics = dict(reader.manifest.metrics)
        self.evaluated_at = self.step if self.metrics else -1  # what was evaluated beyond is of weights undone
        self.attempt = self.world.broadcast(self.run.next_attempt() if self.world.is_main else None)
        self._ledger = self._open_ledger(self._ledger.unwritten)
        if self.world.is_main:
            self.run.record(
                "rollback",
                attempt=self.attempt,
                step=self.step,
                sick=[first, last],
                skipped=skips,
                **self._written_by(),
                **self._order_facts(),
            )
            self._open_writer()
            self._display.say(
                f"steps {first} to {last} had no healthy update: back to step {self.step}, and past their samples"
            )
        self._clock = Clock.now()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "run_id": self.run.identity(),
            "step": self.step,
            "samples": self.samples,
            "optimizer_step": self.engine.optimizer_step,
            "order": self.parts.order.state.to_dict(),
            "global_batch_size": self.config.train.global_batch_size,
            "written_by": self._written_by(),
        }

    def _evaluate(self) -> None:
        if self.parts.val_samples is None or self.evaluated_at == self.step:
            return
        started = time.perf_counter()
        batches = eval_batches(
            self.parts.val_samples,
            rank=self.world.rank,
            world_size=self.world.size,
            batch_size=self.config.eval.batch_size or self.parts.share.micro_batch_size,
            num_workers=self.config.data.num_workers,
        )
        with self._watchdog.busy("evaluating"):
            self._wait_for_data()
            self.engine.share_buffers()
            try:
                result: EvalResult = evaluate(
                    self.engine.predict, batches, self.parts.loss_fn, self.world, on_batch=self._wait_for_data
                )
                few = self._few_shot(self._wait_for_data)
            except UserError as e:  # training needs no evaluation; if its data is out of reach too, it says so itself
                if self.world.is_main:
                    self.run.record("eval_failed", attempt=self.attempt, step=self.step, why=str(e))
                    self._display.say(f"warning: no evaluation at step {self.step}: {e}")
                return
        self.metrics, self.evaluated_at = result.to_dict() | few, self.step
        if self.world.is_main and self._writer:
            self._writer.scalars(self.step, self.metrics | {"samples_seen": self.samples}, split="val")
            self.run.record("eval", attempt=self.attempt, step=self.step, **self.metrics)
            shots = "".join(f", {name.removeprefix('fewshot_')}-shot {top1:.2%}" for name, top1 in few.items())
            self._display.say(
                f"step {self.step}: val top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
                f"loss {result.loss:.4f} on {result.samples:,} samples{shots}"
            )
        # not computation of the loop: leave it out of img/s
        self._clock.since += time.perf_counter() - started

    def _few_shot(self, beat: Callable[[], None]) -> dict[str, float]:
        """`fewshot_5` and the like: top-1 of probes on the features as they are now."""
        if self.parts.fewshot is None:
            return {}
        result = self.parts.fewshot.run(features_of(self.engine.model, self.engine.predict), self.world, beat)
        return {f"fewshot_{n}": result.mean(n) for n in result.shots()}

    def _is_best(self) -> bool:
        """True right after an evaluation that beat every saved checkpoint's: such a step is worth keeping."""
        if self.evaluated_at != self.step:
            return False
        if not self.world.is_main:
            return self.world.broadcast(None)
        metric = self.config.checkpoint.best
        mine = score(self.metrics, metric)
        try:
            best = best_score(self.run.checkpoints, metric)
        except (OSError, CheckpointError) as e:  # the others wait for an answer: not known to be the best
            self._display.say(f"warning: step {self.step} is not compared with the saved checkpoints: {e}")
            return self.world.broadcast(False)
        return self.world.broadcast(mine is not None and (best is None or mine > best[0]))

    def _log(self, stats: StepStats, norm: Tensor) -> None:
        """The loss is this step's, not an average: so that it is the same after a resume in between."""
        loss, weight, correct, wait = self.world.sum(
            [stats.loss.item(), stats.weight.item(), stats.correct.item(), self._clock.data_wait]
        )
        elapsed = time.perf_counter() - self._clock.since
        slow = slowest_rank(self._own_seconds, self.world)
        self._own_seconds.clear()
        if slow and self.world.is_main:
            self._display.say(slow)
        images = self._clock.steps * self.config.train.global_batch_size
        rate = images / elapsed
        values = {
            "loss": loss / max(weight, 1.0),
            "accuracy": correct / max(weight, 1.0),
            "lr": self.learning_rate(self.step - 1),
            "grad_norm": float(norm),
            "img_per_s": rate,
            "img_per_s_per_device": rate / self.world.size,
            "data_wait": wait / self.world.size / elapsed,
            "checkpoint_stall": self._clock.stall,
            "epoch": self.samples / self.parts.order.num_samples,
            "samples_seen": self.samples,
        }
        if self.parts.peak_flops:
            values["mfu"] = rate / self.world.size * self.parts.train_flops / self.parts.peak_flops
        if self.world.is_main and self._writer:
            self._writer.scalars(self.step, values)
            remaining = (self.schedule.total_steps - self.step) * elapsed / max(self._clock.steps, 1)
            self._write_status("training", eta_s=round(remaining), **values)
            self._display.step(self.step, self._note(values), remaining)
        self._clock = Clock.now()

    def _note(self, v: dict[str, float]) -> str:
        saved = "none" if self.saved_at < 0 else f"{self.saved_at}"
        mfu = f" MFU {v['mfu']:.1%}" if "mfu" in v else ""
        return (
            f"loss {v['loss']:.4f} lr {v['lr']:.1e} {v['img_per_s']:,.0f} img/s{mfu} "
            f"data-wait {v['data_wait']:.0%} saved {saved}"
        )

    def _write_status(self, state: str, **values: Any) -> None:
        self.run.write_status(
            state=state,
            step=self.step,
            total_steps=self.schedule.total_steps,
            attempt=self.attempt,
            logs=self.logs.name,
            world_size=self.world.size,
            strategy=self.config.train.strategy,
            last_checkpoint=self.saved_at if self.saved_at >= 0 else None,
            metrics=self.metrics,
            **values,
        )

    def _show_batch(self, batch: Batch) -> None:
        """The first augmented batch of an attempt, as a picture."""
        if self._show_next_batch and self._writer:
            self._writer.image(self.step, "train/batch", tile_grid(batch.images[:32].permute(0, 2, 3, 1).numpy(), 8))
        self._show_next_batch = False

    def _show_weights(self, step: int) -> None:
        """Weights as pictures, read from the checkpoint just written: no rank has to gather, or to wait."""
        every, last, now = self.schedule.pictures_every, self._pictures_at, time.monotonic()
        if self._writer is None or every is None:
            return
        passed = math.inf if last is None else step - last[0] if isinstance(every, int) else now - last[1]
        if passed < every and step < self.schedule.total_steps:
            return
        self._pictures_at = step, now
        reader = CheckpointReader(step_folder(self.run.checkpoints, step))
        for name, picture in training_pictures(self.engine.names, lambda n: reader.tensor(n, WEIGHT).numpy()):
            self._writer.image(step, name, picture)

    def _warn_damage(self, text: str) -> None:
        self.run.record("damaged", why=text)
        print(f"warning: {text}", flush=True)
