"""A small training on a real SLURM, as its user starts and watches it; and how long it stood still when disturbed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.run import RunFolder, read_ledger, read_lines

ROOT = Path(__file__).parents[2]
PROBES = ROOT / "tests" / "integration" / "probe"
STEPS = 40
SETTINGS = [
    "model.name=mixer_s16", "model.image_size=16", "model.patch_size=4", "model.hidden_dim=24", "model.num_blocks=2",
    "model.tokens_mlp_dim=8", "model.channels_mlp_dim=32", "augment.hflip=0.0", "data.num_workers=0",
    f"train.duration={STEPS} steps", "train.global_batch_size=24", "train.precision=fp32", "train.strategy=ddp",
    "optimizer.lr=0.01", "scheduler.warmup=5 steps", "checkpoint.every=5 steps", "logging.every=1 steps",
    "launch.cpus_per_node=4", "launch.signal_lead=10",
]  # fmt: skip


class Training:
    """One run on the cluster. `stretch`: seconds that every backward pass and every write takes longer."""

    def __init__(self, slurm: Any, run: Path, digits: Path, *, stretch: float = 0.0, checkout: Path = ROOT):
        self.slurm, self.path, self.digits, self.checkout = slurm, run, digits, checkout
        self.run = RunFolder(run)
        self.probe = run.parent / f"{run.name}-probe"
        self.environment = {
            **slurm.environment,
            "PYTHONPATH": os.pathsep.join([str(PROBES), str(checkout)]),
            "PYTHONSAFEPATH": "1",
            "MIXER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
            "MIXER_TEST_PROBE": str(self.probe),
            "MIXER_TEST_STRETCH": str(stretch),
        }
        self._seen: list[tuple[float, int, int]] = []  # (time, attempt, completed step)
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._over.set()
        alive = self.alive()
        if alive:
            subprocess.run(["scancel", *alive], env=self.environment, check=False)
            self.wait_until(lambda: not self.alive(), 90)

    # -- what the user types --------------------------------------------------------------------------------------

    def mixer(self, *arguments: str, code: int = 0, **more: Any) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments], env=self.environment, cwd=self.checkout,
            capture_output=True, text=True, timeout=180, **more,
        )  # fmt: skip
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    def launch(self, *settings: str, options: Sequence[str] = ()) -> list[str]:
        """Submits; returns the job ids."""
        recipe = self.path.parent / "recipe.yaml"
        recipe.write_text("run: {name: digits}\n")
        said = self.mixer(
            "launch", "slurm", str(recipe), f"run.dir={self.path}", f"data.train={self.digits}", *SETTINGS, *settings,
            *options,
        )  # fmt: skip
        return job_ids(said)

    def resume(self, *arguments: str) -> list[str]:
        return job_ids(self.mixer("resume", str(self.path), *arguments))

    def stop(self, *options: str) -> None:
        self.mixer("stop", str(self.path), *options)

    def set_limit(self, job: str, minutes: int = 30) -> None:
        """Another time limit for a job that waits; as soon as SLURM takes it."""
        command = ["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"]
        self.wait_until(lambda: subprocess.run(command, env=self.environment, capture_output=True).returncode == 0, 60)

    # -- what can be seen -----------------------------------------------------------------------------------------

    def alive(self) -> list[str]:
        """Jobs of this run that SLURM has not ended."""
        known = {line["job"] for line in self.jobs("submitted")}
        query = subprocess.run(["squeue", "-h", "-o", "%i"], env=self.environment, capture_output=True, text=True)
        return [job for job in query.stdout.split() if job in known]

    def jobs(self, event: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.path / "jobs.jsonl") if line["event"] == event]

    def starts(self) -> list[dict[str, Any]]:
        return [e for e in read_lines(self.run.events) if e["event"] in ("start", "resume")]

    def step(self) -> int:
        return self._seen[-1][2] if self._seen else 0

    def host_of(self, rank: int) -> str:
        """By the newest sign of life."""
        beats = sorted(self.path.glob(f"logs/*/pulse-rank-{rank}.json"), key=lambda p: p.stat().st_mtime)
        return json.loads(beats[-1].read_text())["host"]

    def marks(self) -> dict[int, bytes]:
        """rank -> where it is: b"B" in a backward pass, b"C" in a checkpoint's write (the probe of the tests)."""
        data = self.probe.read_bytes() if self.probe.exists() else b""
        return {r: data[2 * r : 2 * r + 2] for r in range(len(data) // 2)}

    def log(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted((self.path / "logs").glob("job-*.log")))

    def wait_until(self, condition: Callable[[], Any], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                jobs = (self.path / "jobs.jsonl").read_text() if (self.path / "jobs.jsonl").exists() else ""
                queue = subprocess.run(["squeue"], env=self.environment, capture_output=True, text=True).stdout
                raise AssertionError(f"not within {seconds} s\n{queue}\n{jobs}\n{self.log()[-6000:]}")
            time.sleep(0.02)

    def wait_for_steps(self, attempt: int, steps: int, seconds: float = 240) -> None:
        """Until attempt number `attempt` has made `steps` steps."""

        def arrived() -> bool:
            starts = self.starts()
            if len(starts) <= attempt or not self._seen:
                return False
            _, now, step = self._seen[-1]
            return now > attempt or (now == attempt and step >= starts[attempt]["step"] + steps)

        self.wait_until(arrived, seconds)

    def wait_for_end(self, seconds: float = 300) -> None:
        """Until FINISHED, and no job is left."""
        self.wait_until(self.run.finished.exists, seconds)
        self.wait_until(lambda: not self.alive(), 60)

    def downtimes(self) -> list[float]:
        """Seconds between the last step of one attempt and the first of the next."""
        gaps = []
        for (before, a, _), (after, b, _) in zip(self._seen, self._seen[1:], strict=False):
            if a != b:
                gaps.append(round(after - before, 1))
        return gaps

    def _watch(self) -> None:
        """Notes when steps are completed: each is logged, and every log line replaces STATUS.json."""
        while not self._over.wait(0.05):
            status = self.run.read_status()
            if status.get("step") and "loss" in status:
                seen = (status["time"], status["attempt"], status["step"])
                if not self._seen or self._seen[-1] != seen:
                    self._seen.append(seen)


def job_ids(said: str) -> list[str]:
    found = re.search(r"submitted: job ([\d, ]+);", said)
    assert found, said
    return found[1].split(", ")


def world_sizes(run: Path) -> list[int]:
    """Of all starts, in order."""
    return [e["world_size"] for e in read_lines(RunFolder(run).events) if e["event"] in ("start", "resume")]


def assert_every_step_once(run: Path, steps: int = STEPS) -> None:
    assert list(read_ledger(run)) == list(range(1, steps + 1))


def curve(run: Path, tag: str = "loss") -> list[tuple[int, float]]:
    """A TensorBoard scalar of all event files together, as TensorBoard shows it: purged steps are gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    accumulator.Reload()
    name = next(t for t in accumulator.Tags()["scalars"] if t.split("/")[-1] == tag)
    return [(e.step, e.value) for e in accumulator.Scalars(name)]


def hosts(count: int) -> Iterator[str]:
    return (f"node{i}" for i in range(1, count + 1))
