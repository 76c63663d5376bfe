"""`mixer` as its users meet it: a command in a process of its own, found again by a tag in its environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import committed_steps, step_folder
from pipeline.ledger import LedgerReader
from pipeline.run import RunFolder, read_digests, read_lines, read_metrics

HERE = Path(__file__).parent
MIXER = [sys.executable, "-m", "launch.cli"]
TAG = "MIXER_TEST_TAG"
STEPS = 40
# Small, but everything of a real run: two ranks, accumulation, uneven shares, worker processes, checkpoints
RUN = [
    "data.train=synthetic",
    "data.val=none",
    "data.num_workers=1",
    "model.name=mixer_s16",
    "model.image_size=15",
    "model.patch_size=5",
    "model.hidden_dim=26",
    "model.num_blocks=2",
    "model.tokens_mlp_dim=3",
    "model.channels_mlp_dim=17",
    "model.num_classes=10",
    "model.drop_path_rate=0.1",
    "train.ema_decay=0.9",
    f"train.duration={STEPS} steps",
    "train.global_batch_size=13",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "train.strategy=ddp",
    "optimizer.lr=0.01",
    "scheduler.warmup=5 steps",
    "checkpoint.every=6 steps",
    "logging.every=1 steps",
    "logging.to=[]",
]
STRETCH = 0.01  # seconds a backward pass and a write are made longer: a run of tiny steps would be over at once


class Mixer:
    """One running `mixer` command, in a session (process group) of its own, like a command typed at a terminal."""

    def __init__(self, arguments: Sequence[str], folder: Path, *, stretch: float = STRETCH, probe: Path | None = None):
        self.tag = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{self.tag}.log"
        environment = {
            **os.environ,
            TAG: self.tag,
            "MIXER_TEST_PROBE": str(probe or folder / "probe"),
            "MIXER_TEST_STRETCH": str(stretch),
            "OMP_NUM_THREADS": "1",
            "MIXER_DEVICE": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "probe"), os.environ.get("PYTHONPATH")])),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*MIXER, *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def processes(self) -> dict[int, str]:
        """pid -> command line of every living process that descends from this command, whoever is its parent now."""
        mark = f"{TAG}={self.tag}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    def agent(self) -> int:
        """The pid of torchrun's agent."""
        return next(pid for pid, command in self.processes().items() if "-m launch.agent" in command)

    def rank(self, number: int) -> int:
        """The pid of a training process; its data workers have the same command line but another parent."""
        agent = self.agent()
        for pid, command in self.processes().items():
            if "-m launch.cli" not in command or pid == self.process.pid:
                continue
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if parent == agent and f"RANK={number}".encode() in environment:
                return pid
        raise AssertionError(f"rank {number} does not run:\n{self.output()}")

    def worker(self, rank: int) -> int:
        """The pid of a loader worker of a rank; waits for one that is just being started in a lost one's place."""
        parent, found = self.rank(rank), []

        def there() -> bool:
            for pid in self.processes():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    name = Path(f"/proc/{pid}/task/{pid}/comm").read_text().strip()
                    if int(stat[1]) == parent and name == "pt_data_worker" and stat[0] != "Z":
                        found.append(pid)
            return bool(found)

        assert poll(there, 30), self.processes()
        return found[0]

    def kill(self) -> None:
        """SIGKILL to all processes of the command at once, until none is left."""
        while alive := self.processes():
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
        self.process.wait()

    def all_gone(self, seconds: float = 30) -> bool:
        return poll(lambda: not self.processes(), seconds)


def poll(condition: Callable[[], bool], seconds: float = 90) -> bool:
    """Waits until the condition holds; False when it did not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def current_step(run: Path) -> tuple[int, int]:
    """(attempt, completed step) by the newest line of rank 0's ledger; (-1, 0) before the first."""
    segments = list(LedgerReader(RunFolder(run).ledger, 0))
    return (segments[-1].attempt, segments[-1].end - 1) if segments else (-1, 0)


def attempts(run: Path) -> int:
    """How often training began or was resumed."""
    return sum(e["event"] in ("start", "resume") for e in read_lines(RunFolder(run).events))


def wait_for_progress(mixer: Mixer, run: Path, attempt: int, steps: int = 4) -> None:
    """Until attempt number `attempt` has completed `steps` steps more than it began with."""

    def arrived() -> bool:
        if mixer.process.poll() is not None:
            raise AssertionError(f"it ended early with code {mixer.process.returncode}:\n{mixer.output()}")
        starts = [e for e in read_lines(RunFolder(run).events) if e["event"] in ("start", "resume")]
        if len(starts) <= attempt:
            return False
        now, step = current_step(run)
        return now == attempt and step >= starts[attempt]["step"] + steps

    if not poll(arrived):
        mixer.kill()
        raise AssertionError(f"no progress:\n{mixer.output()}")


def history(run: Path) -> list[tuple[int, tuple[int, int, str], float]]:
    """(step, (epoch, position, digest of its samples), loss) of every step that counts."""
    digests = read_digests(run)
    losses = {row["step"]: row["loss"] for row in read_metrics(run)}
    assert digests.keys() == losses.keys()
    return [(step, digests[step], losses[step]) for step in sorted(digests)]


def final_digest(run: Path) -> str:
    """Digest of all weights, moments and averages of the newest checkpoint."""
    root = RunFolder(run).checkpoints
    return CheckpointReader(step_folder(root, committed_steps(root)[-1])).digest()


def assert_same_run(run: Path, undisturbed: Path, steps: int = STEPS) -> None:
    """Bit for bit: samples and loss of every step, and the whole final state."""
    assert [row[0] for row in history(run)] == list(range(1, steps + 1))
    assert history(run) == history(undisturbed)
    assert committed_steps(RunFolder(run).checkpoints)[-1] == steps
    assert final_digest(run) == final_digest(undisturbed)


def undisturbed_run(base: Path, nproc: int, *extra: str) -> Path:
    """A run to the end, made once a session under `base`."""
    run = base / "-".join(["undisturbed", str(nproc), *extra]).replace(" ", "_")
    if not (run / "FINISHED").exists():
        mixer = Mixer(["launch", "local", *run_arguments(run, *extra), "--nproc", str(nproc)], base, stretch=0)
        assert mixer.wait(300) == 0, mixer.output()
    return run


def run_arguments(run: Path, *extra: str) -> list[str]:
    """CONFIG and overrides of the run, in a folder of its own."""
    config = run.parent / "plain.yaml"
    config.write_text("run: {name: test}\n")
    return [str(config), f"run.dir={run}", *RUN, *extra]
