"""A training on a real SLURM: finishes, survives its time limit and lost nodes, ends when asked, shuns bad nodes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training import ROOT, STEPS, Training, assert_every_step_once, curve, world_sizes

from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import committed_steps, step_folder
from pipeline.run import RunFolder, read_digests, read_lines, read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TWO_BY_TWO = ["launch.nodes=2", "launch.nproc=2"]


def history(run: Path) -> list[tuple[int, tuple[int, int, str], float]]:
    digests, losses = read_digests(run), {row["step"]: row["loss"] for row in read_metrics(run)}
    return [(step, digests[step], losses[step]) for step in sorted(digests)]


def final_digest(run: Path) -> str:
    """Of all weights and moments of the newest checkpoint."""
    root = RunFolder(run).checkpoints
    return CheckpointReader(step_folder(root, committed_steps(root)[-1])).digest()


@pytest.fixture(scope="module")
def undisturbed(slurm, digits, tmp_path_factory) -> Path:
    """Two nodes with two processes each, to the end, and a dependent job that evaluates."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with Training(slurm, run, digits) as training:
        first, evaluation = training.launch(*TWO_BY_TWO, options=["--then-eval", "--time", "30"])
        training.wait_for_end()
        assert [line["by"] for line in training.jobs("submitted")] == ["user", "eval"] and first != evaluation
    return run


def test_finishes_and_is_evaluated(slurm, digits, undisturbed):
    run = RunFolder(undisturbed)
    assert_every_step_once(undisturbed)
    assert world_sizes(undisturbed) == [4]
    ended = [line for line in read_lines(undisturbed / "jobs.jsonl") if line["event"] == "ended"]
    assert [(line["code"], line["why"]) for line in ended] == [(0, "finished")]
    checked = next(line for line in read_lines(undisturbed / "jobs.jsonl") if line["event"] == "preflight")
    assert checked["ok"] and not checked["failed"]
    reduced = next(e for e in read_lines(run.events) if e["event"] == "all_reduce")
    assert reduced["world_size"] == 4 and reduced["gb_per_s"] > 0
    [evaluation] = (undisturbed / "eval").glob("*.json")
    finish = next(e for e in read_lines(run.events) if e["event"] == "finish")
    assert json.loads(evaluation.read_text())["top1"] == finish["metrics"]["top1"]  # another job, the same weights


def test_time_limit(slurm, digits, undisturbed, tmp_path, was_down):
    """Signal, save, requeue, resume, until finished: bit for bit the undisturbed run, by the submitted code."""
    checkout = tmp_path / "checkout"
    for package in ("launch", "pipeline", "data_tools", "configs"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    with Training(slurm, tmp_path / "run", digits, stretch=0.9, checkout=checkout) as training:
        [job] = training.launch(*TWO_BY_TWO, options=["--time", "1"])
        training.wait_for_steps(attempt=0, steps=1)
        # The checkout goes on living, and what is in it now would not even start
        (checkout / "pipeline" / "__init__.py").write_text("raise SystemExit('the checkout, not what was submitted')\n")
        training.wait_until(lambda: training.jobs("requeued"))
        training.set_limit(job)  # one more limit of a minute would only take time
        training.wait_until(training.run.finished.exists, 400)
        (checkout / "pipeline" / "__init__.py").write_text("")
        training.wait_until(lambda: not training.alive(), 60)
        was_down("time limit: signal, save, requeue, resume", training.downtimes())
        starts = training.jobs("started")
        assert len(starts) > 1 and [line["restart"] for line in starts] == list(range(len(starts)))
        assert {line["job"] for line in starts} == {job}
        # No step is lost: each start begins where the one before ended
        saved = [e["step"] for e in read_lines(training.run.events) if e["event"] == "signal"]
        assert [e["step"] for e in training.starts()] == [0, *saved]
        assert history(training.path) == history(undisturbed)
        assert final_digest(training.path) == final_digest(undisturbed)
        points = curve(training.path)
        assert [step for step, _ in points] == list(range(1, STEPS + 1))
        assert points == curve(undisturbed)
        training.mixer("audit", str(training.path))


def test_two_nodes_lose_their_power(slurm, digits, tmp_path, was_down):
    """One in the middle of a step, then one in the middle of a checkpoint; none comes back. The rest goes on."""
    lost = []
    try:
        with Training(slurm, tmp_path / "run", digits, stretch=0.5) as training:
            [job] = training.launch("launch.nodes=2-4", "launch.nproc=1", options=["--time", "30"])
            for attempt, mark in enumerate([b"B", b"C"]):
                training.wait_for_steps(attempt, steps=8)
                # Not the node of the batch script first: then SLURM itself has to start it elsewhere
                victims = [
                    r for r in range(4 - attempt) if (training.host_of(r) == first_host(training)) == bool(attempt)
                ]
                training.wait_until(lambda mark=mark, at=victims[-1]: mark in training.marks().get(at, b""))
                host = training.host_of(victims[-1])
                slurm("kill-node", host.removeprefix("node"))
                lost.append(host)
                assert mark in training.marks()[victims[-1]], "it was elsewhere when it died"
            training.wait_for_end()
            was_down("power cut: in a step, then in a checkpoint", training.downtimes())
            assert world_sizes(training.path) == [4, 3, 2]
            assert {line["job"] for line in training.jobs("started")} == {job}
            assert set(training.jobs("started")[-1]["nodes"]).isdisjoint(lost)
            assert_every_step_once(training.path)
            training.mixer("audit", str(training.path))
    finally:
        for host in lost:
            slurm("start-node", host.removeprefix("node"))
        slurm.wait_for_nodes()


def first_host(training: Training) -> str:
    """The node of the batch script."""
    return training.jobs("started")[-1]["nodes"][0]
