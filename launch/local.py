"""Training processes on this machine: torchrun under it, restarts around it.

torchrun starts and watches the processes. Restarting is decided here, because it needs what only the run folder
knows: was it an error that a restart cannot mend, was it asked to stop, has it got any further since last time?
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from data_tools.errors import Interrupted, UserError
from launch.failure import first_failure
from launch.processes import Agent, Outcome, torchrun_arguments
from launch.progress import saved_step
from pipeline.checkpoint.place import checkpoint_root
from pipeline.cli import EXIT_SAVED
from pipeline.config import Config, Duration
from pipeline.logs import LOGS, StartLogs, new_local_start
from pipeline.run import RunFolder

_FORWARDED = (signal.SIGTERM, signal.SIGUSR2)


def default_nproc() -> int:
    """One process a GPU; one where there is none."""
    import torch

    return max(1, torch.cuda.device_count())


class LocalLauncher:
    """Runs `command` (arguments of `mixer`) in `nproc` processes until it is finished, saved or beyond help."""

    def __init__(self, command: Sequence[str], config: Config, nproc: int, max_restarts: int):
        self.command, self.nproc, self.max_restarts = list(command), nproc, max_restarts
        self.run = RunFolder(config.run.dir, checkpoint_root(config))
        self._patience = Duration.parse(config.data.read_timeout).seconds()
        self._agent: Agent | None = None
        self._stopping = self._interrupted = False
        self._logs: StartLogs | None = None
        # An evaluation, or a smoke test, has no say in the training that writes into the folder
        self._trains = self.command[0] == "train" and "--smoke" not in self.command
        self._may_stop = self._trains

    def launch(self) -> int:
        """Exit code 0 finished, 75 saved and to be continued, else an error."""
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        signal.signal(signal.SIGINT, self._interrupt)
        self._may_stop = self._trains and not self.run.locked()
        if self._may_stop:
            self.run.stop.unlink(missing_ok=True)  # a wish of an earlier day
        try:
            return self._launch()
        finally:
            if self._may_stop and self._interrupted:
                self.run.stop.unlink(missing_ok=True)

    def _launch(self) -> int:
        fruitless, before = 0, saved_step(self.run)
        while True:
            outcome = self._start_once()
            if outcome.agent == 0:
                return 0
            if self._stopping and not self._trains:
                return Interrupted.exit_code
            agent_killed = outcome.agent < 0 and not self._stopping  # its ranks saved, but nobody asked for an end
            if EXIT_SAVED in outcome.codes and not agent_killed:
                return EXIT_SAVED
            if UserError.exit_code in outcome.codes:
                return UserError.exit_code
            if self._asked_to_end():  # before a rank was ready to save: to be continued
                return EXIT_SAVED
            after = saved_step(self.run, self._patience, self._asked_to_end)
            fruitless, before = 0 if after != before else fruitless + 1, after
            if fruitless > self.max_restarts:
                if not self._trains:
                    raise UserError(f"a process of `mixer {self.command[0]}` died; what it said is above")
                raise UserError(
                    f"the training processes died {fruitless} times without a new checkpoint in between; "
                    f"{self._cause()}\n`mixer why {self.run.path}` shows more; then `mixer resume {self.run.path}`"
                )
            where = "the beginning" if after < 0 else f"step {after}"
            print(
                f"{self._cause()}\na training process died; restarting from {where} "
                f"({fruitless} of launch.max_restarts={self.max_restarts} without progress)",
                flush=True,
            )

    def _asked_to_end(self) -> bool:
        return self._stopping or bool(self._trains and self.run.stop_request())

    def _start_once(self) -> Outcome:
        # A rendezvous of its own, and no restarts by torchrun
        arguments = torchrun_arguments(self.nproc, "--standalone", "--max-restarts=0")
        environment = {**os.environ}
        if self._trains:
            self._logs = new_local_start(self.run.path)
            environment[LOGS] = str(self._logs.folder.resolve())
        self._agent = Agent(arguments, self.command, self.nproc, environment)
        if self._stopping:  # told while it was started: nobody else has heard of it
            self._agent.send_signal(signal.SIGTERM)
        return self._agent.wait()

    def _cause(self) -> str:
        """The first failure of the latest start, in a few words."""
        failure = first_failure(self._logs) if self._logs else None
        return failure.headline if failure else "torchrun itself was killed"

    def _interrupt(self, number: int, frame: object) -> None:
        """The terminal sends Ctrl-C to the training processes too: a second signal would end them without saving.

        Whether it did cannot be seen here, so they are asked the way `mixer stop` asks.
        """
        self._stopping = self._interrupted = True
        if self._may_stop:
            with contextlib.suppress(OSError):
                self.run.stop.write_text("save\n")
        else:
            self._forward(signal.SIGTERM, frame)

    def _forward(self, number: int, frame: object) -> None:
        self._stopping = True
        if self._agent:
            self._agent.send_signal(number)
