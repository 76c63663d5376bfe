"""A function over many items on the cores of this machine, results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_tools.errors import Unfinished
from data_tools.local_pool import ignore_interrupts

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use; within a SLURM job no more than it asked for."""
    cores = len(os.sched_getaffinity(0))
    allotted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(allotted)) if allotted.isdigit() and int(allotted) else cores


def map_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int = 0) -> Iterator[Result]:
    """`work(item)` for each item, by up to `workers` processes (0: one a core); in this one where that is enough.

    Memory: a few items and results for each process. Raises what `work` raised; Unfinished where a process died.
    """
    todo = list(items)
    workers = min(workers or available_cores(), len(todo))
    if workers <= 1:
        yield from map(work, todo)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_tools.local_pool"])
    pool = ProcessPoolExecutor(workers, context, initializer=ignore_interrupts)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in todo:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as e:
        raise Unfinished(
            "a worker process died (out of memory?); run the same command again, perhaps with fewer --workers"
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
