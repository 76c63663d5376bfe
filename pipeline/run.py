"""The run folder: what is written where, and how it is read back.

    RUN/ config.yaml  command.txt  env.json  events.jsonl  STATUS.json  metrics.jsonl  tb/  logs/  eval/
         ledger/rank-00000.000.ledger    what reached the model: this rank's digest of every step
         data/                           what the training data was: its shards, and which samples a subset holds
         checkpoints/   FINISHED   STOP (what `mixer stop` asks for)
         logs/<job>.<restart>/           of each start: see `pipeline.logs`

Logs are append-only; every line carries its attempt (one start of the training processes). After a crash the next
attempt repeats the steps since the last checkpoint; `live_lines` leaves out the lines which that supersedes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data_tools.errors import UserError

if TYPE_CHECKING:
    from pipeline.ledger import Segment

_PACKAGES = (
    "torch",
    "accelerate",
    "deepspeed",
    "webdataset",
    "omegaconf",
    "tensorboard",
    "safetensors",
    "numpy",
    "simplejpeg",
    "pillow",
    "mixer-pretraining",
)


class RunFolder:
    """Paths and small files of one run. Only rank 0 writes, except for the ledger and the logs."""

    def __init__(self, path: str | Path, checkpoints: Path | None = None):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "STATUS.json"
        self.checkpoints = checkpoints or self.path / "checkpoints"
        self.finished = self.path / "FINISHED"
        self.stop = self.path / "STOP"
        self.tensorboard = self.path / "tb"
        self.data = self.path / "data"
        self.ledger = self.path / "ledger"
        self._lock: TextIO | None = None

    def locked(self) -> bool:
        """Whether a training holds the folder, asked without taking part; False where locks do not say."""
        try:
            with open(self.path / ".lock") as f:
                ask = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
                return struct.unpack("hhqqi4x", fcntl.fcntl(f, fcntl.F_GETLK, ask))[0] != fcntl.F_UNLCK
        except (OSError, struct.error):
            return False

    def stop_request(self) -> str | None:
        """What `mixer stop` asked for: "save" or "now"; None where nobody did."""
        try:
            return "now" if self.stop.read_text().strip() == "now" else "save"
        except OSError:
            return None

    def lock(self, logs: str = "") -> None:
        """Held until the process ends, however it ends. Raises UserError while another training holds it.

        logs: the name of this start's log folder, for those who look at the run.

        Where MIXER_LOCK_PATIENCE is set (seconds: a requeued job) it waits for one that is about to end.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held on purpose
        deadline = time.monotonic() + float(os.environ.get("MIXER_LOCK_PATIENCE", "0"))
        while True:
            try:
                # A POSIX lock is the process' own: data workers that outlive a killed trainer by some seconds do not
                # hold it (they would inherit a flock), so a restart is not kept out
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    return  # a file system without locks: nobody can be kept out
                if time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                self._lock.seek(0)
                raise UserError(
                    f"{self.path}: another training writes into this run folder ({self._lock.read().strip()}); "
                    "stop it first, or choose another run.dir"
                ) from None
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}" + (f", logs in {logs}" if logs else ""))
        self._lock.flush()

    def identity(self, make: bool = False) -> str | None:
        """What tells this run's checkpoints from others in the same place; rank 0 makes it at the first start."""
        path = self.path / "run_id"
        if make and not path.exists():
            replace_file(path, uuid.uuid4().hex + "\n")
        return path.read_text().strip() if path.exists() else None

    def next_attempt(self) -> int:
        return sum(1 for e in read_lines(self.events) if e["event"] in _BEGINNINGS)

    def record(self, event: str, **details: Any) -> None:
        """Appends to events.jsonl: start, resume, save, signal, eval, damaged, config, finish."""
        append_line(self.events, {"time": time.time(), "event": event, **details})

    def write_status(self, **status: Any) -> None:
        """Replaces STATUS.json atomically: a reader never sees half of it. A full disk leaves the old one."""
        with contextlib.suppress(OSError):
            replace_file(self.status, json.dumps({"time": time.time(), **status}, indent=1) + "\n")

    def read_status(self) -> dict[str, Any]:
        try:
            return json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}

    def describe(self, config_yaml: str) -> None:
        """Writes down what is run: configuration, command line, versions."""
        replace_file(self.config, config_yaml)
        with open(self.path / "command.txt", "a") as f:
            f.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}  {shlex.join(sys.argv)}\n")
        replace_file(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Versions and host, for the record."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "packages": versions,
    }


