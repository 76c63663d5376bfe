"""Long-lived process groups: R processes join one gloo group and then run one case after another.

Starting processes and importing torch and DeepSpeed takes seconds, a case takes a fraction of one; so the checkpoint
matrix fits into the ordinary tests. A case is a module-level function `case(world, *args)` that every rank calls;
its results come back in rank order. A rank that raises, dies or hangs fails the test with what it said, and the group
is started afresh for the next one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pipeline.parallel.world import free_port

START_SECONDS = 120.0
RANK_TIMEOUT = 60.0  # seconds until a collective gives up
GRACE_SECONDS = 3.0  # after one rank failed, the others are likely stuck in a collective


class RankFailure(AssertionError):
    """A case failed on some rank; the message holds every rank's traceback or last output."""


@dataclass
class Rank:
    number: int
    process: Any
    pipe: Connection
    log: Path


class RankPool:
    """R processes in one group. `run` is the only thing to call; `close` when done."""

    def __init__(self, size: int, folder: Path, device: str = "cpu"):
        self.size = size
        self._folder, self._device = folder, device
        self._ranks: list[Rank] = []

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`case(world, *args)` on every rank -> results in rank order. Raises RankFailure."""
        if not self._ranks:
            self._start()
        for rank in self._ranks:
            rank.pipe.send((case, args))
        return self._collect(timeout)

    def close(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
            rank.process.join()
            rank.pipe.close()
        self._ranks = []

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Children are forked from one server that has imported everything heavy, once; CUDA survives no fork
        context = multiprocessing.get_context("forkserver" if self._device == "cpu" else "spawn")
        if self._device == "cpu":
            context.set_forkserver_preload(["engine_cases"])
        port = free_port()
        for number in range(self.size):
            ours, theirs = context.Pipe()
            log = self._folder / f"world-{self.size}-rank-{number}.log"
            process = context.Process(target=_serve, args=(theirs, number, self.size, port, str(log), self._device))
            process.daemon = True
            with _server_environment():
                process.start()
            theirs.close()
            self._ranks.append(Rank(number, process, ours, log))
        self._collect(START_SECONDS)

    def _collect(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.size:
            waiting = [r for r in self._ranks if r.number not in results and r.number not in failures]
            by_source: dict[Any, Rank] = {r.pipe: r for r in waiting} | {r.process.sentinel: r for r in waiting}
            ready = wait(list(by_source), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting:
                    failures[rank.number] = "did not answer in time (stuck, or waiting for another rank)"
                break
            for rank in {by_source[source].number: by_source[source] for source in ready}.values():
                try:
                    succeeded, value = rank.pipe.recv()
                except (EOFError, OSError):
                    rank.process.join(1)
                    failures[rank.number] = f"died with exit code {rank.process.exitcode}\n{_tail(rank.log)}"
                else:
                    (results if succeeded else failures)[rank.number] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            self.close()
            texts = [f"rank {n} of {self.size}: {text}" for n, text in sorted(failures.items())]
            raise RankFailure("\n".join(texts))
        return [results[n] for n in range(self.size)]


@contextmanager
def _server_environment() -> Iterator[None]:
    """What the server that forks the ranks finds in its environment; only the first start of all starts it.

    One thread a rank: OpenMP's threads spin while they wait, and dozens of them on a few cores stand in each other's
    way for seconds a step. They read the number when torch is imported, so inside a rank it is too late.
    """
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, before["PYTHONPATH"]]))
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tail(log: Path, size: int = 4000) -> str:
    return log.read_text(errors="replace")[-size:] if log.exists() else ""


def _serve(pipe: Connection, rank: int, size: int, port: int, log: str, device: str) -> None:
    """One rank's process: joins the group, then answers until its pipe closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the process' life
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        MIXER_DEVICE=device,
        CUBLAS_WORKSPACE_CONFIG=":4096:8",  # without it cuBLAS may add up in another order from run to run
    )
    import torch

    from pipeline.cli import quiet_libraries
    from pipeline.parallel.world import World

    gc.freeze()  # what the server imported is never garbage; looking it through after every case took longer than most
    torch.set_num_threads(1)
    quiet_libraries()
    try:
        world = World.join(timeout_s=RANK_TIMEOUT)
        pipe.send((True, None))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, case(world, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
