"""Where a training process' output goes: everything into RUN/logs/<start>/rank-N.log, rank 0's on the terminal too.

The log takes the place of the file descriptors, so that what C++ libraries and data workers say is kept as well. On
the terminal appears what Python says: all of rank 0, and the errors of every rank.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from typing import TextIO

from pipeline.cli import EXIT_SAVED
from pipeline.logs import LOGS, StartLogs, this_start
from pipeline.pulse import Pulse
from pipeline.run import RunFolder


class Tee(io.TextIOBase):
    """Writes to a log, and to a terminal as long as there is one."""

    def __init__(self, terminal: TextIO | None, log: TextIO):
        self.terminal, self.log = terminal, log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # a full disk: training goes on without
            self.log.write(text)
        if self.terminal:
            try:
                self.terminal.write(text)
            except (OSError, ValueError):
                self.terminal = None  # gone: a closed pipe, a lost connection
        return len(text)

    def flush(self) -> None:
        for stream in (self.log, self.terminal):
            with contextlib.suppress(OSError, ValueError):
                if stream:
                    stream.flush()

    def isatty(self) -> bool:
        return bool(self.terminal and self.terminal.isatty())

    def fileno(self) -> int:
        return (self.terminal or self.log).fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


def keep_output(logs: StartLogs, rank: int) -> bool:
    """From now on this process' output is kept in its log. False where that file cannot be written."""
    try:
        logs.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(logs.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        return False
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = _text(os.dup(1)), _text(os.dup(2))
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    log = _text(fd)
    at = time.strftime("%Y-%m-%dT%H:%M:%S")
    world = os.environ.get("WORLD_SIZE", "1")
    head = f"--- {at} rank {rank} of {world} on {socket.gethostname()}, pid {os.getpid()}: {shlex.join(sys.argv)}\n"
    with contextlib.suppress(OSError):  # a full disk
        log.write(head)
    sys.stdout = Tee(out if rank == 0 else None, log)
    sys.stderr = Tee(err, log)
    return True


def _text(fd: int) -> TextIO:
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Presence:
    """What this training process shows of itself in the run folder."""

    logs: StartLogs
    pulse: Pulse
    rank: int


_present: Presence | None = None


def appear(run_dir: str) -> Presence:
    """Called once in every training process, before anything slow: output is kept, the pulse begins."""
    global _present
    rank, logs, run = int(os.environ.get("RANK", 0)), this_start(run_dir), RunFolder(run_dir)

    def leave_if_asked() -> None:
        if run.stop_request() == "now":
            print(f"rank {rank}: ends at once, as `mixer stop --now` asked", file=sys.stderr, flush=True)
            pulse.end()
            os._exit(EXIT_SAVED)

    if LOGS not in os.environ and rank == 0 and not run.locked():
        run.stop.unlink(missing_ok=True)  # of an earlier day; a launcher would have seen to it
    kept = keep_output(logs, rank)
    pulse = Pulse(logs.pulse(rank) if kept else None, rank, leave_if_asked)
    _present = Presence(logs, pulse, rank)
    return _present


def say_last_words(error: BaseException | None, exit_code: int) -> str | None:
    """Before this process ends: `error` goes into the run folder, the pulse stops. Returns where the error is told."""
    if _present is None:
        return None
    path = _present.logs.write_error(_present.rank, error, exit_code) if error else None
    _present.pulse.end("failed" if error else "ended")
    return str(path) if path else None
