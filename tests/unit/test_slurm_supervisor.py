"""What a job does after trouble: go on where it can, and end only where going on is hopeless.

SLURM's commands are small scripts here: what they answer, and when, is what a real cluster does only on a bad day.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.jobs import book
from launch.preflight import MARK
from pipeline.run import RunFolder, read_lines

PLAN = {
    "max_restarts": 0, "max_requeues": 50, "preflight": False, "requeue": "auto", "chain": 1, "then_eval": False,
    "gpus_per_node": 0, "cpus_per_node": None, "srun": [], "node_command": ["python3"], "processes": 1, "allow": "",
    "versions": {}, "nodes": "2", "profile": {"exclude": None}, "signal_lead": 0,
}  # fmt: skip


class Cluster:
    """A run folder, and the commands that its job finds."""

    def __init__(self, folder: Path):
        self.run, self.bin = folder / "run", folder / "bin"
        (self.run / "launch").mkdir(parents=True)
        self.bin.mkdir()
        self.plan()
        self.command("scontrol", "exit 0")
        self.command("squeue", "echo UNLIMITED")
        book(self.run, "submitted", "7", by="user", nodes="2")

    def plan(self, **changes: Any) -> None:
        (self.run / "launch" / "submission.json").write_text(json.dumps(PLAN | changes))

    def command(self, name: str, body: str) -> None:
        """`body`: bash. What it was called with is kept."""
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "$@" >> {self.bin}/{name}.calls\n{body}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        path = self.bin / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def limit(self, first: str, then: str) -> None:
        """What is left of the job, when it begins and when it asks again."""
        self.command("squeue", f'[ "$(wc -l < {self.bin}/squeue.calls)" = 1 ] && echo {first} || echo {then}')

    def step(self, body: str) -> str:
        """For srun: `body` for the training's step, with $outcomes set."""
        return f'while [ $# -gt 0 ]; do [ "$1" = launch.node ] && outcomes=$2; shift; done\n{body}'

    def preflight(self, **reports: list[str]) -> str:
        """For srun: node -> its problems."""
        lines = [
            MARK + json.dumps({"node": node, "problems": problems, "versions": {}, "clock": 0})
            for node, problems in reports.items()
        ]
        return "\n".join(f'echo \'{line}\' | sed "s/.clock.: 0/\\"clock\\": $(date +%s)/"' for line in lines)

    def start(self, nodes: str = "n[1-2]") -> tuple[int, str]:
        env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes, "PATH": f"{self.bin}:/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-m", "launch.slurm_job", "train", str(self.run)],
            env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.run / "jobs.jsonl") if line["event"] == event]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def outcome(node: str, codes: list[int], signals: list[str], agent: int = 1) -> str:
    report = json.dumps({"codes": codes, "agent": agent, "signals": signals})
    return f"echo '{report}' > $outcomes/{node}.json"


def test_a_launcher_killed_on_one_node_is_not_taken_for_a_scancel(cluster: Cluster) -> None:
    """srun ends the other node for its sake; the training starts again in the job."""
    cluster.plan(max_restarts=1)
    cluster.command("srun", cluster.step(f"{outcome('n2', [70], ['SIGTERM'])}; exit 137"))
    code, said = cluster.start()
    assert code == 1 and len(cluster.lines("launched")) == 2, said
    assert cluster.lines("ended")[-1]["why"] == "died"


def test_both_nodes_signalled_is_a_scancel(cluster: Cluster) -> None:
    both = f"{outcome('n1', [], ['SIGTERM'])}; {outcome('n2', [70], ['SIGTERM'])}; exit 1"
    cluster.command("srun", cluster.step(both))
    assert cluster.start()[0] == 75
    assert cluster.lines("ended")[-1]["why"] == "cancelled" and not cluster.lines("requeued")


def test_an_outage_that_all_nodes_see_does_not_end_a_run_that_was_fit(cluster: Cluster) -> None:
    cluster.plan(preflight=True)
    away = ["cannot write to s3://bucket/run: Could not connect"]
    cluster.command("srun", cluster.preflight(n1=away, n2=away))
    code, said = cluster.start()
    assert code == 1 and "every node fails the preflight" in said  # never fit: a mistake
    book(cluster.run, "preflight", "7", restart=0, attempt=0, ok=True, failed={}, seconds=1)
    code, said = cluster.start()
    assert code == 75 and cluster.calls("scontrol") == ["requeue 7"], said
    for _ in range(20):
        book(cluster.run, "preflight", "7", restart=0, attempt=0, ok=False, failed={"n1": away}, seconds=1)
    code, said = cluster.start()
    assert code == 1 and "preflights in a row failed" in said


def test_without_enough_nodes_for_leaving_one_out_it_goes_on_with_any(cluster: Cluster) -> None:
    cluster.plan(preflight=True)
    cluster.command("srun", cluster.preflight(n1=[], n2=["1 GPUs instead of 8"]))
    cluster.command("sbatch", "echo 'Requested node configuration is not available' >&2; exit 1")
    code, said = cluster.start()
    assert code == 75 and cluster.calls("scontrol") == ["requeue 7"], said
    assert "--exclude=n2" in cluster.calls("sbatch")[0]
    assert "cannot submit the next job without n2: sbatch refused" in said and "not available" in said


