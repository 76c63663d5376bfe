"""The batches of one step after another, fetched by a thread: so the wait for data can be interrupted, and ends well.

A loader whose worker was killed is made anew where the order stands, which costs no sample. An error that a restart
cannot mend is handed over between two steps, where the state can be saved.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from data_tools.errors import UserError
from pipeline.data.loader import Batch
from pipeline.data.workers import MAX_RESTARTS, is_lost_worker, silence_lost_workers

_POLL = 0.2  # seconds between two looks at whether to go on waiting


class Feed:
    """`make` gives the batches from where the order stands; it is called in the thread, again after a lost worker."""

    def __init__(self, make: Callable[[], Iterator[list[Batch]]], say: Callable[[str], None] = print):
        self._make, self._say = make, say
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._got: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def next(
        self, give_up: Callable[[], bool] = lambda: False, seconds: float = math.inf
    ) -> list[Batch] | UserError | None:
        """One step's micro-batches; the error that keeps them away; None where neither came within `seconds`, or
        before `give_up` said so: the next call waits for the same ones.

        Raises whatever else went wrong in the loader.
        """
        silence_lost_workers()  # an evaluation's too
        if not self._busy:
            self._wanted.put(True)
            self._busy = True
        until = time.monotonic() + seconds
        while True:
            with suppress(queue.Empty):
                got = self._got.get(timeout=min(_POLL, seconds))
                self._busy = False
                if isinstance(got, BaseException) and not isinstance(got, UserError):
                    raise got
                return got
            if give_up() or time.monotonic() >= until:
                return None

    def close(self) -> None:
        """Ends the thread and the loader's workers, whatever they are doing."""
        self._closed = True
        if self._busy:  # in the middle of a read that may take minutes
            _kill_workers()
        self._wanted.put(False)
        self._thread.join(timeout=10.0)
        _kill_workers()  # a traceback can keep a loader alive; at its exit, Python would wait for the workers

    def _run(self) -> None:
        batches, restarts = None, 0
        while self._wanted.get():
            while True:
                try:
                    if batches is None:
                        batches = self._make()
                    self._got.put(next(batches))
                    restarts = 0
                    break
                except UserError as e:
                    self._got.put(e.with_traceback(None))
                    batches = None  # its generator is over; another attempt reads anew
                    break
                except (RuntimeError, OSError, EOFError) as e:
                    batches = None
                    if self._closed:
                        return
                    restarts += 1
                    if not is_lost_worker(e) or restarts > MAX_RESTARTS:  # without a batch in between
                        self._got.put(e)
                        break
                    self._say(f"warning: a loader worker was lost ({_first_line(e)}); starting the loader again")
                    time.sleep(0.1)
                except BaseException as e:
                    batches = None
                    self._got.put(e)
                    break
        del batches  # a DataLoader's iterator ends its workers


def _first_line(e: BaseException) -> str:
    return (str(e) or type(e).__name__).splitlines()[0]


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
