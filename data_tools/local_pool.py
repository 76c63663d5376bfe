"""Packing tasks on the cores of this machine: worker processes that may be killed, stopped or lost.

Ctrl-C stops the workers between two images; a worker whose parent is gone ends itself; a lost worker's task
runs again on a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from typing import Any

from data_tools.errors import UserError
from data_tools.pack import PackedShard
from data_tools.plan_store import PLAN_FOLDER, read_slice
from data_tools.progress import REPORT_SECONDS, Board
from data_tools.tasks import Task, run_task

_WAITING = -1  # in place of the count of images of a task that no worker has begun
_MAX_LOSSES = 3  # of the pool, in a row, without a shard finished in between


class LocalPool:
    """Runs tasks on worker processes; replaces them when one is lost.

    Each task has three cells of shared memory for its counts (images, bad ones, source bytes) that only its
    worker writes: there is no lock that a killed worker could leave held.
    """

    def __init__(self, tasks: list[Task], workers: int, board: Board) -> None:
        # Not fork: this process has threads. The fork server imports the packing code once for all workers.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["data_tools.local_pool"])
        self._cells = self._context.RawArray("q", 3 * len(tasks))
        self._stop = self._context.RawValue("b", 0)
        self._tasks, self._workers, self._board = tasks, workers, board
        self._missing = set(range(len(tasks)))
        self._running: dict[Future[PackedShard], int] = {}

    def run(self) -> None:
        """Raises what a task raised, after the others stopped; UserError where workers keep dying."""
        losses = 0
        while self._missing:
            before = len(self._missing)
            try:
                self._run_pool()
            except BrokenProcessPool as e:
                losses = losses + 1 if len(self._missing) == before else 1
                self._remove_leftovers()
                if losses >= _MAX_LOSSES:
                    raise UserError(self._why(losses)) from e

    def _run_pool(self) -> None:
        queue = iter(sorted(self._missing))
        self._running = {}
        pool = ProcessPoolExecutor(
            self._workers, self._context, initializer=_start_worker, initargs=(self._cells, self._stop)
        )
        try:
            for _ in range(2 * self._workers):  # one in work, one waiting, each
                self._submit(pool, queue)
            while self._running:
                done, _ = wait(self._running, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    packed = future.result()
                    number = self._running.pop(future)
                    self._missing.remove(number)
                    self._board.finished(packed, self._cells[3 * number + 2])
                    self._submit(pool, queue)
                self._show()
        except BaseException:
            self._stop.value = 1
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.value = 0

    def _submit(self, pool: ProcessPoolExecutor, queue: Iterator[int]) -> None:
        number = next(queue, None)
        if number is not None:
            self._cells[3 * number : 3 * number + 3] = [_WAITING, 0, 0]
            self._running[pool.submit(_work, number, self._tasks[number])] = number

    def _show(self) -> None:
        counts = [self._cells[3 * n : 3 * n + 3] for n in self._running.values()]
        begun = [c for c in counts if c[0] != _WAITING]
        self._board.show(sum(c[0] for c in begun), sum(c[1] for c in begun), sum(c[2] for c in begun))

    def _remove_leftovers(self) -> None:
        self._tasks[0].output.remove_leftovers([self._tasks[n].name for n in self._missing])

    def _why(self, losses: int) -> str:
        """What to tell of workers that keep dying: the images that they were at, if they got so far."""
        paths: list[str] = []
        for number in self._running.values():
            done = self._cells[3 * number]
            if done != _WAITING:
                pack = self._tasks[number].pack
                slice_ = read_slice(pack.out / PLAN_FOLDER, pack.shard)
                paths.append(repr(slice_[min(done, len(slice_) - 1)].path))
        if not paths:
            return (
                f"worker processes died {losses} times in a row at their start (out of memory? A script that calls "
                'this needs its `if __name__ == "__main__":`). Try --workers 1'
            )
        return (
            f"worker processes died {losses} times in a row (out of memory, or an image that crashes its decoder); "
            f"they were at: {', '.join(paths[:8])}. Try fewer --workers"
        )


# In a worker: the shared memory that `LocalPool` made (ctypes arrays have no useful type).
_cells: Any = None
_stop: Any = None


def _start_worker(cells: Any, stop: Any) -> None:
    """Runs first in every worker."""
    global _cells, _stop
    _cells, _stop = cells, stop
    ignore_interrupts()


def ignore_interrupts() -> None:
    """Leaves Ctrl-C, which reaches the whole group, to the parent; ends this process when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever: the pool's queue never reports its end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(number: int, task: Task) -> PackedShard:
    _note(number, 0, 0, 0)
    return run_task(task, partial(_note, number))


def _note(number: int, done: int, bad: int, source_bytes: int) -> bool:
    _cells[3 * number : 3 * number + 3] = [done, bad, source_bytes]
    return not _stop.value
