"""Watching and stopping runs of a real SLURM from a login node: other hosts, jobs that wait, a rank that hangs."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from training import Training

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def view(training: Training, *more: str) -> dict[str, Any]:
    return json.loads(training.mixer("status", str(training.path), "--json", *more))[0]


def partition_state(training: Training, state: str) -> None:
    rows = subprocess.run(["sinfo", "-h", "-o", "%R"], env=training.environment, capture_output=True, text=True)
    for name in set(rows.stdout.split()):
        command = ["scontrol", "update", f"PartitionName={name}", f"State={state}"]
        subprocess.run(command, env=training.environment, check=True)


def test_a_job_is_watched_while_it_waits_trains_and_hangs(slurm, digits, tmp_path):
    with Training(slurm, tmp_path / "run", digits, stretch=0.3) as training:
        partition_state(training, "DOWN")
        try:
            [job] = training.launch("launch.nodes=2", "launch.nproc=1", options=["--time", "30"])
            seen = view(training)
            assert (seen["state"], seen["job"], seen["job_state"]) == ("QUEUED", job, "PENDING")
            assert f"cancelled job {job}" in training.mixer("stop", str(training.path))
            training.wait_until(lambda: not training.alive(), 60)
            assert view(training)["state"] == "STOPPED"
        finally:
            partition_state(training, "UP")

        [job] = training.resume()
        training.wait_for_steps(attempt=0, steps=3)
        seen = view(training)
        assert (seen["state"], seen["job"], seen["job_state"]) == ("TRAINING", job, "RUNNING")
        assert seen["start"] == f"{job}.0" and len(seen["nodes"]) == seen["world_size"] == 2 and seen["job_left"]

        pulse = json.loads((training.path / "logs" / f"{job}.0" / "pulse-rank-1.json").read_text())
        slurm("exec", pulse["host"].removeprefix("node"), "kill", "-STOP", pulse["pid"])

        def stalled() -> dict[str, Any] | None:
            seen = view(training, "--stalled-after", "3")
            return seen["slowest"] if seen["state"] == "STALLED" else None

        training.wait_until(lambda: stalled() is not None, 60)
        slowest = stalled()
        assert slowest and (slowest["rank"], slowest["host"]) == (1, pulse["host"])
        assert f"rank 1 of 2 on {pulse['host']}" in training.mixer("logs", str(training.path), "--rank", "1")
        assert f"cancelled job {job}" in training.mixer("stop", str(training.path), "--now")
        training.wait_until(lambda: not training.alive(), 120)
        assert view(training)["state"] == "STOPPED"
        assert not training.jobs("requeued")
