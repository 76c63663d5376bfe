"""The training loop. It knows a `TrainEngine` and never asks which; `pipeline.build` puts the parts together.

One step: micro-batches from the loader -> engine -> ledger -> now and then metrics, evaluation, checkpoint. What
the ranks must decide together (save now, stop now, too many bad samples) is agreed upon in `_agree`, by one small
all-reduce. What is shown is `pipeline.report`'s, what becomes of a save `pipeline.saving`'s.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.data.feed import Feed
from pipeline.data.loader import Batch, masked_slots, step_digest, train_batches
from pipeline.data.node_cache import NodeCache
from pipeline.duration import Duration
from pipeline.health import EXIT_HUNG, SickSteps, Watchdog
from pipeline.ledger import LedgerWriter
from pipeline.logs import StartLogs
from pipeline.micro_batch import is_out_of_memory, out_of_memory_message
from pipeline.optim import lr_scale
from pipeline.parts import Parts, Schedule
from pipeline.pulse import Pulse
from pipeline.report import Report
from pipeline.run import read_lines
from pipeline.saving import Saves
from pipeline.stop import StopFlag
from pipeline.takeover import accept_data
from pipeline.validation import validate

Outcome = Literal["finished", "stopped"]
LOOK_FOR_STOP_SECONDS = 2.0
MAX_ROLLBACKS = 3  # to one checkpoint


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
        self.engine, self.run = parts.engine, parts.run
        self.step = self.samples = 0  # completed so far
        self.evaluated_at = -1  # step that `metrics` belongs to
        self.bad_samples, self._why_bad = 0, ""  # the latest reason on this rank
        self.flag = flag or StopFlag().install()
        self.logs, self._pulse = logs or StartLogs(self.run.path / "logs" / "local.0"), pulse or Pulse(None)
        self.report = Report(parts, self.logs, quiet)
        self._look_for_stop_at = 0.0
        h = self.config.health
        self.sick = SickSteps(h.max_skipped, h.spike_factor)
        self._cache: NodeCache | None = None
        self._positions: dict[int, tuple[int, int]] = {}  # step -> (epoch, position), of the latest steps
        self._rollbacks: dict[int, int] = {}
        self._watchdog = Watchdog(math.inf, self.logs.stacks(self.world.rank), enabled=False)  # until it starts

    @property
    def schedule(self) -> Schedule:
        return self.parts.schedule

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation."""
        return self.report.metrics

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
            self.report.close()
            if self._cache:
                self._cache.close()

    def _train(self, stop_at: int | None) -> Outcome:
        self._start()
        end = min(self.schedule.total_steps, stop_at or self.schedule.total_steps)
        stop = self.step >= end
        while not stop:
            with contextlib.closing(Feed(self._batches, self.report.say_of_rank)) as feed:
                while not (stop or self.sick.must_roll_back):
                    batches = self._next(feed)
                    stop = batches is None or self._step(batches, end)
            if not stop:
                self._roll_back()
        return self._end()

    def _next(self, feed: Feed) -> list[Batch] | None:
        """This step's micro-batches, once every rank has its own; None, after a save, where somebody wants to stop.

        Until all have them nobody begins the step: so a rank that cannot read can end the run between two steps, and
        one that is lost is told from one that reads.

        Raises:
            UserError: data could not be read, on whichever rank; the run is saved first.
        """
        started = time.perf_counter()
        got, own = None, 0.0
        for _ in self._watchdog.rounds(self._longest_read()):
            if got is None:
                asked = time.perf_counter()
                got = feed.next(give_up=lambda: self.flag.name is not None, seconds=self._watchdog.round_s)
                own += time.perf_counter() - asked
            failure = got if isinstance(got, UserError) else None
            self._look_for_stop()
            waiting, stop, failed = self.world.sum([got is None, self.flag.name is not None, failure is not None])
            if stop or failed or not waiting:
                break
        self._watchdog.beat()
        self.report.clock.last_wait = own
        self.report.clock.data_wait += time.perf_counter() - started
        if failed:
            failure = next(f for f in self.world.gather(failure) if f)
            self._save()
            self.saves.finish(self.step, self._save)
            self.report.record("unreadable", step=self.step, why=str(failure))
            self.report.status("saved", self.step)
            raise type(failure)(
                f"{failure}; saved at step {self.step}: when that is mended, `mixer resume {self.run.path}`"
            )
        if waiting:
            self._save()
            return None
        assert isinstance(got, list)
        return got

    def _step(self, batches: list[Batch], end: int) -> bool:
        """One optimizer step and what is due after it. True when training ends here."""
        self.report.batch(self.step, batches[0])
        stats, norm = self.engine.train_step(batches, self.learning_rate(self.step), self.step)
        self._complete_step(batches)
        self.sick.add(self.step, stats.loss, stats.weight, norm)
        self._watchdog.step(self.step, self.report.own_seconds[-1])
        if self._due(self.schedule.log_every):
            self.report.log(self.step, self.samples, self.learning_rate(self.step - 1), stats, norm)
        else:
            self.report.step(self.step)
        finished = self.step >= end
        if finished or (self.schedule.eval_every and self._due(self.schedule.eval_every)):
            self._validate()
        save, stop = self._agree()
        best = self.evaluated_at == self.step and self.saves.is_best(self.step, self.metrics)
        # Nobody should resume into the middle of sick steps; at the end it is the last healthy state that is saved
        if stop or finished or ((save or best) and not self.sick.in_a_row):
            self._save()
        return finished or stop

    def _validate(self) -> None:
        if self.evaluated_at == self.step:
            return
        metrics = validate(self.parts, self.report, self._watchdog, self.step, self._wait_for_data)
        if metrics:
            self.evaluated_at = self.step
            self.report.evaluated(self.step, self.samples, metrics)

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

    def _wait_for_data(self) -> None:
        """The watchdog leaves the end of a wait to data.read_timeout; an index may be read before a sample."""
        self._watchdog.beat(grace=self._longest_read())

    def _longest_read(self) -> float:
        return 2 * Duration.parse(self.config.data.read_timeout).seconds() + 60

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
        self.report.own_seconds.append(self.engine.own_seconds + self.report.clock.last_wait)
        errors = masked_slots(share, batches)
        digest = step_digest(order.state.position, share, batches)
        self._ledger.add(self.step + 1, order.state.epoch, order.state.position, digest, errors)
        if errors:
            self.bad_samples += len(errors)
            self._why_bad = errors[0][2]
            self.report.say_of_rank(f"bad sample, counted with weight 0: {self._why_bad}")
        self._positions[self.step + 1] = order.state.epoch, order.state.position
        self._positions.pop(self.step + 1 - 10 * self.sick.max_in_a_row - 100, None)
        order.state = order.next_state(order.state)
        if self._cache:
            self._cache.progress(order.state)
        self.parts.average.update()
        self.step += 1
        self.samples += self.config.train.global_batch_size
        self.report.clock.steps += 1

    def _agree(self) -> tuple[bool, bool]:
        """(save now, stop now), the same on all ranks; looked at every few steps only, where steps are short."""
        every, keep = self.schedule.save_every, self.schedule.keep_every
        saving = (isinstance(every, int) and self._due(every)) or bool(keep and self.step % keep == 0)
        if not saving and self.step % self.schedule.agree_every and self.step < self.schedule.total_steps:
            return False, False
        self.saves.look()
        for step, why in self.sick.look(self.world):
            self.report.record("sick", step=step, why=why)
            self.report.say(f"warning: step {step}: {why}")
        due = saving or (self.world.is_main and self.saves.overdue())  # what depends on a clock is rank 0's to say
        self._look_for_stop()
        save, stop, bad = self.world.sum([due, self.flag.name is not None, self.bad_samples])
        seen = max(self.samples, self.parts.order.num_samples)
        if bad > self.config.data.max_bad_fraction * seen:
            self._save()
            self.saves.finish(self.step, self._save)
            raise UserError(
                f"{int(bad)} samples could not be read, more than data.max_bad_fraction="
                f"{self.config.data.max_bad_fraction:g} of {seen:,}{self._why_bad and f' ({self._why_bad})'};\n"
                f"see `masked` in {self.run.path}/ledger, check the set with `mixer data verify`, or raise the limit "
                "and `mixer resume`"
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
        self.saves = Saves(parts, self.report, self._watchdog)
        self.engine.warm_up(parts.blank_batch())
        with self._watchdog.paused("loading"):
            parts.checkpoints.check_shared()
            reader = parts.checkpoints.newest_good(warn=self.report.warn_damage)
            state = parts.load(reader)
        self._stand_at(reader, state)
        self.saves.prepare()
        running = self.engine.verify()
        self._begin_attempt()
        parts.checkpoints.clean()
        facts = {
            **self.parts.order_facts(),
            "logs": self.logs.name,
            "hosts": sorted(set(world.gather(socket.gethostname()))),
            "step": self.step,
            **parts.written_by(),
            "running": running,
            "device": str(world.device),
            "previous": (previous := state.get("written_by", {})),
        }
        if world.is_main:
            parts.data.record(self.run.data)
            accept_data(self.run, self.config)
        seconds = round(time.perf_counter() - started, 3)
        self.report.record("resume" if reader else "start", **facts, seconds=seconds)
        self.report.show(self.step, running, previous if reader else None)
        self.report.status("training", self.step)
        self._cache = parts.open_cache()
        world.barrier()  # nobody reads before the first chunks are on their way
        self._pulse.enter("training")
        self.report.start_clock()
        self.saves.start_clock()

    def _stand_at(self, reader: CheckpointReader | None, state: dict[str, Any]) -> None:
        """Where the checkpoint that was just loaded, with this `state`, stood; or at the beginning."""
        self.step, self.samples = state.get("step", 0), state.get("samples", 0)
        self.saves.stand_at(self.step if reader else -1)
        self.report.metrics = dict(reader.manifest.metrics) if reader else {}
        self.evaluated_at = self.step if self.metrics else -1

    def _begin_attempt(self, unwritten: bytes = b"") -> None:
        """A number of its own, ledger and curves; `unwritten` is what the previous one's ledger could not write."""
        share = self.parts.share
        attempt = self.world.broadcast(self.run.next_attempt() if self.world.is_main else None)
        self.report.begin(attempt, self.step)
        self._ledger = LedgerWriter(
            self.run.ledger,
            self.world.rank,
            attempt=attempt,
            first=share.first,
            last=share.last,
            batch=self.config.train.global_batch_size,
            unwritten=unwritten,
        )

    def _end(self) -> Outcome:
        self.saves.finish(self.step, self._save)
        finished, signal = self.step >= self.schedule.total_steps, self.flag.name
        if finished:
            text = f"finished: {self.step} steps; evaluate with `mixer eval {self.run.path}`"
            if self.evaluated_at == self.step:
                text = (
                    f"finished: {self.step} steps, top-1 {self.metrics['top1']:.2%}, "
                    f"top-5 {self.metrics['top5']:.2%} of {self.metrics['samples']:.0f} val samples"
                )
            if self.world.is_main:
                self.run.finished.write_text(f"step {self.step}\n")
                if not any(e["event"] == "finish" and e["step"] == self.step for e in read_lines(self.run.events)):
                    self.report.record("finish", step=self.step, metrics=self.metrics)
        else:
            text = f"saved at step {self.step}"
            if signal:
                text += f" after {signal}; go on with `mixer resume {self.run.path}`"
                self.report.record("signal", step=self.step, name=signal)
        self.report.status("finished" if finished else "saved", self.step)
        self.report.end(text)
        self.world.barrier()
        return "finished" if finished else "stopped"

    # -- saving, and going back ---------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begins to save this step, once."""
        if not self.saves.has(self.step):
            self._ledger.sync()
            self.saves.begin(self.step, self.state(), self.metrics if self.evaluated_at == self.step else {})

    def _roll_back(self) -> None:
        """Back to the last good checkpoint, and past the samples on which training went wrong.

        Raises:
            UserError: there is no checkpoint to go back to.
        """
        first, last = self.sick.in_a_row[0], self.sick.in_a_row[-1]
        batch = self.config.train.global_batch_size
        skips = tuple((epoch, at, at + batch) for epoch, at in (self._positions[s] for s in range(first, last + 1)))
        self.sick.forget()
        self.saves.wait()
        reader = self.parts.checkpoints.newest_good(warn=self.report.warn_damage)
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
        self._stand_at(reader, state)  # what was evaluated beyond it is of weights undone
        self._begin_attempt(self._ledger.unwritten)
        self.report.record(
            "rollback",
            step=self.step,
            sick=[first, last],
            skipped=skips,
            **self.parts.written_by(),
            **self.parts.order_facts(),
        )
        self.report.say(
            f"steps {first} to {last} had no healthy update: back to step {self.step}, and past their samples"
        )
        self.report.start_clock()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "run_id": self.run.identity(),
            "step": self.step,
            "samples": self.samples,
            "optimizer_step": self.engine.optimizer_step,
            "order": self.parts.order.state.to_dict(),
            "global_batch_size": self.config.train.global_batch_size,
            "written_by": self.parts.written_by(),
        }
