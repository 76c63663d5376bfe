"""The prefetcher's process: what it is sent, what ends it, how often it is started again; and its folder."""

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
from helpers import members, script, write_dataset

from data_tools.errors import UserError
from pipeline.data.cache import BEAT
from pipeline.data.node_cache import NodeCache, cache_limit
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


def test_the_working_set_is_counted_chunk_by_chunk(tmp_path):
    """Against the definition: what lies between its first use, less what loaders read ahead, and its last one."""
    counted, ahead, steps = plan(tmp_path), 3, 20
    [member] = counted.members
    states = [counted.order.state]
    while len(states) < steps + ahead:
        states.append(counted.order.next_state(states[-1]))
    uses: dict[tuple[int, int], list[int]] = {}
    for step, state in enumerate(states):
        for chunk in counted.chunks(state):
            uses.setdefault((chunk.shard, chunk.number), []).append(step)
    held = [0] * steps
    for (shard, number), at in uses.items():
        info = member.source.shards[shard]
        share = info.bytes * min(member.chunk, info.samples - number * member.chunk) // info.samples + 1024
        for step in range(max(0, at[0] - ahead), min(steps, at[-1] + 1)):
            held[step] += -(-share // 4096) * 4096
    assert counted.working_set(ahead, steps) == max(held) + 8 * 4096


NODE = """
import socket, sys
sys.path.insert(0, sys.argv[5])
from pathlib import Path
socket.gethostname = lambda: sys.argv[3]
from test_node_cache import LIMIT, plan
from pipeline.data.node_cache import NodeCache, cache_folder
from data_tools.errors import UserError
root, work, first_rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
try:
    cache = NodeCache(cache_folder(root, "run", first_rank), LIMIT, plan(work), 4)
except UserError as e:
    sys.exit(str(e))
cache.start()
print("filling", flush=True)
sys.stdin.readline()
chunks = [p for p in cache.folder.iterdir() if p.stat().st_size and "." in p.name[1:]]
cache.close()
print(len(chunks), flush=True)
"""


def test_nodes_that_share_a_cache_folder_have_one_each(tmp_path):
    """Two nodes of a run, and a third that goes by the name of the first; a second start of one is refused."""
    root = tmp_path / "shared"
    root.mkdir()

    def node(number: int, host: str, first_rank: int) -> subprocess.Popen[str]:
        command = script(NODE, root, tmp_path / f"work-{number}", host, first_rank, Path(__file__).parent)
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    nodes = [node(i, *who) for i, who in enumerate([("a", 0), ("b", 8), ("a", 16)])]
    try:
        assert all(n.stdout and n.stdout.readline() == "filling\n" for n in nodes)
        assert len([p for p in root.iterdir() if p.is_dir()]) == 3
        again = node(3, "a", 0)
        _, said = again.communicate(timeout=60)
        assert again.returncode == 1 and "another process fills this cache" in said
        for ending in nodes:  # each takes away its own only: those that are left go on
            done, said = ending.communicate("\n", timeout=60)
            assert ending.returncode == 0, said
            assert int(done) > 0
        assert list(root.iterdir()) == []
    finally:
        for n in nodes:
            n.kill()


def test_half_of_a_shared_disk_is_no_nodes_to_take(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.node_cache.is_network_mount", lambda path: True)
    with pytest.raises(UserError, match=r"data\.cache_dir=.* network file system.* set data\.cache_size"):
        cache_limit(tmp_path, None, 1)
    assert cache_limit(tmp_path, LIMIT, 1) == LIMIT


def test_a_folder_that_somebody_else_made_is_refused(tmp_path, monkeypatch):
    """In /tmp anybody can make it first; the prefetcher believes what it finds there."""
    from pipeline.data.node_cache import _make_folder

    _make_folder(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="belongs to somebody else"):
        _make_folder(tmp_path / "linked")
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to somebody else"):
        _make_folder(tmp_path / "mine")
