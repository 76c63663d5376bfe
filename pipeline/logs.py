"""What one start of the training processes leaves in RUN/logs/<job>.<restart>/.

    rank-N.log           stdout and stderr of rank N, appended
    pulse-rank-N.json    its sign of life, rewritten every few seconds (`pipeline.pulse`)
    error-rank-N.json    its last words: what `mixer why` reads
    stacks-rank-N.txt    where its threads stood when it made no step for `health.timeout`
    agent-HOST-PID.json  torchrun's account of processes that a signal killed: those have no last words

<job> is SLURM's job id, or `local`, or `torchrun-ID`. Imports no torch: everything that watches a run uses it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from pipeline.run import replace_file

LOGS = "MIXER_LOGS"  # set by a launcher: the folder that all ranks of its start write to


@dataclass(frozen=True)
class StartLogs:
    """The files of one start."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def pulse(self, rank: int) -> Path:
        return self.folder / f"pulse-rank-{rank}.json"

    def error(self, rank: int) -> Path:
        return self.folder / f"error-rank-{rank}.json"

    def stacks(self, rank: int) -> Path:
        return self.folder / f"stacks-rank-{rank}.txt"

    def agent(self) -> Path:
        return self.folder / f"agent-{socket.gethostname()}-{os.getpid()}.json"

    def files(self, kind: str) -> dict[int, Path]:
        """rank -> file, of kind "pulse" or "error" or (the .log files) "rank"."""
        pattern = re.compile(r"rank-(\d+)\.log" if kind == "rank" else rf"{kind}-rank-(\d+)\.json")
        found = [(m, path) for path in _entries(self.folder) if (m := pattern.fullmatch(path.name))]
        return {int(m[1]): path for m, path in sorted(found, key=lambda f: int(f[0][1]))}

    def write_error(self, rank: int, error: BaseException, exit_code: int) -> Path | None:
        """A rank's last words. None where they could not be written: the disk may be what it died of."""
        try:
            replace_file(
                self.error(rank),
                json.dumps(
                    {
                        "time": time.time(),
                        "host": socket.gethostname(),
                        "rank": rank,
                        "pid": os.getpid(),
                        "exit_code": exit_code,
                        "exception": "UserError" if isinstance(error, UserError) else type(error).__name__,
                        "message": str(error),
                        "traceback": _traceback(error),
                        "advice": advice(error),
                    },
                    indent=1,
                )
                + "\n",
            )
        except OSError:
            return None
        return self.error(rank)


def this_start(run_dir: str | Path) -> StartLogs:
    """Where this process writes. All ranks of one start arrive at the same folder."""
    if LOGS in os.environ:
        return StartLogs(Path(os.environ[LOGS]))
    folder, restart = Path(run_dir) / "logs", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "SLURM_JOB_ID" in os.environ and "RANK" in os.environ:
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        return StartLogs(folder / f"{os.environ['SLURM_JOB_ID']}.{restart}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return StartLogs(folder / f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}.{restart}")
    return new_local_start(run_dir)


def new_local_start(run_dir: str | Path) -> StartLogs:
    """Makes RUN/logs/local.N with the next free N."""
    for number in itertools.count(len([s for s in starts(run_dir) if s.name.startswith("local.")])):
        folder = Path(run_dir) / "logs" / f"local.{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return StartLogs(folder)
    raise AssertionError  # itertools.count does not end


def starts(run_dir: str | Path) -> list[StartLogs]:
    """All starts of a run, the newest last: a folder is as new as the newest file that was created in it."""
    found = []
    for folder in _entries(Path(run_dir) / "logs"):
        if folder.is_dir():
            found.append((folder.stat().st_mtime, folder))
    return [StartLogs(folder) for _, folder in sorted(found)]


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return []


# (pattern in "Exception: message", what to do about it); the first that matches counts
_ADVICE = [
    (
        r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED",
        "lower train.micro_batch_size, or train.activation_checkpointing=block, or train.strategy=fsdp; "
        "`mixer plan` says what fits",
    ),
    (
        r"ECC|uncorrectable|Xid|unspecified launch failure|illegal memory access|device-side assert|GPU is lost",
        "if it comes back on this node and nowhere else, the GPU is broken: leave the node out (--exclude), tell its "
        "administrators; else it is a bug: run once with CUDA_LAUNCH_BLOCKING=1",
    ),
    (r"No space left|Disk quota exceeded|Errno 28|Errno 122", "make room, or set checkpoint.dir to another place"),
    (r"Bus error|/dev/shm|shared memory", "/dev/shm is too small for data workers: enlarge it, or data.num_workers=0"),
    (r"Too many open files|Errno 24", "raise `ulimit -n`; `mixer doctor` shows it"),
    (r"Permission denied|Errno 13|Read-only file system|Errno 30", "make that place writable for this user"),
    (r"Cannot allocate memory|MemoryError|Errno 12", "host memory ran out: lower data.num_workers"),
    (r"no step for", "see which rank the others waited for: `mixer logs RUN --stacks`"),
]
# What a rank says when another one has gone: the cause is elsewhere
_CONSEQUENCE = re.compile(
    r"Connection (closed|reset|refused|was reset)|closed by peer|Broken pipe|remote process|"
    r"Socket (T|t)imeout|recvValue|DistBackendError|DistNetworkError|NCCL (error|communicator)|"
    r"Timed out (initializing|waiting)|wait timeout|gloo|store->get|peer|all_?reduce.*time",
)


def advice(error: BaseException) -> str:
    """What to do about an error; empty where nothing better is known than its message."""
    if isinstance(error, UserError):
        return ""  # its message says so
    said = f"{type(error).__name__}: {error}"
    for pattern, text in _ADVICE:
        if re.search(pattern, said, re.IGNORECASE):
            return text
    if says_another_left(said):
        return "another process or its node went away first: look at that one"
    return ""


def says_another_left(said: str) -> bool:
    """Whether an error ("Type: message") is only the consequence of another rank's."""
    return not said.startswith("UserError") and bool(_CONSEQUENCE.search(said))


def _traceback(error: BaseException) -> str:
    """Without the frames of the command line above the training's own."""
    start = error.__traceback__
    while start and f"{os.sep}pipeline{os.sep}" not in start.tb_frame.f_code.co_filename:
        start = start.tb_next
    return "".join(traceback.format_exception(type(error), error, start or error.__traceback__))
