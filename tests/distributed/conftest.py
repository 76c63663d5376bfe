from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """ranks(R): the session's process group of R ranks, started on first use."""
    folder = tmp_path_factory.mktemp("ranks")
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size, folder))

    yield pool
    for started in pools.values():
        started.close()
