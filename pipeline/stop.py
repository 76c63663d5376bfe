"""The wish to stop: a signal sets a flag, the trainer looks at it between two steps. Imports nothing heavy.

It is installed before anything slow is imported, so that a signal during start-up is not lost either.
"""

from __future__ import annotations

import signal
from typing import Any


class StopFlag:
    """Remembers that a signal asked for an end. The handler does nothing else: a save happens between two steps."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None

    def install(self) -> StopFlag:
        for number in self.SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.name = signal.Signals(number).name
