"""Memory for images that loader workers and the training process share, used again and again.

Fresh shared memory costs more than writing pixels into it: the kernel clears and maps every page. So a loader keeps a
few anonymous shared mappings, made before its workers are forked. The training process chooses one for each request
and takes it back when the last tensor on it is gone. Nothing has a name: all of it vanishes with its processes.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch

_pools: weakref.WeakValueDictionary[int, BufferPool] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class BufferPool:
    """`count` buffers of `size` bytes; pages that are never used take no memory. Workers must be forked afterwards."""

    def __init__(self, count: int, size: int):
        self.size = size
        self._memory = [mmap.mmap(-1, size) for _ in range(count)]  # shared: a fork sees what another one writes
        self._free = list(range(count))
        self._number = next(_numbers)
        _pools[self._number] = self

    def take(self) -> int | None:
        """A buffer that nobody uses; None: all are in use, and whoever asked takes fresh memory. Only where it was
        made."""
        return self._free.pop() if self._free else None

    def tensor(self, buffer: int, shape: Sequence[int]) -> torch.Tensor:
        """uint8 on a buffer, in any process."""
        flat = np.frombuffer(self._memory[buffer], dtype=np.uint8, count=math.prod(shape))
        return torch.from_numpy(flat).view(*shape)

    def handle(self, buffer: int, shape: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
        """What to send to the process that made the pool, for `received`."""
        return self._number, buffer, tuple(shape)


def received(number: int, buffer: int, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 on a buffer of a pool of this process; once no tensor shares this one's memory, it is free again."""
    pool = _pools[number]
    flat = np.frombuffer(pool._memory[buffer], dtype=np.uint8, count=math.prod(shape))
    weakref.finalize(flat, pool._free.append, buffer).atexit = False
    return torch.from_numpy(flat).view(*shape)
