"""One host of a training without a scheduler: torchrun with elastic membership, and a way back in after trouble.

Each host runs the same command with its own --node-rank. torchrun restarts the processes on the hosts that are there
(MIN to MAX of them), so a lost host shrinks the job and one that comes back widens it; the order of samples does not
depend on it. A host that is signalled leaves after a save, and the others go on; `mixer stop` ends all of them. The
rendezvous lives on the first host: without that one nothing goes on.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence

from data_tools.errors import UserError
from launch.processes import ELASTIC, Agent, Outcome, torchrun_arguments
from launch.progress import saved_step
from pipeline.checkpoint.place import checkpoint_root
from pipeline.cli import EXIT_SAVED, FolderTrouble
from pipeline.config import Config, Duration
from pipeline.logs import LOGS
from pipeline.run import RunFolder

_FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_ALL_HAVE_SAID_IT = 10.0  # seconds for the other ranks to end by themselves after an error that they all meet
_NOBODY_STARTS = 45.0  # more than a rendezvous takes
_BEFORE_REJOINING = 5.0


def parse_nnodes(text: str) -> tuple[int, int]:
    """ "3" or "2:4" as (least, most)."""
    found = re.fullmatch(r"([1-9]\d*)(?:[:-]([1-9]\d*))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if high < low:
        raise UserError(f"--nnodes: {text!r} must look like 3, or 2:4 for at least 2 and at most 4 hosts")
    return low, high


class Host:
    """Runs `command` (arguments of `mixer`) on this host until it is finished, left or beyond help."""

    def __init__(
        self,
        config: Config,
        command: Sequence[str],
        nodes: tuple[int, int],
        node_rank: int,
        endpoint: str,
        identity: str,
        nproc: int,
    ):
        self.first = node_rank == 0  # without it nothing goes on: it begins a training
        self.run = RunFolder(config.run.dir, checkpoint_root(config))
        self._patience = Duration.parse(config.data.read_timeout).seconds()
        self.command, self.nproc, self.max_restarts = list(command), nproc, config.launch.max_restarts
        self.arguments = torchrun_arguments(
            nproc,
            f"--nnodes={nodes[0]}:{nodes[1]}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            f"--rdzv-id={identity}",
            f"--rdzv-conf=is_host={int(node_rank == 0)},join_timeout=900,read_timeout=300,last_call_timeout=15",
            "--max-restarts=1000",  # it is progress that limits them
        )
        self.logs = self.run.path / "logs" / f"torchrun-{identity}.0"
        self._agent: Agent | None = None
        self._left = False

    def launch(self) -> int:
        """Exit code 0 finished, 75 saved and to be continued, else an error."""
        for number in _FORWARDED:
            signal.signal(number, self._leave)
        if self.first and not self.run.locked():
            self.run.stop.unlink(missing_ok=True)  # a wish of an earlier day
        fruitless, before = 0, saved_step(self.run)
        while True:
            outcome = self._join()
            codes = outcome.codes[-self.nproc :]  # earlier ones are of processes that were started again
            if outcome.agent == 0 and self.run.finished.exists():
                return 0
            if self._left or (self.run.path / "STOP").exists():
                return EXIT_SAVED
            if UserError.exit_code in codes:
                return UserError.exit_code
            after = saved_step(self.run, self._patience, lambda: self._left or self.run.stop_request())
            fruitless, before = 0 if after != before else fruitless + 1, after
            if fruitless > self.max_restarts:
                raise UserError(f"torchrun ended {fruitless} times without a new checkpoint; see {self.logs}")
            print(
                f"the training ended on this host before its end; joining again in {_BEFORE_REJOINING:.0f} s",
                flush=True,
            )
            self._sleep_unless_left(_BEFORE_REJOINING)
            if self._left:
                return EXIT_SAVED

    def _join(self) -> Outcome:
        environment = {
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            **os.environ,
            ELASTIC: "1",
            # The store that torchrun would share with the processes keeps the addresses of an earlier round, whose
            # ranks are gone: seen to hang after a host was lost
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            LOGS: str(self.logs),
            "MIXER_CHECK_GROUP": "1",
            "MIXER_MAX_FRUITLESS": str(self.max_restarts),
        }
        self._agent = Agent(self.arguments, self.command, self.nproc, environment)
        if self._left:  # told while it was started
            self._agent.send_signal(signal.SIGTERM)
        idle_since: float | None = None
        while not self._agent.ended(within=1.0):
            codes, now = self._agent.codes(), time.monotonic()
            last, most = codes[-1:], self.nproc * (self.max_restarts + 1)
            silent = len(codes) >= most and set(codes[-most:]) == {FolderTrouble.exit_code}
            if last == [UserError.exit_code] or silent:  # torchrun would start again what a restart cannot mend
                if not self._agent.ended(within=_ALL_HAVE_SAID_IT):
                    self._agent.send_signal(signal.SIGTERM)
                break
            # All have saved because another host left; torchrun takes that for the end and waits for that host
            idle = last == [EXIT_SAVED] and not self._agent.ranks_alive()
            idle_since = (idle_since or now) if idle else None
            if idle_since and now - idle_since > _NOBODY_STARTS:
                self._agent.send_signal(signal.SIGKILL)  # it would hear of nothing else while it waits
                break
        return self._agent.wait()

    def _sleep_unless_left(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._left and time.monotonic() < until:
            time.sleep(0.1)

    def _leave(self, number: int, frame: object) -> None:
        self._left = True
        if self._agent:
            self._agent.send_signal(number)
