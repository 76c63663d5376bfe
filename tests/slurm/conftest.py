"""A real SLURM cluster on this machine for the tests of this folder: `cluster.sh`, nodes in network namespaces.

Needs root and Debian's slurmctld, slurmd, slurm-client, munge and iproute2 (`cluster.sh install`); skipped without.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLUSTER = Path(__file__).with_name("cluster.sh")
_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")
NODES = 4


class SlurmCluster:
    """A running cluster. `environment` makes SLURM's commands talk to it."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self._env = {**os.environ, "SLURM_LAB_DIR": str(folder), "SLURM_LAB_CPUS": "4"}

    def up(self) -> None:
        self("up", self.nodes)

    def down(self) -> None:
        self("down")

    def __call__(self, *args: str | int) -> str:
        """Runs one of cluster.sh's commands and returns what it printed."""
        run = subprocess.run(
            ["bash", CLUSTER, *map(str, args)], env=self._env, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    @property
    def environment(self) -> dict[str, str]:
        lines = self("env").removeprefix("export ").split()
        return {**os.environ, **{k: v.strip("'") for k, _, v in (line.partition("=") for line in lines)}}

    def states(self, job: str) -> list[str]:
        """The states of a job's tasks that have not ended."""
        run = subprocess.run(
            ["squeue", "-h", "-j", job, "-r", "-o", "%T"], env=self.environment, capture_output=True, text=True
        )
        return run.stdout.split()

    def wait(self, job: str, seconds: float = 120) -> None:
        """Returns when nothing of the job is queued or running."""
        end = time.monotonic() + seconds
        while self.states(job):
            assert time.monotonic() < end, self.states(job)
            time.sleep(0.2)

    def set(self, key: str, value: str | int) -> None:
        """Changes a line of slurm.conf while the cluster runs."""
        conf = self.folder / "etc" / "slurm.conf"
        conf.write_text(re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", conf.read_text()))
        subprocess.run(["scontrol", "reconfigure"], env=self.environment, check=True, capture_output=True)

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Returns when all nodes are idle."""
        end = time.monotonic() + seconds
        while True:
            query = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%T"], env=self.environment, capture_output=True, text=True
            )
            if query.stdout.split() == ["idle"] * self.nodes:
                return
            assert time.monotonic() < end, query.stdout
            time.sleep(0.3)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Four nodes of four pretended cores each, up for the whole session."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster of one's own needs root")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in _NEEDED if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (tests/slurm/cluster.sh install)")
    # Not pytest's own folder: munge refuses a socket below a folder that others cannot pass through.
    folder = Path(tempfile.mkdtemp(prefix="mixer-slurm-"))
    folder.chmod(0o755)
    cluster = SlurmCluster(folder, NODES)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's handwritten digits, sharded with a val split."""
    from launch.demo import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images")
    shards = folder / "shards"
    arguments = ["shard", str(folder / "images"), str(shards), "--val-fraction", "0.1", "--max-samples", "300"]
    subprocess.run([sys.executable, "-m", "launch.cli", *arguments], check=True, capture_output=True, timeout=120)
    return shards


_DOWN: list[tuple[str, list[float]]] = []


@pytest.fixture
def was_down(record_property: Callable[[str, Any], None]) -> Callable[[str, list[float]], None]:
    """Notes how long a training stood still after what was done to it; printed at the end of the tests."""

    def note(what: str, seconds: list[float]) -> None:
        record_property(what, seconds)
        _DOWN.append((what, seconds))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _DOWN:
        terminalreporter.section("seconds without a step, from the last before to the first after")
        for what, seconds in _DOWN:
            terminalreporter.line(f"{what:<60} {', '.join(f'{s:.0f}' for s in seconds)}")