def replace_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


_BEGINNINGS = ("start", "resume", "rollback")
_UNWRITTEN: dict[Path, list[bytes]] = {}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """One JSON object a line, in one write. A line that a crash cut short is closed first, and left out by readers.

    What a full disk does not take is kept in memory and written with the next line: it must not end a training.
    """
    lines = [*_UNWRITTEN.pop(path, []), json.dumps(line).encode() + b"\n"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":
                    f.write(b"\n")
            f.write(b"".join(lines))
    except OSError:
        _UNWRITTEN[path] = lines


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file; a line that a crash cut short is left out."""
    if not path.exists():
        return
    with open(path, errors="replace") as f:
        for line in f:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def last_lines(path: Path, size: int = 65536) -> list[dict[str, Any]]:
    """The lines of a .jsonl file's last `size` bytes: quick, however long the file is."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - size))
            rows = f.read().splitlines()
    except OSError:
        return []
    found = []
    for row in rows:
        with contextlib.suppress(ValueError):
            found.append(json.loads(row))
    return [line for line in found if isinstance(line, dict)]


def resume_points(run: str | Path) -> list[dict[str, Any]]:
    """Where the run stands began anew: its start, resume and rollback events that still count, in order.

    One that goes back to step s makes void what earlier attempts did past s.
    """
    live: list[dict[str, Any]] = []
    for event in read_lines(RunFolder(run).events):
        if event["event"] in _BEGINNINGS:
            live = [e for e in live if e["step"] < event["step"]] + [event]
    return live


def last_live_steps(run: str | Path) -> dict[int, int]:
    """Attempt -> its last step that no later attempt went back behind."""
    points = [(e["attempt"], e["step"]) for e in read_lines(RunFolder(run).events) if e["event"] in _BEGINNINGS]
    last: dict[int, int] = {}
    lowest = sys.maxsize
    for attempt, step in sorted(points, reverse=True):
        last[attempt] = lowest
        lowest = min(lowest, step)
    return last


def live_lines(run: str | Path, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines (with `step` and `attempt`) that no later attempt has made void, in order of steps."""
    last = last_live_steps(run)
    by_step = {line["step"]: line for line in lines if line["step"] <= last.get(line["attempt"], sys.maxsize)}
    return [by_step[s] for s in sorted(by_step)]


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The training metrics of a run, one dict a logged step, without superseded ones."""
    lines = (line for line in read_lines(RunFolder(run).metrics) if line.get("split", "train") == "train")
    return live_lines(run, lines)


def read_ledger(run: str | Path) -> dict[int, list[Segment]]:
    """Step -> what each rank's ledger says of it, one step a segment, without superseded ones. For small runs: an
    audit reads ledgers in windows instead."""
    from pipeline.ledger import LedgerReader, ledger_ranks  # numpy: the launcher in a job does without

    folder, last = RunFolder(run).ledger, last_live_steps(run)
    steps: dict[int, list[Segment]] = {}
    for rank in ledger_ranks(folder):
        own: dict[int, Segment] = {}
        for segment in LedgerReader(folder, rank):
            live = segment.part(segment.step, last.get(segment.attempt, sys.maxsize - 1) + 1)
            own.update({s: live.part(s, s + 1) for s in range(live.step, live.end)})
        for step, segment in own.items():
            steps.setdefault(step, []).append(segment)
    return dict(sorted(steps.items()))


def read_digests(run: str | Path) -> dict[int, tuple[int, int, str]]:
    """step -> (epoch, position, digest of all samples of the step, hex), from the ledgers of all ranks.

    Ranks' digests add up modulo 2**64; so runs on other numbers of ranks compare equal.
    """
    digests = {}
    for step, rows in read_ledger(run).items():
        total = sum(int(r.digests[0]) for r in rows) % 2**64
        digests[step] = rows[0].epoch, rows[0].position, f"{total:016x}"
    return digests
