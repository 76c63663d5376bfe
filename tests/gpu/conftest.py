from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))  # rank_pool, engine_cases


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """One long-lived process that owns the first GPU (see `rank_pool`)."""
    import torch
    from rank_pool import RankPool

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool = RankPool(1, tmp_path_factory.mktemp("gpu"), device="cuda")
    yield pool
    pool.close()
