"""The prefetcher's process: what it is sent, what ends it, and how often it is started again."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import members, write_dataset

from pipeline.data.cache import BEAT
from pipeline.data.node_cache import NodeCache
from pipeline.data.order import SampleOrder
from pipeline.data.prefetch import Member, Plan
from pipeline.data.source import TarSource
from pipeline.data.subset import Subset

LIMIT = 16 << 20


def plan(folder: Path, share: Fraction | None = None) -> Plan:
    source = TarSource(write_dataset(folder / "set", {"train": [members(400)]}), "train")
    subset = Subset.of(source, share, folder / "facts") if share else None
    sizes = subset.shard_sizes if subset else source.shard_sizes
    order = SampleOrder(sizes, manifest_sha="", seed=0, global_batch_size=8, select=subset)
    return Plan(order, np.arange(8), [Member(0, source, order.state.chunk)])


def test_a_plan_travels_without_the_ids_of_its_subset(tmp_path):
    whole = plan(tmp_path, Fraction(9, 10))
    sent = pickle.dumps(whole)
    assert np.fromfile(next((tmp_path / "facts").glob("*.ids")), np.uint8)[40:80].tobytes() not in sent
    state = whole.order.state
    assert pickle.loads(sent).chunks(state) == whole.chunks(state)


def test_a_prefetcher_outlives_the_signal_that_stops_the_training(tmp_path):
    cache = NodeCache(tmp_path / "cache", LIMIT, plan(tmp_path), 4)
    cache.start()
    assert (cache.folder / BEAT).exists() and cache._process is not None
    os.kill(cache._process.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        cache._process.wait(0.5)
    cache.close()


def test_a_prefetcher_that_always_fails_is_started_more_and_more_rarely(tmp_path, monkeypatch):
    pause, starts = 0.05, []
    monkeypatch.setattr("pipeline.data.node_cache._PAUSE", pause)
    monkeypatch.setattr("sys.executable", "/bin/false")
    cache = NodeCache(tmp_path / "cache", LIMIT, plan(tmp_path), 4)
    spawn = cache._spawn
    monkeypatch.setattr(cache, "_spawn", lambda: (starts.append(time.monotonic()), spawn()))
    cache.start(wait=0)
    while len(starts) < 5:
        time.sleep(0.01)
    cache.close()
    assert starts[4] - starts[0] >= (1 + 2 + 4 + 8) * pause
