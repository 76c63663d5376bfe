"""A rank that keeps the others waiting is named in the log, with its host."""

from __future__ import annotations

import re
import socket
import time

import pytest

from pipeline.health import slowest_rank
from pipeline.parallel.world import World


def take_steps(world: World, slow: int | None) -> str | None:
    own = []
    for _ in range(10):
        started = time.perf_counter()
        time.sleep(0.2 if world.rank == slow else 0.02)
        own.append(time.perf_counter() - started)
        world.barrier()
    return slowest_rank(own, world)


@pytest.mark.parametrize("size", [2, 3])
def test_a_slow_rank_is_named(ranks, size):
    [said] = set(ranks(size).run(take_steps, 1))
    assert said.startswith(f"rank 1 on {socket.gethostname()} is slow")
    p50, p95, typical = (float(n) for n in re.findall(r"(\d+\.\d+)", said.split(" is slow")[1]))
    assert typical < p50 <= p95
