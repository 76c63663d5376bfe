"""Trainings on a real SLURM that are ended, moved, chained, or begin on nodes that are not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import Training, assert_every_step_once, world_sizes

from launch.slurm import quote_option
from pipeline.checkpoint.manager import committed_steps
from pipeline.run import read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_four_nodes_then_two_then_three(slurm, digits, tmp_path, was_down):
    """`mixer stop` saves and ends, `scancel` too; `mixer resume` goes on with another number of nodes."""
    with Training(slurm, tmp_path / "run", digits, stretch=0.2) as training:
        training.launch("launch.nodes=4", "launch.nproc=1", options=["--time", "30"])
        training.wait_for_steps(attempt=0, steps=6)
        assert "SLURM has this run already" in training.mixer("resume", str(training.path), code=1)
        training.stop()
        training.wait_until(lambda: not training.alive(), 90)
        assert [line["why"] for line in training.jobs("ended")] == ["stopped"]
        stopped = training.step()
        assert committed_steps(training.run.checkpoints)[-1] == stopped

        [job] = training.resume("--nodes", "2")
        training.wait_for_steps(attempt=1, steps=6)
        assert training.starts()[1]["step"] == stopped
        subprocess.run(["scancel", job], env=training.environment, check=True)
        training.wait_until(lambda: not training.alive(), 90)
        cancelled = committed_steps(training.run.checkpoints)[-1]
        assert cancelled >= stopped + 5  # saved in SLURM's grace time, or at the latest five steps ago
        assert not training.jobs("requeued")  # what a person ended stays ended

        training.resume("--nodes", "3", "optimizer.lr=0.005")
        training.wait_for_end()
        assert world_sizes(training.path) == [4, 2, 3]
        assert_every_step_once(training.path)
        training.mixer("audit", str(training.path))


def test_a_process_dies_then_all_stop_now(slurm, digits, tmp_path, was_down):
    """A killed process is started again inside the job, with all others; `mixer stop --now` ends it."""
    with Training(slurm, tmp_path / "run", digits, stretch=0.3) as training:
        [job] = training.launch("launch.nodes=2", "launch.nproc=1", options=["--time", "30"])
        training.wait_for_steps(attempt=0, steps=7)
        pulse = json.loads((training.path / "logs" / f"{job}.0" / "pulse-rank-1.json").read_text())
        slurm("exec", pulse["host"].removeprefix("node"), "kill", "-KILL", pulse["pid"])
        training.wait_for_steps(attempt=1, steps=2)
        was_down("a process killed, started again in the job", training.downtimes())
        launched = training.jobs("launched")
        assert [(line["restart"], line["attempt"]) for line in launched] == [(0, 0), (0, 1)]
        assert training.starts()[1]["step"] >= 5  # no more than what came after the last checkpoint
        training.stop("--now")
        training.wait_until(lambda: not training.alive(), 60)
        assert not training.run.finished.exists()
        assert not training.jobs("requeued")


def test_chain(slurm, digits, tmp_path, was_down):
    """Jobs one after the other: each saves before its limit, and those after the end find nothing to do."""
    with Training(slurm, tmp_path / "run", digits, stretch=0.9) as training:
        jobs = training.launch("launch.nodes=1", "launch.nproc=1", options=["--time", "1", "--chain", "4"])
        assert len(jobs) == 4
        training.wait_until(lambda: training.jobs("ended"))
        for job in jobs[1:]:  # one more limit of a minute would only take time
            training.set_limit(job)
        training.wait_for_end(400)
        was_down("time limit in a chain: the next job goes on", training.downtimes())
        started = [line["job"] for line in training.jobs("started")]
        assert started == jobs[:2]
        assert not training.jobs("requeued")
        assert_every_step_once(training.path)
        training.mixer("audit", str(training.path))


def test_unfit_nodes_are_left_out(slurm, digits, tmp_path):
    """One node cannot write checkpoints, another has another package: named, and excluded from the next job."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    metadata = next(Path(p) for p in sys.path if (Path(p) / "torch").is_dir())
    [metadata] = metadata.glob("omegaconf-*.dist-info/METADATA")
    other = tmp_path / "METADATA"
    other.write_text("Metadata-Version: 2.1\nName: omegaconf\nVersion: 9.9.9\n")
    slurm("exec", 1, "mount", "--bind", run / "checkpoints", run / "checkpoints")
    slurm("exec", 1, "mount", "-o", "remount,ro,bind", run / "checkpoints")
    slurm("exec", 2, "mount", "--bind", other, metadata)
    try:
        with Training(slurm, run, digits) as training:
            [first] = training.launch("launch.nodes=2-3", "launch.nproc=1", options=["--time", "30"])
            training.wait_for_end()
            bad, good = training.jobs("preflight")
            assert set(bad["failed"]) == {"node1", "node2"}
            assert "Read-only file system" in bad["failed"]["node1"][0]
            assert bad["failed"]["node2"] == ["omegaconf 9.9.9, the others have " + installed("omegaconf")]
            assert good["ok"] and good["job"] != first
            again = training.jobs("submitted")[1]
            assert (again["by"], again["exclude"]) == ("requeue", "node1,node2")
            assert [line["nodes"] for line in training.jobs("started")][1] == ["node3", "node4"]
            assert world_sizes(training.path) == [2]
    finally:
        slurm("exec", 1, "umount", run / "checkpoints")
        slurm("exec", 2, "umount", metadata)


