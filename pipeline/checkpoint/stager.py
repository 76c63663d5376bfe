"""Saving beside training: the loop waits only for a copy into host memory, a thread writes and commits.

One save is in flight at most; before the next one its end is waited for. The thread talks to its fellows on
other ranks through a process group of its own, so it never meets the training's collectives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.layout import CheckpointError
from pipeline.checkpoint.manager import CheckpointManager
from pipeline.parallel.engine import Piece
from pipeline.parallel.world import World

_ALIGNMENT = 64  # bytes: every piece starts on a cache line


@dataclass(frozen=True)
class SaveResult:
    """How a save ended. `stall` is what the copy took of the loop, `seconds` the whole; `error` None when committed."""

    step: int
    stall: float
    seconds: float
    error: str | None
    warning: str | None = None


class Stager:
    """Host copies of pieces, in one buffer that is allocated and touched once (pinned where the device is a GPU)."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    @property
    def is_pinned(self) -> bool:
        return self._buffer is not None and self._buffer.is_pinned()

    def stage(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Copies of all pieces; they stay as they are until the next call."""
        pieces = list(pieces)
        starts, end = [], 0
        for p in pieces:
            starts.append(end)
            size = p.data.numel() * p.data.element_size()
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(p.data.is_cuda for p in pieces)
        if self._buffer is None or self._buffer.numel() < end:
            self._buffer = torch.zeros(end, dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for p, start in zip(pieces, starts):
            size = p.data.numel() * p.data.element_size()
            copy = self._buffer[start : start + size].view(p.data.dtype)
            copy.copy_(p.data, non_blocking=True)
            copies.append(replace(p, data=copy))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


class BackgroundSaver:
    """Saves through a `CheckpointManager` in a thread. Collective: every rank calls the same methods in step.

    background=False writes the pieces themselves, without a copy in host memory: the caller leaves them as they are
    until the save has ended.
    """

    def __init__(self, manager: CheckpointManager, world: World, background: bool = True):
        self._background, self._training = background, world
        self._manager = CheckpointManager(manager.root, world.beside(), manager.retention, manager.mirror)
        self.lost_group = False  # a collective of a save failed here: gloo has closed the group's connections
        self._stager = Stager()
        self._thread: threading.Thread | None = None
        self._result: SaveResult | None = None

    @property
    def staging_is_pinned(self) -> bool:
        """Pinned memory is copied to while a GPU computes."""
        return self._stager.is_pinned

    def prepare(self, pieces: Iterable[Piece]) -> None:
        """Allocates the staging memory now, so that the first save is no slower than the others."""
        if self._background:
            self._stager.stage(pieces)

    def save(self, step: int, pieces: Iterable[Piece], **rest: Any) -> None:
        """Stages, and returns while the rest is written. The save before it has to have been waited for.

        `rest` is passed on to `CheckpointManager.save`.
        """
        started = time.perf_counter()
        if self._thread is not None:
            raise RuntimeError("a save is in flight, or its result was not taken")
        staged = self._stager.stage(pieces) if self._background else list(pieces)
        stall = time.perf_counter() - started

        def write() -> None:
            error = warning = None
            try:
                self._manager.save(step, pieces=staged, **rest)
                try:
                    self._manager.copy_to_mirror(step)
                except Exception as e:
                    self.lost_group |= not isinstance(e, CheckpointError)
                    warning = f"the copy of checkpoint step-{step} to {self._manager.mirror} failed: {e}"
            except Exception as e:
                self.lost_group |= not isinstance(e, CheckpointError)
                error = str(e)
            self._result = SaveResult(step, stall, time.perf_counter() - started, error, warning)

        # A daemon: a rank that crashes must not wait in its exit for fellows that will never answer
        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def renew_group(self) -> None:
        """For the next save, where a rank lost its group: one rank was later than a collective waits. Collective."""
        self._manager.world = self._training.beside()
        self.lost_group = False

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def ended_within(self, seconds: float) -> bool:
        """Waits so long for the save in flight, and says whether there is none any more."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy

    def poll(self) -> SaveResult | None:
        """The result of a save that has ended since the last call."""
        return None if self.busy else self.wait()

    def wait(self) -> SaveResult | None:
        """Waits for the save in flight and returns its result; None where there is none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        result, self._result = self._result, None
        return result
