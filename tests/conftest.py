"""Settings of all tests: one thread a process (tiny tensors only lose by more), steady hypothesis runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.parallel.world import World

# Before torch is imported anywhere, and for every subprocess: OpenMP threads that spin while they wait for each
# other make a tiny step on a busy machine a hundred times slower.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import HealthCheck, settings

settings.register_profile(
    "mixer",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mixer")

# A shell that starts the tests in the background has SIGINT ignored, and every child would inherit that: Ctrl-C would
# then do nothing in the processes whose reaction to it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def world() -> Iterator[World]:
    """A real process group of one rank."""
    from helpers import as_before

    from pipeline.parallel.world import World

    with as_before():
        world = World.join()
        yield world
        world.leave()
