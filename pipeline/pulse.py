"""A rank's sign of life: a small file that a thread rewrites every few seconds, also while the training hangs.

It says which step is done, since when, and where the main thread stands. So whoever looks at the run folder can
tell which rank the others wait for: the one without a pulse, or the one that does not stand in a collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

INTERVAL = 5.0  # seconds
SIZE = 768  # bytes of the file, always: rewriting in place never leaves half a line of another length
_PROJECT = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Beat:
    """One reading of a pulse. Times are seconds since the epoch, by the writer's clock."""

    time: float
    rank: int
    world: int  # ranks there should be
    host: str
    pid: int
    started: float  # when this process began
    state: str  # starting, loading, training, evaluating, saving; ended, failed
    step: int  # completed
    since: float  # when it last got further: a step, a batch of an evaluation
    step_s: float  # seconds between the ends of steps, smoothed
    own_s: float  # of these, before it met the other ranks
    where: str  # the main thread's innermost functions, innermost first

    @property
    def over(self) -> bool:
        return self.state in ("ended", "failed")

    def alive(self, within: float) -> bool:
        """Whether its process is there: on this host the kernel knows, of another a pulse within so many seconds."""
        if self.over:
            return False
        if self.host != socket.gethostname():
            return time.time() - self.time < within
        try:
            return b"launch" in Path(f"/proc/{self.pid}/cmdline").read_bytes()  # its number may be another's by now
        except OSError:
            return False

    @property
    def waits(self) -> bool:
        """Whether the main thread stands in something that waits for other ranks."""
        return any(mark in self.where for mark in ("distributed", "c10d", "_engine_run_backward", "deepspeed/comm"))


class Pulse:
    """Writes the file of this rank while it lives. `path=None` writes nothing.

    on_beat: called at every rewriting, in the thread; for what must be noticed while the main thread hangs.
    """

    def __init__(self, path: Path | None, rank: int = 0, on_beat: Callable[[], None] | None = None):
        now = time.time()
        world = int(os.environ.get("WORLD_SIZE", 1))
        self._beat = Beat(now, rank, world, socket.gethostname(), os.getpid(), now, "starting", 0, now, 0.0, 0.0, "")
        self._path, self._on_beat = path, on_beat
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._last_step = 0.0
        if path:
            self._write()
            threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def enter(self, state: str) -> str:
        """Says what begins now; returns what went on before."""
        before = self._beat.state
        self._beat = replace(self._beat, state=state, since=time.time())
        self._write()
        return before

    def alive(self) -> None:
        """It got further, if not by a step."""
        self._beat = replace(self._beat, since=time.time())

    def step(self, step: int, own_s: float) -> None:
        """`step` is complete; own_s: seconds of it before this rank met the others."""
        now, b = time.time(), self._beat
        took = now - self._last_step if self._last_step else b.step_s
        smooth = 0.8 if b.step_s else 0.0
        self._beat = replace(
            b,
            step=step,
            since=now,
            step_s=smooth * b.step_s + (1 - smooth) * took,
            own_s=smooth * b.own_s + (1 - smooth) * own_s,
        )
        self._last_step = now

    def interrupt(self) -> None:
        """What comes now is not part of a step's time: an evaluation, a wait for a save."""
        self._last_step = 0.0

    def end(self, state: str = "ended") -> None:
        """The last words; the thread ends."""
        self._over.set()
        self._beat = replace(self._beat, state=state)
        self._write()

    def _run(self) -> None:
        while not self._over.wait(INTERVAL):
            if self._on_beat:
                self._on_beat()
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        where = "" if self._over.is_set() else _where(self._main)
        beat = replace(self._beat, time=time.time(), where=where)
        line = json.dumps(asdict(beat))
        if len(line) >= SIZE:
            line = json.dumps(asdict(replace(beat, where=beat.where[: len(beat.where) - (len(line) - SIZE) - 20])))
        try:
            # Opened and closed each time: only closing makes it visible to other machines on NFS
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(fd, line.encode().ljust(SIZE - 1)[: SIZE - 1] + b"\n", 0)
            finally:
                os.close(fd)
        except OSError:
            pass  # a full disk must not end a training


def read_pulse(path: Path) -> Beat | None:
    """What a pulse says; None where it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
        return Beat(**{f.name: values[f.name] for f in fields(Beat)})
    except (OSError, ValueError, KeyError):
        return None


def read_pulses(paths: dict[int, Path]) -> dict[int, Beat]:
    """rank -> what its pulse says. In parallel: on a cluster's file system every file is a round trip."""
    with ThreadPoolExecutor(min(32, len(paths) or 1)) as pool:
        beats = pool.map(read_pulse, paths.values())
        return {rank: beat for rank, beat in zip(paths, beats) if beat}


def _where(thread: int | None) -> str:
    """The innermost functions of a thread: the innermost of all, then up to two of this project."""
    frame = sys._current_frames().get(thread or -1)
    while frame and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    names: list[str] = []
    while frame and len(names) < 3:
        file = frame.f_code.co_filename
        if not names or file.startswith(_PROJECT):
            short = "/".join(Path(file).parts[-2:])
            names.append(f"{frame.f_code.co_name} ({short}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(names)
