"""Worker processes that make batches: torch's DataLoader, with images in buffers that are used again and again.

What is measured slow in it is passed by: items are whole batches, images are written where the training process reads
them, and all else travels by value (as tensors, a few numbers would each take a file descriptor and a handshake).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pipeline.data.buffers import BufferPool, received

MAX_RESTARTS = 3  # of a loader whose workers are lost
START_SECONDS = 60.0  # until a forked worker is ready; it takes milliseconds


def is_lost_worker(e: BaseException) -> bool:
    """What a DataLoader says of a worker that was killed; while it handed over a batch, it is the connection that
    breaks."""
    return "DataLoader worker" in str(e) if isinstance(e, RuntimeError) else isinstance(e, (OSError, EOFError))


def silence_lost_workers() -> None:
    """Takes away the handler that a DataLoader's start leaves: with it, a killed worker raises wherever the main thread
    happens to be, in the middle of a step too. Without it, the next batch does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def die_with_parent() -> None:
    """Where the kernel can tell (Linux): at once, however the thread ends that started this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


class BatchMaker(Protocol):
    """What `make_loader` needs of a data set. A request is a NamedTuple with `ids`, one for each row, and `buffer`; a
    batch is one whose first field is the images."""

    def image_shape(self, rows: int) -> tuple[int, ...]: ...

    def make(self, request: Any, images: torch.Tensor) -> Any: ...

    def __getitem__(self, request: Any) -> Any: ...


def make_loader(
    samples: BatchMaker, requests: Any, rows: int, held: int, num_workers: int, ahead: int = 2, pin_memory: bool = False
) -> DataLoader:
    """One item a request, of at most `rows` rows; `held`: batches that the consumer has at a time; `ahead`: requests
    that each worker has at a time."""
    dataset: Any = samples
    if num_workers:
        pool = BufferPool(num_workers * ahead + held, math.prod(samples.image_shape(rows)))
        dataset, requests = _Remote(samples, pool, num_workers), _Lend(requests, pool)
    return DataLoader(
        dataset,
        batch_size=None,  # a request is a whole batch
        sampler=requests,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=_Fork() if num_workers else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def start(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches, once every worker is ready.

    A worker inherits the locks of the training process' libraries as they stand at the fork; one that another thread
    held then is never released in it. So a worker that does not become ready is a lost one.

    Raises:
        RuntimeError: such a worker, in a DataLoader's words for a lost one. Its stack is on stderr.
    """
    if not loader.num_workers:
        return iter(loader)
    remote: Any = loader.dataset
    remote.ready[:] = bytes(loader.num_workers)  # an earlier pass had workers of its own
    batches: Any = iter(loader)
    waiting, until = dict(enumerate(batches._workers)), time.monotonic() + START_SECONDS
    while waiting := {i: w for i, w in waiting.items() if not remote.ready[i] and w.is_alive()}:
        if time.monotonic() > until:
            for worker in waiting.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGABRT)  # faulthandler tells where it stands
            numbers = ", ".join(str(w.pid) for w in waiting.values())
            raise RuntimeError(f"DataLoader worker (pid(s) {numbers}) did not start within {START_SECONDS:g} s")
        time.sleep(0.002)
    return batches


class _Parcel:
    """A batch on its way from a worker."""

    def __init__(self, batch: Any, images: Any):
        self.batch, self.images = batch, images

    def __reduce__(self) -> tuple:
        rest = (x.numpy() if isinstance(x, torch.Tensor) else x for x in self.batch[1:])
        return _unpack, (type(self.batch), self.images, *rest)


def _unpack(kind: Any, images: Any, *rest: Any) -> Any:
    images = images if isinstance(images, torch.Tensor) else received(*images)
    return kind(images, *(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in rest))


class _Remote(Dataset):
    """The samples as workers have them."""

    def __init__(self, samples: BatchMaker, pool: BufferPool, num_workers: int):
        self.samples, self.pool = samples, pool
        self.ready = mmap.mmap(-1, num_workers)  # shared: a byte that each worker sets

    def __getitem__(self, request: Any) -> _Parcel:
        shape = self.samples.image_shape(len(request.ids))
        if request.buffer is None:  # the consumer keeps more batches than there are buffers
            images = handle = torch.empty(shape, dtype=torch.uint8)
        else:
            images = self.pool.tensor(request.buffer, shape)
            handle = self.pool.handle(request.buffer, shape)
        return _Parcel(self.samples.make(request, images), handle)


class _Lend(Sampler):
    """Requests, each with a buffer if one is free when it is sent off."""

    def __init__(self, requests: Any, pool: BufferPool):
        self.requests, self.pool = requests, pool

    def __iter__(self) -> Iterator[Any]:
        return (r._replace(buffer=self.pool.take()) for r in self.requests)

    def __len__(self) -> int:
        return len(self.requests)


class _Forked(Popen):
    """Workers ignore SIGTERM (see `_start_worker`): whoever ends one means it, at the latest when Python exits."""

    def terminate(self) -> None:
        self.kill()


class _Process(ForkProcess):
    _Popen = staticmethod(_Forked)  # type: ignore[assignment]

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        """The first thing in the worker. What it inherited is never its garbage: collecting it would copy every page
        that holds an object, and run destructors that wait for threads which only the training process has."""
        gc.freeze()
        return super()._bootstrap(*args, **options)  # type: ignore[misc]


class _Fork(ForkContext):
    """Workers are forked, so that they have the loader's buffers."""

    Process = _Process  # type: ignore[assignment]


def _start_worker(worker: int) -> None:
    """Signals for a training reach its whole process group; when to end is the training process' to decide."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # even while it reads, or is stopped
    me: Any = get_worker_info()
    me.dataset.ready[worker] = 1
