"""Ranks that differ: one that keeps the others waiting is named with its host; one late file costs one save."""

from __future__ import annotations

import re
import socket
import time

import pytest
import slow_cases as cases
from helpers import TINY

from pipeline.checkpoint.manager import committed_steps
from pipeline.health import slowest_rank
from pipeline.parallel.world import World
from pipeline.run import read_lines


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


def test_a_rank_whose_data_is_slow_is_named_by_a_training(ranks, tmp_path):
    """Though all of them wait for it before the step."""
    overrides = [
        *TINY,
        "train.duration=6 steps",
        "logging.every=3 steps",
        "checkpoint.every=9 steps",
    ]
    said, _ = ranks(2).run(cases.train_with_slow_data, str(tmp_path), overrides)
    assert len([text for text in said if text.startswith(f"rank 1 on {socket.gethostname()} is slow")]) == 2, said


def test_a_rank_whose_file_is_later_than_a_collective_waits(ranks, tmp_path):
    """That save fails, the next ones do not: they have a group of their own."""
    overrides = [*TINY, "train.duration=4 steps", "checkpoint.every=2 steps", "health.timeout=4 s"]
    ranks(2).run(cases.train_with_a_late_file, str(tmp_path), overrides)
    ends = [(e["event"], e["step"]) for e in read_lines(tmp_path / "events.jsonl") if e["event"].startswith("save")]
    assert ends[0] == ("save_failed", 2) and ends[-1] == ("save", 4)
    assert committed_steps(tmp_path / "checkpoints") == [4]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"], "no debris"


def test_a_checkpoint_folder_of_each_nodes_own_is_refused(ranks, tmp_path):
    ours, theirs = str(tmp_path / "a"), str(tmp_path / "b")
    assert ranks(2).run(cases.look_for_shared, [ours, ours]) == [None, None]
    for said in ranks(2).run(cases.look_for_shared, [ours, theirs]):
        assert f"is not the same folder on all nodes: rank 1 on {socket.gethostname()} cannot see" in said
    assert not list((tmp_path / "a").iterdir())
