"""How far a run is saved, asked by the launchers, who wait where the place of its checkpoints is out of reach."""

from __future__ import annotations

import time
from collections.abc import Callable

from data_tools.errors import Unfinished
from pipeline.checkpoint.place import committed_steps
from pipeline.run import RunFolder

_PAUSE = 2.0  # seconds between two looks


def saved_step(run: RunFolder, patience: float = 0.0, give_up: Callable[[], object] = lambda: False) -> int:
    """The newest step of which there is a checkpoint; -1 where there is none.

    `patience`: seconds to go on asking a place (a store, a network file system) that does not answer, unless
    `give_up()` says that nobody wants to know any more.

    Raises:
        Unfinished: it still does not answer.
    """
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            return max(committed_steps(run.checkpoints), default=-1)
        except OSError as e:
            if time.monotonic() >= deadline or give_up():
                raise Unfinished(
                    f"{run.checkpoints} is out of reach, so nobody can tell where the run stands ({e}); when it "
                    f"answers again, `mixer resume {run.path}`"
                ) from e
            if not told:
                print(f"{run.checkpoints} is out of reach ({e}); waiting up to {patience:.0f} s for it", flush=True)
            told = True
            time.sleep(min(_PAUSE, max(0.0, deadline - time.monotonic())))
