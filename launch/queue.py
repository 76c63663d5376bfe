"""What SLURM says of jobs, where there is one: one `squeue` for all of them, and `sacct` for one that has ended."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.jobs import seconds_of
from pipeline.run import last_lines

_SECONDS = 10  # a controller that does not answer must not hold up who only wants to look


@dataclass(frozen=True)
class Queued:
    """A job that SLURM has: its state (PENDING, RUNNING, ...), why it waits, when it starts or ends."""

    state: str
    reason: str
    left: str  # of its time limit

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "SPECIAL_EXIT")


def jobs_of(run: Path) -> list[str]:
    """The run's SLURM jobs in order of their submission."""
    lines = (line for line in last_lines(run / "jobs.jsonl") if line.get("job", "").isdigit())
    return list(dict.fromkeys(line["job"] for line in lines))


def queued(jobs: Iterable[str], seconds: float = _SECONDS) -> dict[str, Queued]:
    """job -> what SLURM says, of those it still has; empty where there is no SLURM or it does not answer in time."""
    wanted = set(jobs)
    if not wanted or shutil.which("squeue") is None:
        return {}
    # Not by job id: one that is forgotten makes squeue fail for all
    rows = (
        line.split("|") for line in _ask("squeue", "--noheader", "--format=%i|%T|%r|%L", seconds=seconds).splitlines()
    )
    return {row[0]: Queued(*row[1:]) for row in rows if len(row) == 4 and row[0] in wanted}


def seconds_left(job: str, within: float = 60) -> float | None:
    """Until a job's time limit; infinite where there is none. None: SLURM does not say, in `within` seconds."""
    said = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%L", seconds=within).strip()
    return seconds_of(said) if said else None


def ended(job: str) -> str | None:
    """How SLURM's accounting says a job ended ("OUT_OF_MEMORY, exit code 0:125"); None where it does not know."""
    if shutil.which("sacct") is None:
        return None
    rows = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode").splitlines()
    state, _, code = (rows[-1] if rows else "").partition("|")
    return f"{state}, exit code {code}" if state and code else None


def cancel(jobs: Iterable[str]) -> None:
    """scancel; a job that has ended meanwhile is no error."""
    for job in jobs:
        _ask("scancel", job)


def _ask(*command: str, seconds: float = _SECONDS) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
