"""sbatch for the scripts of a run folder, from a login node and from inside a job; and jobs.jsonl, which remembers it.

Standard library only: in a job it runs on the node's own Python, beside any container.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from pipeline.run import append_line, read_lines

TRAIN_SCRIPT, EVAL_SCRIPT = "launch/job.sh", "launch/eval.sh"


_BY_A_USER = ("user", "resume", "inside")


def book(run: Path, event: str, job: str, **details: Any) -> None:
    """Appends to jobs.jsonl."""
    append_line(run / "jobs.jsonl", {"time": time.time(), "event": event, "job": job, **details})


def booked(run: Path) -> list[dict[str, Any]]:
    """Lines of jobs.jsonl since the user last submitted the run."""
    lines = list(read_lines(run / "jobs.jsonl"))
    asked = [
        i for i, line in enumerate(lines) if line["event"] == "submitted" and line["by"] in ("user", "resume", "inside")
    ]
    return lines[asked[-1] if asked else 0 :]


def submit_script(run: Path, *, by: str, nodes: str, options: Sequence[str] = (), script: str = TRAIN_SCRIPT) -> str:
    """sbatch for a script of the run folder; books the job. Also used from inside a job."""
    keep = ("SLURM_CONF",)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in keep}
    command = ["sbatch", "--parsable", *options, str(run / script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"sbatch refused {run / script}: {(result.stderr or result.stdout).strip()}")
    job = result.stdout.strip().split(";")[0]
    exclude = [o.removeprefix("--exclude=") for o in options if o.startswith("--exclude=")]
    book(run, "submitted", job, by=by, nodes=nodes, **({"exclude": exclude[0]} if exclude else {}))
    return job


def submit_eval(run: Path, after: str) -> str:
    """The evaluation, which starts when job `after` has ended well, and goes away when it ends otherwise."""
    options = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return submit_script(run, by="eval", nodes="1", options=options, script=EVAL_SCRIPT)


def expand(nodes: str) -> list[str]:
    """Host names of SLURM's compressed list: "a[1-3,07],b" is a1 a2 a3 a07 b."""
    names = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodes):
        found = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if found is None:
            names.append(part)
            continue
        head, ranges, tail = found.groups()
        for item in ranges.split(","):
            low, _, high = item.partition("-")
            for number in range(int(low), int(high or low) + 1):
                names += [f"{head}{number:0{len(low)}d}{rest}" for rest in (expand(tail) or [""])]
    return names


def seconds_of(time: str) -> float:
    """SLURM's notation of a time: "90" minutes, "MM:SS", "HH:MM:SS", "D-HH[:MM[:SS]]"; infinite if it is none."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        return float("inf")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)
