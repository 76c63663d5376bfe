"""How a run stands, from its folder alone; SLURM's queue is asked too where there is one. Imports no torch.

Progress is told by the pulses of the ranks (`pipeline.pulse`), figures by metrics.jsonl, ends by FINISHED, STATUS.json
and the ranks' last words (`launch.failure`).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from launch.failure import first_failure
from launch.queue import Queued, jobs_of, queued
from pipeline.checkpoint.place import MANIFEST, committed_steps, step_folder
from pipeline.logs import StartLogs, starts
from pipeline.pulse import INTERVAL, Beat, read_pulses
from pipeline.run import RunFolder, last_lines

SILENT = 6 * INTERVAL  # seconds without a pulse: the process is frozen, or gone with its node
NO_STEP = 60.0  # seconds without a step, at least, before a run counts as stalled; and
NO_STEP_TIMES = 20  # so many times its usual step
APPEARING = 60.0  # seconds from a launcher's start to the first sign of its processes
NOT_STEPPING = 600.0  # the same for starting, loading, an evaluation's batch, a save
_START = re.compile(r"(local|torchrun-.+|\d+)\.\d+")  # the folders of `pipeline.logs`
_RUNNING = ("starting", "loading", "training", "evaluating", "saving")


@dataclass(frozen=True)
class Slow:
    """The rank that the others wait for."""

    rank: int
    host: str
    why: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.why}"


@dataclass
class View:
    """What `mixer status` shows of one run. None: not known."""

    run: str
    state: str = (
        "NEW"  # QUEUED STARTING LOADING TRAINING EVALUATING SAVING ENDING STALLED; FINISHED SAVED STOPPED FAILED DIED
    )
    note: str = ""
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    top1: float | None = None
    img_per_s: float | None = None
    mfu: float | None = None
    data_wait: float | None = None
    eta_s: float | None = None
    checkpoint: int | None = None
    checkpoint_age_s: float | None = None
    restarts: int = 0
    job: str | None = None
    job_state: str | None = None
    job_left: str | None = None
    start: str | None = None
    strategy: str | None = None
    world_size: int | None = None
    nodes: list[str] = field(default_factory=list)
    slowest: Slow | None = None

    @property
    def running(self) -> bool:
        return self.state.lower() in _RUNNING or self.state in ("STALLED", "ENDING")


def find_runs(places: Sequence[str]) -> list[Path]:
    """Run folders; for a folder that is none, those in it; without places, those in runs/ or here.

    Raises:
        UserError: there is none in one of the places.
    """
    found: list[Path] = []
    for place in places or ["runs" if Path("runs").is_dir() else "."]:
        path = Path(place)
        inside = [path] if is_run(path) else sorted(p for p in path.glob("*") if is_run(p))
        if not inside:
            hint = "no such folder" if not path.is_dir() else "neither it nor a folder in it is one"
            raise UserError(f"{place} is not a run folder: {hint}. Runs are folders that `mixer train` made")
        found += inside
    return found


def is_run(path: Path) -> bool:
    started = any(_START.fullmatch(s.name) for s in starts(path))  # other things have a folder of logs too
    marks = ("events.jsonl", "STATUS.json", "jobs.jsonl")
    return started or ((path / "config.yaml").exists() and any((path / mark).exists() for mark in marks))


def look(paths: Sequence[Path], stalled_after: float | None = None) -> list[View]:
    """One view a run. stalled_after: seconds without progress that make a run STALLED; None: by its usual step."""
    jobs = {path: jobs_of(path) for path in paths}
    queue = queued(job for ids in jobs.values() for job in ids)
    return [_look(path, jobs[path], queue, stalled_after) for path in paths]


def current_start(run: RunFolder) -> StartLogs | None:
    """The start that trains in this folder, else the newest: one that was refused beside it is not meant."""
    every = starts(run.path)
    with contextlib.suppress(OSError):
        found = re.search(r"logs in (\S+)", (run.path / ".lock").read_text())
        holder = next((s for s in every if found and s.name == found[1]), None)
        if holder and (run.locked() or any(b.alive(SILENT) for b in read_pulses({0: holder.pulse(0)}).values())):
            return holder
    return every[-1] if every else None


def _look(path: Path, jobs: list[str], queue: dict[str, Queued], stalled_after: float | None) -> View:
    run, view = RunFolder(path), View(str(path))
    status, start = run.read_status(), current_start(run)
    beats = read_pulses(start.files("pulse")) if start else {}
    _figures(view, run, status)
    view.start = start.name if start else None
    view.nodes = list(dict.fromkeys(b.host for b in beats.values()))
    view.world_size = next((b.world for b in beats.values()), status.get("world_size"))
    alive = [job for job in jobs if job in queue]
    view.job = alive[0] if alive else jobs[-1] if jobs else None
    if alive:
        view.job_state, view.job_left = queue[alive[0]].state, queue[alive[0]].left
    working = any(b.alive(SILENT) for b in beats.values()) or run.locked()
    if run.finished.exists() and not working:
        view.state, view.eta_s = "FINISHED", None
    elif working or (beats and view.job_state == "RUNNING" and not all(b.over for b in beats.values())):
        if status.get("logs") != view.start:
            view.step = None  # an earlier start's, which may have got further
        _progress(view, beats, stalled_after)
    elif alive and queue[alive[0]].waits:
        view.state, view.eta_s = "QUEUED", None
        view.note = f"{queue[alive[0]].state.lower()}: {queue[alive[0]].reason}"
    elif alive:
        view.state, view.note = "STARTING", f"job {alive[0]} is {queue[alive[0]].state.lower()}; no rank has appeared"
    elif start and not beats and _age(start) < APPEARING:
        view.state, view.note, view.eta_s = "STARTING", "no rank has appeared", None
    else:
        _end(view, run, status, start, beats)
    return view


def _age(start: StartLogs) -> float:
    """Seconds since the folder was made, or a file in it."""
    try:
        return time.time() - start.folder.stat().st_mtime
    except OSError:
        return float("inf")


def _figures(view: View, run: RunFolder, status: dict[str, Any]) -> None:
    """What does not depend on whether anybody works on it now."""
    lines = last_lines(run.metrics)
    train = next((line for line in reversed(lines) if line.get("split", "train") == "train"), {})
    view.step = status.get("step", train.get("step"))
    view.total_steps, view.strategy = status.get("total_steps"), status.get("strategy")
    for name in ("loss", "epoch", "img_per_s", "mfu", "data_wait"):
        setattr(view, name, train.get(name))
    view.top1 = (status.get("metrics") or {}).get("top1")
    if status.get("eta_s") is not None:
        view.eta_s = max(0.0, status["eta_s"] - (time.time() - status["time"]))
    with contextlib.suppress(OSError):
        view.restarts = max(
            0, sum(run.events.read_bytes().count(f'"event": "{e}"'.encode()) for e in ("start", "resume")) - 1
        )
    steps = committed_steps(run.checkpoints)
    if steps:
        view.checkpoint = steps[-1]
        with contextlib.suppress(OSError):
            manifest = step_folder(run.checkpoints, steps[-1]) / MANIFEST
            view.checkpoint_age_s = time.time() - manifest.stat().st_mtime
    else:  # in another place (checkpoint.dir), or none yet
        save = next((e for e in reversed(last_lines(run.events)) if e["event"] == "save"), None)
        if save:
            view.checkpoint, view.checkpoint_age_s = save["step"], time.time() - save["time"]


def _progress(view: View, beats: dict[int, Beat], stalled_after: float | None) -> None:
    """State and slowest rank of a run that somebody works on."""
    if not beats:
        view.state, view.note = (
            "TRAINING",
            "it shows no pulse: its log folder cannot be written, or it is older software",
        )
        return
    lead = beats.get(0, next(iter(beats.values())))
    view.state = lead.state.upper() if lead.state in _RUNNING else "ENDING"
    view.step = max(lead.step, view.step or 0)
    limit = stalled_after or (max(NO_STEP, NO_STEP_TIMES * lead.step_s) if lead.state == "training" else NOT_STEPPING)
    now, silence = time.time(), min(SILENT, max(limit, 2 * INTERVAL))
    quiet = [b for b in beats.values() if now - b.time > silence and not b.over]
    missing = sorted(set(range(lead.world)) - beats.keys())
    if now - lead.since > limit or quiet:
        view.state, view.eta_s = "STALLED", None
        view.note = f"no progress for {span(now - lead.since)}"
    if missing and lead.state == "starting":
        view.note = f"waits for rank {', '.join(map(str, missing[:8]))} of {lead.world}, which did not appear"
    view.slowest = slowest(beats, silence, stuck=view.state == "STALLED")


def slowest(beats: dict[int, Beat], silence: float, stuck: bool) -> Slow | None:
    """The rank that the others wait for, where the pulses tell. stuck: the run makes no progress at all."""
    now = time.time()
    quiet = min(
        (b for b in beats.values() if now - b.time > silence and not b.over), key=lambda b: b.time, default=None
    )
    if quiet:
        return Slow(
            quiet.rank, quiet.host, f"gives no sign of life for {span(now - quiet.time)}; last in {quiet.where}"
        )
    if stuck:
        stood = max(b.since + max(2 * b.step_s, 2.0) for b in beats.values())
        if any(b.time < stood for b in beats.values()):
            return None  # too early: what somebody said last is from before the standstill
        behind = min(b.step for b in beats.values())
        for b in sorted(beats.values(), key=lambda b: (b.step, b.waits, -b.own_s)):
            if b.step == behind and (len(beats) == 1 or not b.waits or any(o.step > behind for o in beats.values())):
                return Slow(b.rank, b.host, f"stands in {b.where} since step {b.step}")
        return None
    times = sorted(b.own_s for b in beats.values())
    slow, typical = max(beats.values(), key=lambda b: b.own_s), times[len(times) // 2]
    if len(beats) > 1 and slow.own_s > 1.5 * typical and slow.own_s - typical > 0.01:
        return Slow(
            slow.rank, slow.host, f"takes {slow.own_s:.3f} s a step before it meets the others (median {typical:.3f} s)"
        )
    return None


def _end(view: View, run: RunFolder, status: dict[str, Any], start: StartLogs | None, beats: dict[int, Beat]) -> None:
    """State of a run that nobody works on."""
    view.eta_s = None
    view.step = max((b.step for b in beats.values()), default=view.step) or view.step
    failure = first_failure(start) if start else None
    saved = status.get("state") == "saved"
    if run.stop_request() == "now":
        view.state, view.note = "STOPPED", "by `mixer stop --now`; `mixer resume` goes on from the checkpoint"
    elif failure and not (saved and status["time"] >= failure.time):
        view.state, view.note = "FAILED", failure.headline
    elif run.stop.exists():
        view.state, view.note = "STOPPED", "by `mixer stop`; `mixer resume` goes on"
    elif saved:
        view.state, view.note = "SAVED", "before its end; `mixer resume` goes on"
    elif status or start:
        view.state = "DIED"
        view.note = "its processes are gone and left no last words (killed, a power cut); `mixer resume` goes on"


def span(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min, 2.5 h, 3.1 d."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"
