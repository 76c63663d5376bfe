"""Never sick silently: a watchdog against hangs, a count of skipped steps, a report of the slowest rank."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.parallel.world import World
from pipeline.pulse import Pulse

EXIT_HUNG = 76  # retryable: the launcher starts the processes again
_LAST_WORDS_SECONDS = 30.0  # for a process that hangs to write down why


class Watchdog:
    """Ends this process when it makes no step for `timeout` seconds, after writing down where every thread stands.

    A hang in a collective cannot be interrupted, so the process leaves without cleaning up; the other ranks' watchdogs
    do the same, and their stacks together show which rank the others waited for.
    """

    def __init__(
        self,
        timeout: float,
        log: Path,
        enabled: bool = True,
        pulse: Pulse | None = None,
        on_hang: Callable[[TimeoutError], object] = lambda error: None,
    ):
        self._timeout, self._log, self._on_hang = timeout, log, on_hang
        self.pulse = pulse or Pulse(None)
        self._beat = time.monotonic()
        self._paused = False
        self.round_s = min(timeout / 4, 5.0)  # how long one of `rounds` may take
        self._over = threading.Event()
        if enabled:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, grace: float = 0.0) -> None:
        """Something got further that is not a step; or begins that may take `grace` seconds more than a step."""
        self._beat = time.monotonic() + grace
        self.pulse.alive()

    def step(self, step: int, own_s: float) -> None:
        """`step` is complete; own_s: seconds of it before this rank met the others."""
        self._beat = time.monotonic()
        self.pulse.step(step, own_s)

    def stop(self) -> None:
        self._over.set()

    @contextlib.contextmanager
    def paused(self, state: str) -> Iterator[None]:
        """While something slow has timeouts of its own: "loading"."""
        before, self._paused = self._paused, True
        try:
            with self.busy(state):
                yield
        finally:
            self._paused = before

    def rounds(self, limit: float) -> Iterator[None]:
        """The rounds of a wait of all ranks for any of them; each has to meet the others in every round.

        So a rank that is slow is no hang for `limit` seconds, and one that is lost is one at once.
        """
        self.pulse.alive()  # once: whoever looks at the run is to see that it does not get further
        until = time.monotonic() + limit
        while True:
            if time.monotonic() < until:
                self._beat = time.monotonic()
            yield

    @contextlib.contextmanager
    def busy(self, state: str) -> Iterator[None]:
        """While something that is not a step goes on: its time is no step's time."""
        before = self.pulse.enter(state)
        try:
            yield
        finally:
            self.pulse.enter(before)
            self.pulse.interrupt()
            self.beat()

    def _watch(self) -> None:
        while not self._over.wait(min(self._timeout / 4, 10.0)):
            silent = time.monotonic() - self._beat
            if silent > self._timeout and not self._paused:
                self._leave(silent)

    def _leave(self, silent: float) -> None:
        """Ends the process whatever becomes of its last words: a full disk raises, a stale mount may never answer."""
        late = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (EXIT_HUNG,))
        late.daemon = True
        late.start()
        try:
            message = f"no step for {silent:.0f} s (health.timeout); "
            try:
                self._write_stacks(silent)
                message += f"stacks are in {self._log}"
            except OSError as e:
                message += f"its stacks could not be written: {e}"
            print(message, flush=True)
            self._on_hang(TimeoutError(message))
        finally:
            os._exit(EXIT_HUNG)

    def _write_stacks(self, silent: float) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "a") as f:
            f.write(f"{socket.gethostname()} pid {os.getpid()}: no step for {silent:.0f} s\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)
            os.fsync(f.fileno())


@dataclass
class SickSteps:
    """Finds steps whose update was skipped (non-finite loss or gradient) or whose loss jumped.

    Values stay on the device until `look`, which every rank calls at the same steps; it sums the losses over ranks
    (norms are global already), so all ranks come to the same conclusion.
    """

    max_in_a_row: int
    spike_factor: float | None = None
    _waiting: list[tuple[int, Tensor]] = field(default_factory=list)
    _mean_loss: float | None = None
    in_a_row: list[int] = field(default_factory=list)  # the latest run of sick steps

    def add(self, step: int, loss: Tensor, weight: Tensor, norm: Tensor) -> None:
        """`loss` and `weight` are this rank's sums, `norm` is the global gradient norm."""
        self._waiting.append((step, torch.stack([loss.float(), weight.float(), norm.float().to(loss.device)]).detach()))

    def look(self, world: World) -> list[tuple[int, str]]:
        """(step, why) of steps that were found sick since the last look. Collective."""
        if not self._waiting:
            return []
        rows = torch.stack([values for _, values in self._waiting]).tolist()
        sums = world.sum([value for loss, weight, _ in rows for value in (loss, weight)])
        found = []
        for i, (step, _) in enumerate(self._waiting):
            loss, norm = sums[2 * i] / max(sums[2 * i + 1], 1.0), rows[i][2]
            why = self._why(loss, norm)
            if why:
                found.append((step, why))
                self.in_a_row.append(step)
            else:
                self.in_a_row = []
                self._mean_loss = loss if self._mean_loss is None else 0.98 * self._mean_loss + 0.02 * loss
        self._waiting.clear()
        return found

    def _why(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(norm):
            return f"gradient norm {norm}, update skipped"
        if not math.isfinite(loss):
            return f"loss {loss}, update skipped"
        if self.spike_factor and self._mean_loss is not None and loss > self.spike_factor * self._mean_loss:
            return f"loss {loss:.4g} above {self.spike_factor:g} x its running mean {self._mean_loss:.4g}"
        return None

    @property
    def must_roll_back(self) -> bool:
        return len(self.in_a_row) >= self.max_in_a_row

    def forget(self) -> None:
        self.in_a_row, self._waiting = [], []


def slowest_rank(own_seconds: list[float], world: World) -> str | None:
    """Names the rank that takes longest before it meets the others, where it stands out. Collective.

    own_seconds: per step, data wait plus forward pass: what no other rank can delay.
    """
    times = sorted(own_seconds) or [0.0]
    mine = (times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.95))], socket.gethostname())
    rows = world.gather(mine)
    medians = sorted(r[0] for r in rows)
    typical = medians[(len(medians) - 1) // 2]  # of two: the faster
    slow = max(range(len(rows)), key=lambda r: rows[r][0])
    if world.size < 2 or rows[slow][0] <= 1.5 * typical or rows[slow][0] - typical < 0.01:
        return None
    p50, p95, host = rows[slow]
    return (
        f"rank {slow} on {host} is slow: a step takes it {p50:.3f} s (p50), {p95:.3f} s (p95) "
        f"before it meets the others; p50 of the median rank {typical:.3f} s"
    )
