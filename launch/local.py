"""Training processes on this machine: torchrun under it, restarts around it.

torchrun starts and watches the processes. Restarting is decided here, because it needs what only the run folder
knows: was it an error that a restart cannot mend, was it asked to stop, has it got any further since last time?
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from data_tools.errors import UserError
from launch.failure import first_failure
from pipeline.checkpoint.place import checkpoint_root, committed_steps
from pipeline.cli import EXIT_SAVED
from pipeline.config import Config
from pipeline.logs import LOGS, StartLogs, new_local_start
from pipeline.run import RunFolder

OUTCOME_FILE = "MIXER_OUTCOME_FILE"
_FORWARDED = (signal.SIGTERM, signal.SIGUSR2)
_AGENT_SIGNALS = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"
_SAVE_SECONDS = 600


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
    """A training process tells the launcher its exit code; torchrun keeps only the fact that it was not 0."""
    path = os.environ.get(OUTCOME_FILE)
    if path:
        with open(path, "a") as f:
            f.write(f"{code}\n")


def default_nproc() -> int:
    """One process a GPU; one where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


class LocalLauncher:
    """Runs `command` (arguments of `mixer`) in `nproc` processes until it is finished, saved or beyond help."""

    def __init__(self, command: Sequence[str], config: Config, nproc: int, max_restarts: int):
        self.command, self.nproc, self.max_restarts = list(command), nproc, max_restarts
        self.run = RunFolder(config.run.dir, checkpoint_root(config))
        self._agent: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._logs: StartLogs | None = None

    def launch(self) -> int:
        """Exit code 0 finished, 75 saved and to be continued, else an error."""
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        # The terminal sends Ctrl-C to the training processes too: they save, and this one waits for them
        signal.signal(signal.SIGINT, lambda *_: setattr(self, "_stopping", True))
        self.run.stop.unlink(missing_ok=True)  # a wish of an earlier day
        fruitless = 0
        while True:
            before = committed_steps(self.run.checkpoints)
            codes, agent_code = self._start_once()
            if agent_code == 0:
                return 0
            agent_killed = agent_code < 0 and not self._stopping  # its ranks saved, but nobody asked for an end
            if EXIT_SAVED in codes and not agent_killed:
                return EXIT_SAVED
            if UserError.exit_code in codes:
                return UserError.exit_code
            if (
                self._stopping or self.run.stop_request()
            ):  # before a rank was ready to save: nothing is lost, and it is to be continued
                return EXIT_SAVED
            after = committed_steps(self.run.checkpoints)
            fruitless = 0 if after[-1:] != before[-1:] else fruitless + 1
            if fruitless > self.max_restarts:
                if self.command[0] != "train":
                    raise UserError(f"a process of `mixer {self.command[0]}` died; what it said is above")
                raise UserError(
                    f"the training processes died {fruitless} times without a new checkpoint in between; "
                    f"{self._cause()}\n`mixer why {self.run.path}` shows more; then `mixer resume {self.run.path}`"
                )
            where = f"step {after[-1]}" if after else "the beginning"
            print(
                f"{self._cause()}\na training process died; restarting from {where} "
                f"({fruitless} of launch.max_restarts={self.max_restarts} without progress)",
                flush=True,
            )

    def _start_once(self) -> tuple[list[int], int]:
        with tempfile.TemporaryDirectory(prefix="mixer-") as scratch:
            outcome = Path(scratch) / "outcome"
            environment = {**os.environ, OUTCOME_FILE: str(outcome)}
            if self.command[0] == "train" and "--smoke" not in self.command:
                self._logs = new_local_start(self.run.path)
                environment[LOGS] = str(self._logs.folder.resolve())
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.nproc)))
            self._agent = subprocess.Popen(
                [*torchrun(self.nproc), "-m", "launch.cli", *self.command],
                env=environment,
                preexec_fn=die_with_parent,
            )
            code = self._agent.wait()
            self._wait_for_ranks(Path(f"{outcome}.alive"))
            lines = outcome.read_text().split() if outcome.exists() else []
            return [int(line) for line in lines], code

    def _cause(self) -> str:
        """The first failure of the latest start, in a few words."""
        failure = first_failure(self._logs) if self._logs else None
        return failure.headline if failure else "torchrun itself was killed"

    def _wait_for_ranks(self, presence: Path) -> None:
        """Until no training process of this start is left; at once, unless torchrun was killed."""
        deadline = time.monotonic() + _SAVE_SECONDS
        with open(presence, "a+") as f:
            while True:
                try:
                    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except (BlockingIOError, PermissionError):
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"torchrun is gone, but its training processes do not end; see {self.run.path / '.lock'} "
                            "for one of them, kill them, then `mixer resume`"
                        ) from None
                    time.sleep(0.1)

    def _forward(self, number: int, frame: object) -> None:
        self._stopping = True
        if self._agent:
            self._agent.send_signal(number)


def torchrun(nproc: int) -> list[str]:
    """The torchrun command for one machine: private rendezvous, no restarts of its own, signals passed on."""
    return [
        sys.executable,
        "-m",
        "launch.agent",
        "--standalone",
        f"--nproc-per-node={nproc}",
        "--max-restarts=0",
        f"--signals-to-handle={_AGENT_SIGNALS}",
        f"--shutdown-timeout={_SAVE_SECONDS}",
    ]
