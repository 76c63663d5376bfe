"""Which rank failed first, and why: from what the processes of one start left in the run folder. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from dataclasses import dataclass
from typing import Any

from pipeline.logs import StartLogs, says_another_left
from pipeline.pulse import Beat, read_pulses

_NO_FAILURE = {-signal.SIGTERM, 75}  # how torchrun ends the others once one has failed; saved and to be continued
_SIGNALS = {
    signal.SIGKILL: "most often the kernel or SLURM, for memory: `dmesg | grep -i kill` on that node, `sacct -j JOB "
    "-o MaxRSS`; lower data.num_workers or ask for more memory",
    signal.SIGSEGV: "a bug in a native library or a broken GPU: the rank's log shows where it was",
    signal.SIGABRT: "a native library gave up: its last words are in the log; with NCCL, look for an earlier error",
    signal.SIGBUS: "/dev/shm is full, or a file it had mapped got shorter: `df -h /dev/shm`",
}


@dataclass(frozen=True)
class Failure:
    """One rank's end. `sure` is False where it is only inferred from a pulse that stopped."""

    rank: int
    host: str
    time: float
    message: str
    advice: str = ""
    traceback: str = ""
    consequence: bool = False  # it only noticed that another rank had gone

    @property
    def headline(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.message.splitlines()[0]}"


def failures(logs: StartLogs) -> list[Failure]:
    """The ends of all ranks of a start that did not end well; causes first, each group in order of time.

    Where the processes were started again within it (a launcher in a job does that), the ends of the latest.
    """
    beats = read_pulses(logs.files("pulse"))
    began = beats[0].started if 0 in beats else 0.0
    found = [f for f in _all(logs, beats) if f.time + 1 >= began]  # torchrun's clock has whole seconds
    known = {f.rank for f in found} | {row["rank"] for row in _agents(logs) if row["time"] + 1 >= began}
    if found or any(b.over for b in beats.values()):
        newest = max((b.time for b in beats.values()), default=time.time())
        # Beside ranks that said how they ended: one whose pulse merely stopped, with its node perhaps
        for rank, b in beats.items():
            if rank not in known and not b.over and not b.alive(0) and (found or newest - b.time > 30):
                found.append(_silent(b))
    return _in_order(found)


def mended_failures(logs: StartLogs) -> list[Failure]:
    """Of a start whose processes were started again within it: the ends before that."""
    beats = read_pulses(logs.files("pulse"))
    return _in_order([f for f in _all(logs, {}) if 0 in beats and f.time + 1 < beats[0].started])


def first_failure(logs: StartLogs) -> Failure | None:
    return next(iter(failures(logs)), None)


def _all(logs: StartLogs, beats: dict[int, Beat]) -> list[Failure]:
    """What ranks and agents wrote down."""
    found = [_told(record) for path in logs.files("error").values() if (record := _read(path))]
    told = {(f.rank, f.time) for f in found}
    for row in _agents(logs):
        # a rank that could speak did so just before it ended
        spoke = any(rank == row["rank"] and abs(at - row["time"]) < 60 for rank, at in told)
        if not spoke and row["exit_code"] not in _NO_FAILURE:
            found.append(_killed(row, beats.get(row["rank"])))
    return found


def _agents(logs: StartLogs) -> list[dict[str, Any]]:
    return [row for path in logs.folder.glob("agent-*.json") for row in _read(path) or []]


def _in_order(found: list[Failure]) -> list[Failure]:
    return sorted(found, key=lambda f: (f.consequence, f.time))


def _told(record: dict[str, Any]) -> Failure:
    user = record["exception"] == "UserError"
    text = record["message"] if user else f"{record['exception']}: {record['message']}"
    return Failure(
        record["rank"],
        record["host"],
        record["time"],
        text.strip(),
        record["advice"],
        "" if user else record["traceback"],
        says_another_left(f"{record['exception']}: {record['message']}"),
    )


def _killed(row: dict[str, Any], beat: Beat | None) -> Failure:
    code, hint = row["exit_code"], ""
    message = f"ended with exit code {code} and said nothing"
    if code < 0:
        name = str(-code)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = _SIGNALS.get(signal.Signals(-code), "")
        message = f"killed by {name}"
    at = f" after step {beat.step}, in {beat.where.partition(' < ')[0]}" if beat and beat.where else ""
    return Failure(row["rank"], row["host"], row["time"], message + at, hint)


def _silent(beat: Beat) -> Failure:
    when = time.strftime("%H:%M:%S", time.localtime(beat.time))
    return Failure(
        beat.rank,
        beat.host,
        beat.time,
        f"no sign of life since {when}, after step {beat.step}; it left no last words",
        "killed, or its node went away: look at the node, `sinfo -R` and `sacct -j JOB` on SLURM",
    )


def _read(path: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
