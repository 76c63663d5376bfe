"""Packing tasks on Ray: a cluster of its own on this machine, or the one that RAY_ADDRESS names.

Every machine needs this package, the corpus and the output folder (or its `--work` folder) under the same paths.
Ray itself runs the task of a lost worker or machine again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

from data_tools.errors import Unfinished, UserError
from data_tools.pack import PackedShard
from data_tools.progress import REPORT_SECONDS, Board
from data_tools.tasks import Task, run_task

_MAX_LOSSES = 3  # of one task's worker before it counts as the task's fault
_REACH_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100 << 20  # results are a few hundred bytes

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayPool:
    """Runs tasks on Ray, a few more in flight than there are cores; `workers` 0 means all of the cluster's."""

    def __init__(self, tasks: list[Task], workers: int, board: Board) -> None:
        self._tasks, self._workers, self._board = tasks, workers, board

    def run(self) -> None:
        """Raises what a task raised, after the others stopped; UserError where workers keep dying."""
        with _cluster(self._workers) as ray:
            try:
                self._run(ray)
            finally:
                self._tasks[0].output.remove_leftovers([t.name for t in self._tasks])

    def _run(self, ray: Any) -> None:
        for packed, source_bytes in _map(ray, pack_one, self._tasks, self._workers, lambda t: t.name, self._board.show):
            self._board.finished(packed, source_bytes)


def on_ray(work: Callable[[Item], Result], workers: int) -> Callable[[list[Item]], Iterator[Result]]:
    """`work` on each of some items, on Ray; results as they come."""

    def spread(items: list[Item]) -> Iterator[Result]:
        with _cluster(workers) as ray:
            yield from _map(ray, work, items, workers, lambda item: work.__name__)

    return spread


def _map(
    ray: Any,
    work: Callable[[Item], Result],
    items: list[Item],
    workers: int,
    name: Callable[[Item], str],
    idle: Callable[[], object] = bool,
) -> Iterator[Result]:
    """Results as they come, with a few more items in flight than there are cores; `idle` is called in between."""
    remote = ray.remote(num_cpus=1, max_retries=_MAX_LOSSES)(work)
    cores = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    queue = iter(items)
    running: dict[Any, Item] = {}

    def submit() -> None:
        for item in islice(queue, 1):
            running[remote.remote(item)] = item

    for _ in range(cores if workers else 2 * cores):
        submit()
    try:
        while running:
            done, _ = ray.wait(list(running), timeout=REPORT_SECONDS)
            for ref in done:
                yield _result(ray, ref, name(running.pop(ref)))
                submit()
            idle()
    except BaseException:
        for ref in running:
            ray.cancel(ref, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=30)
        raise


def _result(ray: Any, ref: Any, name: str) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as e:  # the task's own exception, wrapped
        raise e.cause from None
    except ray.exceptions.RayError as e:
        raise Unfinished(
            f"{name}: its Ray worker was lost {_MAX_LOSSES + 1} times (out of memory, or an image that "
            f"crashes its decoder): {str(e).splitlines()[0]}. What is done stays: the same command goes on"
        ) from e


def pack_one(task: Task) -> tuple[PackedShard, int]:
    """What runs on a Ray worker: the shard's marker, and how many source bytes were read."""
    read = 0

    def note(_done: int, _bad: int, source_bytes: int) -> bool:
        nonlocal read
        read = source_bytes
        return True

    return run_task(task, note), read


@contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    """The `ray` module, connected. Raises UserError where it is missing or cannot connect."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs the package ray: pip install 'mixer-pretraining[ray]'") from None
    address = os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        own = {"num_cpus": workers or None, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    _ask(address)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as e:
        raise UserError(f"cannot reach Ray at {address}: {e}; see RAY_ADDRESS") from e
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)  # Ray takes it for itself
    try:
        yield ray
    finally:
        ray.shutdown()


def _ask(address: str) -> None:
    """Raises UserError where nobody listens at a cluster's `HOST:PORT`: Ray would try for minutes and say little."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as e:
        raise UserError(f"cannot reach Ray at {address}: {e.strerror or e}; see RAY_ADDRESS") from e
