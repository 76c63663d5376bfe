"""The training processes of one machine: torchrun's agent above them, and what they tell the launcher.

A training process reports its exit code (torchrun keeps only the fact that it was not 0) and holds a lock for as long
as it lives. The launchers (`local`, `node`, `torchrun`) decide from that what to do next. Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from data_tools.errors import UserError

OUTCOME_FILE = "MIXER_OUTCOME_FILE"
ELASTIC = "MIXER_ELASTIC"
SAVE_SECONDS = 600
AGENT_SIGNALS = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"


# -- inside a training process ------------------------------------------------------------------------------------


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks the kernel (Linux) for a signal when the parent ends, however it ends: no process is left over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


_presence: TextIO | None = None


def show_presence() -> None:
    """A training process holds a lock for as long as it lives; so the launcher sees when the last one has ended.

    It matters where torchrun itself was killed: the ranks save and end some time later, and a restart meanwhile would
    find them in its run folder.
    """
    global _presence
    path = os.environ.get(OUTCOME_FILE)
    if path:
        _presence = open(path + ".alive", "a+")  # noqa: SIM115 - held on purpose
        fcntl.lockf(_presence, fcntl.LOCK_SH)


def report_outcome(code: int) -> None:
    """A training process tells the launcher its exit code."""
    path = os.environ.get(OUTCOME_FILE)
    if path:
        with open(path, "a") as f:
            f.write(f"{code}\n")


def speaks_first(message: str, patience: float) -> bool:
    """Whether no other training process of this machine says `message` within `patience` seconds: then this one may."""
    path, deadline = os.environ.get(OUTCOME_FILE), time.monotonic() + patience
    said = f"{path}.said-{hashlib.sha256(message.encode()).hexdigest()[:16]}" if path else ""
    while time.monotonic() < deadline and not os.path.exists(said):
        time.sleep(0.05)
    if path:
        try:
            os.close(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # a full disk: better twice than not at all
            return True
    return True


# -- around the training processes ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How the processes of this machine ended."""

    codes: list[int]  # of the ranks that could still say so
    agent: int  # torchrun's own exit code; negative: the signal that killed it


class Agent:
    """torchrun's agent with its training processes, running."""

    def __init__(self, torchrun: Sequence[str], command: Sequence[str], nproc: int, environment: Mapping[str, str]):
        """`torchrun`: its arguments; `command`: arguments of `mixer`."""
        self._scratch = tempfile.TemporaryDirectory(prefix="mixer-")
        self._outcome = Path(self._scratch.name) / "outcome"
        environment = {**environment, OUTCOME_FILE: str(self._outcome)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.agent", *torchrun, "-m", "launch.cli", *command],
            env=environment,
            preexec_fn=die_with_parent,
        )

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def codes(self) -> list[int]:
        """Exit codes of the ranks that have ended."""
        return [int(line) for line in self._outcome.read_text().split()] if self._outcome.exists() else []

    def ranks_alive(self) -> bool:
        with open(f"{self._outcome}.alive", "a+") as f:
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
        return False

    def ended(self, within: float) -> bool:
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> Outcome:
        """When the agent and every training process of this start have ended.

        Raises:
            UserError: the agent is gone, but its processes do not end.
        """
        code = self._process.wait()
        self._wait_for_ranks()
        outcome = Outcome(self.codes(), code)
        self._scratch.cleanup()
        return outcome

    def _wait_for_ranks(self) -> None:
        """At once, unless torchrun was killed or left early."""
        deadline = time.monotonic() + SAVE_SECONDS
        while self.ranks_alive():
            if time.monotonic() > deadline:
                raise UserError(
                    "torchrun is gone, but its training processes do not end; the run folder's .lock names "
                    "one of them: kill them, then `mixer resume`"
                )
            time.sleep(0.1)


def torchrun_arguments(nproc: int, *more: str) -> list[str]:
    """What every start of torchrun has: signals passed on, and time to save after one."""
    return [
        f"--nproc-per-node={nproc}",
        f"--signals-to-handle={AGENT_SIGNALS}",
        f"--shutdown-timeout={SAVE_SECONDS}",
        *more,
    ]
