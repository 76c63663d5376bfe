from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rank_pool import RankPool

_pools: dict[int, RankPool] = {}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """ranks(R): the folder's process group of R ranks, started on first use."""
    folder = tmp_path_factory.mktemp("ranks")
    yield lambda size: _pools.setdefault(size, RankPool(size, folder))
    _close()  # of a session that was interrupted


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the groups with this folder's last test: ten processes hold gigabytes that other folders' tests need."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _close()


def _close() -> None:
    while _pools:
        _pools.popitem()[1].close()
