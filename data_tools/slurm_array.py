"""Packing tasks as a SLURM array: every array task runs its part of the plan (`engines.run_part`).

The plan lies in the output folder (or its `--work` folder), which all nodes must see, like the corpus. A task
that SLURM starts again packs only what is missing of its part.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_tools.errors import Interrupted, Unfinished, UserError
from data_tools.hashing import HashTask, Spread
from data_tools.output import Output
from data_tools.plan_store import PLAN_FOLDER, load_plan
from data_tools.progress import Board, Progress
from data_tools.storage import OPTIONS_VARIABLE, write_atomic
from data_tools.tasks import read_markers

_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 60.0  # for squeue
_MOST_TASKS = 100  # where nobody says how many
_SCRIPT = """#!/bin/bash
# One task of an array that packs (or first hashes for) {place}; written by `mixer shard --engine slurm`.
exec {command} --task-id "$SLURM_ARRAY_TASK_ID" -- {output}
"""


def submit_array(output: Output, num_tasks: int, workers: int = 0, sbatch: Sequence[str] = ()) -> str:
    """Submits array tasks 0 .. num_tasks-1 for the plan in `output` and returns the job id.

    `sbatch` are more arguments for sbatch and win over what is set here. Raises UserError where SLURM is missing
    or refuses.
    """
    if shutil.which("sbatch") is None:
        command = shlex.join([*_part_command(output, num_tasks, workers), "--task-id", "0", "--", _absolute(output)])
        raise UserError(f"--engine slurm needs sbatch on this machine; without it run every part: {command}, ...")
    logs = output.plan_folder.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    script = output.plan_folder.resolve() / "array.sh"
    write_atomic(script, array_script(output, num_tasks, workers).encode("utf-8", "surrogateescape"))
    command = [
        "sbatch", "--parsable", "--job-name=mixer-shard", f"--array=0-{num_tasks - 1}", "--requeue",
        "--open-mode=append", f"--output={str(logs).replace('%', '%%')}/%A_%a.log",
        *([f"--cpus-per-task={workers}"] if workers else []), *sbatch, str(script),
    ]  # fmt: skip
    environment = {**os.environ}
    if output.storage_options:
        # not on a command line, which everybody can see
        environment[OPTIONS_VARIABLE] = json.dumps(output.storage_options)
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"sbatch refused the array: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout.strip().split(";")[0]


def array_script(output: Output, num_tasks: int, workers: int) -> str:
    """The batch script; every path is quoted, and comments hold no line breaks."""
    place = output.place.encode("unicode_escape").decode()
    command = shlex.join(_part_command(output, num_tasks, workers))
    return _SCRIPT.format(place=place, command=command, output=shlex.quote(_absolute(output)))


def _part_command(output: Output, num_tasks: int, workers: int) -> list[str]:
    """The command that runs one part of the plan, without its `--task-id` and the output."""
    command = [sys.executable, "-m", "data_tools", "shard", f"--num-tasks={num_tasks}", f"--workers={workers}"]
    return command if output.url is None else [*command, "--work", str(output.folder.resolve())]


def _absolute(output: Output) -> str:
    return output.url or str(output.folder.resolve())


def wait_for_array(job: str, output: Output, report: Callable[[Progress], None] | None = None) -> None:
    """Returns when every shard has its marker; raises UserError where the array ended without."""
    plan = load_plan(output.plan_folder)
    assert plan is not None
    store, board = output.store(), Board(plan, report)
    counted: set[str] = set()
    first = True
    try:
        while True:
            ended = not _is_queued(job)  # asked first: what it wrote before it ended is seen
            if ended or len(_marker_names(store.list(PLAN_FOLDER))) > len(counted):
                for packed in read_markers(store, plan):
                    if packed is not None and packed.name not in counted:
                        counted.add(packed.name)
                        (board.finished_earlier if first else lambda p: board.finished(p, p.bytes))(packed)
                first = False
            board.show(now=ended)
            if len(counted) == len(plan.shards):
                return
            if ended:
                raise UserError(
                    f"SLURM job {job} ended with {len(plan.shards) - len(counted):,} of {len(plan.shards):,} shards "
                    f"missing; see {_worst_log(output.plan_folder / 'logs', job)}. The same command goes on"
                )
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped waiting; SLURM job {job} goes on (scancel {job} ends it). When it has ended: "
            f"mixer shard --finalize {shlex.quote(output.place)}"
        ) from None


def on_array(output: Output, num_tasks: int, workers: int = 0, sbatch: Sequence[str] = ()) -> Spread:
    """Hashing tasks as an array of their own, which is waited for: the plan cannot be made before."""

    def spread(tasks: list[HashTask]) -> Iterator[HashTask]:
        parts = min(num_tasks or _MOST_TASKS, len(tasks))
        job = submit_array(output, parts, workers, sbatch)
        print(f"SLURM job {job} hashes the images for --dedupe; waiting for it", file=sys.stderr, flush=True)
        waiting = tasks
        try:
            while waiting:
                ended = not _is_queued(job)  # asked first: what it wrote before it ended is seen
                there = set(os.listdir(tasks[0].out.parent))  # not a question for each: network file systems remember
                yield from (t for t in waiting if t.out.name in there)
                waiting = [t for t in waiting if t.out.name not in there]
                if waiting and ended:
                    raise Unfinished(
                        f"SLURM job {job} ended with {len(waiting):,} of {len(tasks):,} hashing tasks missing; see "
                        f"{_worst_log(output.plan_folder / 'logs', job)}. The same command goes on"
                    )
                time.sleep(_POLL_SECONDS if waiting else 0)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped waiting; SLURM job {job} goes on (scancel {job} ends it). When it has ended, the same "
                "command goes on from there"
            ) from None

    return spread


def _marker_names(listing: dict[str, int]) -> list[str]:
    return [name for name in listing if name.endswith(".done.json")]


def _is_queued(job: str) -> bool:
    """Does SLURM still have a task of `job` to run, or one running? Trouble with asking counts as yes."""
    command = ["squeue", "--noheader", "--jobs", job, "--format=%T"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        return True
    if run.returncode:
        return "Invalid job id" not in run.stderr
    return bool(run.stdout.split())


def _worst_log(logs: Path, job: str) -> str:
    """The newest log that has something in it, and its last line."""
    found = sorted(logs.glob(f"{job}_*.log"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return f"{path} ({lines[-1][:200]})"
    return str(logs)