@pytest.mark.parametrize("notices", ["slurm", "watchdog"])
def test_a_node_out_of_reach(slurm, digits, tmp_path, was_down, notices):
    """The network parts one node from the others. SLURM gives it up; or, where SLURM is slow to (five minutes by
    default), the watchdog ends the step, the preflight names the node and the next job does without it."""
    if notices == "watchdog":
        slurm.set("SlurmdTimeout", 300)
    with Training(slurm, tmp_path / "run", digits, stretch=0.2) as training:
        settings = ["launch.nodes=2-3", "launch.nproc=1", "health.timeout=20 s"]
        [job] = training.launch(*settings, options=["--time", "30"])
        training.wait_until(lambda: any(e["event"] == "save" for e in read_lines(training.run.events)))
        host = training.jobs("started")[-1]["nodes"][-1]
        slurm("partition", host.removeprefix("node"))
        try:
            training.wait_for_steps(attempt=1, steps=1, seconds=300)
            was_down(f"network: a node out of reach, the {notices} notices", training.downtimes())
        finally:
            slurm("heal", host.removeprefix("node"))
            slurm.set("SlurmdTimeout", 6)
        training.wait_for_end()
        if notices == "watchdog":
            assert training.jobs("preflight")[1]["failed"] == {host: ["no answer"]}
            assert training.jobs("submitted")[1]["exclude"] == host
        else:
            assert {line["job"] for line in training.jobs("started")} == {job}
        assert host not in training.jobs("started")[-1]["nodes"]
        assert_every_step_once(training.path)
        training.mixer("audit", str(training.path))
    slurm.wait_for_nodes()


def test_inside_an_allocation(slurm, digits, tmp_path):
    with Training(slurm, tmp_path / "run", digits) as training:
        settings = ["launch.nproc=1", "train.duration=6 steps", "launch.cpus_per_node=4"]
        command = [sys.executable, "-m", "launch.cli", "launch", "slurm", "digits", f"run.dir={training.path}",
                   f"data.train={digits}", *settings, "launch.nodes=2", "--inside"]  # fmt: skip
        run = subprocess.run(
            ["salloc", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--time=5", *command],
            env=training.environment, cwd=training.checkout, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert training.run.finished.exists() and world_sizes(training.path) == [2]
        assert "needs" not in run.stderr
        refused = training.mixer("launch", "slurm", "digits", "data.train=synthetic", "--inside", code=1)
        assert "salloc" in refused


def test_sbatch_reads_values_as_they_are(slurm, tmp_path):
    hostile = "a b'\"$(touch INJECTED)`id`; #x %j \\ end"
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --comment={quote_option('comment', hostile)}\n#SBATCH --hold\ntrue\n")
    sent = subprocess.run(
        ["sbatch", "--parsable", script], env=slurm.environment, capture_output=True, text=True, check=True
    )
    job = sent.stdout.strip()
    shown = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%k"], env=slurm.environment, capture_output=True, text=True, check=True
    )
    subprocess.run(["scancel", job], env=slurm.environment, check=True)
    assert shown.stdout.rstrip("\n") == hostile
    assert not list(tmp_path.glob("INJECTED"))


def installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)
