"""`mixer logs`, `why` and `stop`: what a user asks of one run, wherever it is. Imports no torch."""

from __future__ import annotations

import codecs
import contextlib
import getpass
import os
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from data_tools.errors import UserError
from launch.failure import Failure, failures, mended_failures
from launch.queue import cancel, ended, jobs_of, queued
from launch.watch import current_start, find_runs, look
from pipeline.logs import StartLogs, starts
from pipeline.pulse import read_pulses
from pipeline.run import RunFolder, last_lines, replace_file

Run = Annotated[str, typer.Argument(help="A run folder.")]


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as it grows, also into the next start.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="So many of the last; 0: all.")] = 50,
    start: Annotated[str | None, typer.Option(help="Of an earlier start: the name of a folder in RUN/logs.")] = None,
    stacks: Annotated[bool, typer.Option("--stacks", help="Where its threads stood when it hung, instead.")] = False,
) -> None:
    """What a rank printed: stdout and stderr.

    Examples:

      mixer logs runs/b16 --rank 3 --follow

      mixer logs runs/b16 --start 4711.0 -n 200
    """
    folder, shown = _the_run(run), _start(run, start)
    path = _log(shown, rank, stacks)
    at = _tail(path, lines)
    if not follow:
        return
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            at = _copy(path, at)
            newest = current_start(folder)
            if start is None and newest and newest != shown and newest.log(rank).exists():
                shown, path, at = newest, newest.log(rank), 0
                typer.echo(f"==> {newest.name} <==")
            else:
                view = look([folder.path])[0]
                if not view.running and view.state != "QUEUED":
                    _copy(path, at)
                    return
            time.sleep(0.5)


def why(run: Run) -> None:
    """Why a run stands still or ended: the first rank that failed, where, with what last words, and what to do.

    Example: mixer why runs/b16
    """
    folder = _the_run(run)
    view = look([folder.path])[0]
    typer.echo(f"{view.run}: {view.state}" + (f" at step {view.step}" if view.step is not None else ""))
    if view.note:
        typer.echo(f"  {view.note}")
    if view.slowest:
        typer.echo(f"  {view.slowest}")
    if view.state == "STALLED":
        typer.echo(
            f"  what to do: the watchdog ends it after health.timeout and it starts again by itself; sooner: "
            f"`mixer stop {run} --now`, then `mixer resume {run}`"
        )
    _tell_jobs(folder.path)
    start = current_start(folder)
    every = [(s, failures(s)) for s in starts(folder.path)]
    here = next((found for s, found in every if start and s == start), [])
    if here and start and view.state != "STOPPED":  # then it ended because it was asked to
        _tell(start, here)
    earlier = [(s, found) for s, found in every if found and s != start]
    if start and (mended := mended_failures(start)):
        earlier.append((start, mended))
    for old, found in earlier[-5:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found[0].time))
        typer.echo(f"earlier, {when}, start {old.name}: {found[0].headline}")
    if not here and not earlier and view.state not in ("STALLED", "DIED"):
        typer.echo("  no rank failed")
    if view.state == "DIED":
        typer.echo(f"  go on with `mixer resume {run}`")


def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="At once, without saving: back to the last checkpoint.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has ended.")] = True,
) -> None:
    """End a run: it saves first, and `mixer resume` goes on from there. Works from any machine that sees the folder.

    Nothing starts or requeues it until `mixer resume`. Waiting jobs of it are
    cancelled where there is SLURM.

    Examples:

      mixer stop runs/b16

      mixer stop runs/b16 --now
    """
    folder = _the_run(run)
    view = look([folder.path])[0]
    jobs = queued(jobs_of(folder.path))
    waiting = [job for job, q in jobs.items() if q.waits]
    if not view.running and not jobs:
        typer.echo(f"{run} is {view.state}: nothing to stop")
        return
    replace_file(folder.stop, "now\n" if now else "save\n")
    folder.record("stop", by=f"{getpass.getuser()}@{socket.gethostname()}", how="now" if now else "save")
    cancel(jobs if now else waiting)
    for job in jobs if now else waiting:
        typer.echo(f"cancelled job {job}")
    if now:
        _kill_here(folder)
    if not view.running and len(waiting) == len(jobs):
        return
    typer.echo(f"asked {run} to " + ("end at once" if now else "save and end"))
    if wait:
        _wait_for_end(folder)


def _the_run(run: str) -> RunFolder:
    found = find_runs([run])
    if len(found) != 1 or found[0] != Path(run):
        raise UserError(f"{run} is a folder of runs: name one of {', '.join(map(str, found[:5]))}")
    return RunFolder(found[0])


# -- logs ---------------------------------------------------------------------------------------------------------