def test_in_a_chain_the_job_without_the_unfit_node_waits_for_the_others(cluster: Cluster) -> None:
    cluster.plan(preflight=True, chain=3)
    cluster.command("srun", cluster.preflight(n1=[], n2=["1 GPUs instead of 8"]))
    cluster.command("sbatch", "echo 8")
    assert cluster.start()[0] == 75
    assert cluster.calls("sbatch")[0].split()[1:3] == ["--exclude=n2", "--dependency=singleton"]


def test_who_is_told_to_end_during_the_preflight_starts_nothing(cluster: Cluster) -> None:
    """Ctrl-C in an allocation: a second one would not be passed on."""
    cluster.plan(preflight=True, requeue="never")
    cluster.command("scancel", "exit 0")
    report = cluster.preflight(n1=[], n2=[])
    cluster.command("srun", f"kill -INT $PPID; sleep 0.3\n{report}")
    code, said = cluster.start()
    assert code == 75 and not cluster.lines("launched"), said
    assert cluster.lines("ended")[-1]["why"] == "cancelled" and cluster.calls("scancel") == ["--signal=TERM 7"]


def test_what_srun_mixed_up_is_no_answer(cluster: Cluster) -> None:
    cluster.plan(preflight=True)
    whole = cluster.preflight(n1=[])
    cluster.command("srun", f"printf 'a library says: '\n{whole}\necho '{MARK}{{\"node\": \"n{MARK}'")
    cluster.command("sbatch", "echo 8")
    code, said = cluster.start()
    assert code == 75 and "Traceback" not in said, said
    assert cluster.lines("preflight")[0]["failed"] == {"n2": ["no answer"]}


def test_progress_after_a_damaged_checkpoint_is_progress(cluster: Cluster) -> None:
    """Step 1000 was damaged, the run went back to 500 and saved 600, 700, ...: none is as high, all are new."""
    run = RunFolder(cluster.run)
    for step in (500, 1000, 600, 700, 800):
        run.record("save", step=step)
        book(cluster.run, "started", "7", restart=0, nodes=["n1", "n2"], step=step)
        book(cluster.run, "launched", "7", restart=0, attempt=0, step=1000 if step > 500 else 500)
    cluster.command("srun", cluster.step(f"{outcome('n1', [75], [])}; {outcome('n2', [75], [])}"))
    code, said = cluster.start()
    assert code == 75 and "from step 800" in said and "in a row" not in said


def test_an_extended_job_is_not_requeued_at_its_old_limit(cluster: Cluster) -> None:
    cluster.limit("0:16", "2:00:00")
    end = f"sleep 2; {outcome('n1', [75], ['SIGUSR2'])}; {outcome('n2', [75], ['SIGUSR2'])}"
    cluster.command("srun", cluster.step(end))
    code, said = cluster.start()
    assert code == 75 and "has not ended" not in said, said
    assert [line["why"] for line in cluster.lines("requeued")] == ["saved before the time limit or a preemption"]
    assert len(cluster.calls("squeue")) == 2


def test_a_job_at_its_limit_is_requeued_although_srun_does_not_end(cluster: Cluster) -> None:
    cluster.limit("0:16", "0:14")
    cluster.command("srun", cluster.step("sleep 2; exit 1"))
    assert cluster.start()[0] == 75
    assert cluster.calls("scontrol") == ["requeue 7"]


def test_after_the_signal_to_save_nothing_is_started_that_would_not_hear_of_it(cluster: Cluster) -> None:
    """A process dies when the limit is near: the next job goes on, rather than this one being killed in the middle."""
    cluster.plan(max_restarts=3, signal_lead=600)
    cluster.command("squeue", "echo 8:00")
    cluster.command("srun", cluster.step("exit 1"))
    code, said = cluster.start()
    assert code == 75 and len(cluster.lines("launched")) == 1, said
    assert cluster.calls("scontrol") == ["requeue 7"]


def test_trouble_of_the_launcher_itself_does_not_end_the_run(cluster: Cluster) -> None:
    cluster.plan(max_restarts=2)
    (cluster.run / "logs").write_text("")  # no folder can be made in it
    codes = [cluster.start()[0] for _ in range(3)]
    assert codes == [70, 70, 70] and [line["why"] for line in cluster.lines("ended")] == ["trouble"] * 3
    assert cluster.calls("scontrol") == ["requeue 7"] * 2  # no more than launch.max_restarts


def test_how_slurm_says_a_job_ended(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.queue import ended

    monkeypatch.setenv("PATH", f"{cluster.bin}:/usr/bin:/bin")
    cluster.command("sacct", "echo 'CANCELLED by 1000|0:15'")
    assert ended("7") == "CANCELLED by 1000, exit code 0:15"
    cluster.command("sacct", "echo 'OUT_OF_MEMORY|0:125'")
    assert ended("7") == "OUT_OF_MEMORY, exit code 0:125"