def _start(run: str, name: str | None) -> StartLogs:
    every = starts(run)
    found = next((s for s in every if s.name == name), None) if name else current_start(RunFolder(run))
    if found is None:
        names = ", ".join(s.name for s in every[-8:]) or "none yet"
        raise UserError(f"{run} has no logs{f' of a start {name!r}' if name else ''}; there are: {names}")
    return found


def _log(start: StartLogs, rank: int, stacks: bool) -> Path:
    path = start.stacks(rank) if stacks else start.log(rank)
    if path.exists():
        return path
    if stacks:
        raise UserError(f"{start.folder}: rank {rank} did not hang, so there are no stacks")
    ranks = list(start.files("rank"))
    there = f"0 to {ranks[-1]}" if ranks and len(ranks) == ranks[-1] + 1 else ", ".join(map(str, ranks)) or "none"
    raise UserError(f"{start.folder} has no log of rank {rank}; ranks there: {there}")


def _tail(path: Path, lines: int) -> int:
    """Prints the last lines; returns where to go on."""
    with open(path, "rb") as f:
        kept = deque(f, maxlen=lines or None)
        return f.tell() - _write(b"".join(kept))


def _copy(path: Path, at: int) -> int:
    with open(path, "rb") as f:
        f.seek(at)
        data = f.read()
    return at + len(data) - _write(data)


def _write(data: bytes) -> int:
    """Prints; returns how many bytes at the end are only the beginning of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(decoder.decode(data))
    sys.stdout.flush()
    return len(decoder.getstate()[0])


# -- why ----------------------------------------------------------------------------------------------------------


def _tell(start: StartLogs, found: list[Failure]) -> None:
    first = found[0]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.time))
    typer.echo(f"first failure, {when}, start {start.name}: rank {first.rank} on {first.host}")
    typer.echo("  " + first.message.replace("\n", "\n  "))
    if first.advice:
        typer.echo(f"  what to do: {first.advice}")
    if first.traceback:
        typer.echo("\n" + first.traceback.rstrip() + "\n")
    with contextlib.suppress(OSError):
        last = start.log(first.rank).read_bytes()[-20000:].decode(errors="replace").splitlines()[-12:]
        typer.echo(f"the last lines of {start.log(first.rank)}:")
        typer.echo("\n".join(f"  | {line[:300]}" for line in last))
    if len(found) > 1:
        lost = [f for f in found[1:] if f.consequence]
        others = [f for f in found[1:] if not f.consequence]
        for f in others[:4]:
            typer.echo(f"after it: {f.headline[:300]}")
        if len(others) > 4:
            typer.echo(f"and {len(others) - 4} more like these")
        if lost:
            typer.echo(f"{len(lost)} other ranks only noticed that it was gone")


def _tell_jobs(run: Path) -> None:
    """What SLURM and the batch script say of the latest job."""
    jobs = jobs_of(run)
    if not jobs:
        return
    lines = [line for line in last_lines(run / "jobs.jsonl") if line.get("job") == jobs[-1]]
    checked = next((line for line in reversed(lines) if line["event"] == "preflight"), None)
    if checked and checked.get("failed"):
        for host, reasons in checked["failed"].items():
            typer.echo(f"  preflight: {host}: {'; '.join(reasons)}")
    last = next((line for line in reversed(lines) if line["event"] in ("ended", "requeued")), None)
    if last:
        typer.echo(f"  job {jobs[-1]}: {last['event']}, {last.get('why', '')}")
    if jobs[-1] not in queued(jobs[-1:]) and (how := ended(jobs[-1])):
        typer.echo(f"  job {jobs[-1]}, SLURM's accounting: {how}")


# -- stop ---------------------------------------------------------------------------------------------------------


def _kill_here(run: RunFolder) -> None:
    """Ranks on this machine at once, frozen ones too; those elsewhere look at the file every few seconds."""
    start = current_start(run)
    for beat in read_pulses(start.files("pulse")).values() if start else ():
        if beat.host == socket.gethostname() and beat.alive(0):
            with contextlib.suppress(OSError):
                os.kill(beat.pid, signal.SIGKILL)


def _wait_for_end(run: RunFolder) -> None:
    said = ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            view = look([run.path])[0]
            if not view.running:
                typer.echo(f"{view.state} at step {view.step}" if view.step is not None else view.state)
                return
            if view.state != said:
                said = view.state
                typer.echo(f"{view.state} at step {view.step}; waiting (Ctrl-C only ends the waiting)")
                if view.state == "STALLED":
                    typer.echo(f"it makes no progress and cannot save: `mixer stop {run.path} --now`")
            time.sleep(0.5)
