"""`mixer status`: how runs stand, one in detail, several as a table. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from launch.watch import View, find_runs, look, span

_REFRESH = 2.0
_COLOURS = {"TRAINING": "green", "FINISHED": "green", "STALLED": "red", "FAILED": "red", "DIED": "red"}


def status(
    runs: Annotated[list[str] | None, typer.Argument(help="Run folders, or folders of runs. Default: runs/")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
    stalled_after: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds without a step that make it STALLED. Default: by its usual step."),
    ] = None,
) -> None:
    """How runs stand: one in detail, several as a table.

    Needs nothing but the run folder; where there is SLURM its queue is asked too.

    Examples:

      mixer status runs/b16

      mixer status runs/* --watch

      mixer status runs/b16 --json
    """
    paths = find_runs(runs or [])

    def views() -> list[View]:
        return look(paths, stalled_after)

    if as_json:
        typer.echo(json.dumps([asdict(v) for v in views()], indent=1))
        return
    if not watch or not sys.stdout.isatty():
        while True:
            _print(_shown(views()))
            if not watch:
                return
            time.sleep(_REFRESH)
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(_shown(views()), auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH)
            live.update(_shown(views()), refresh=True)


def _shown(views: list[View]) -> Any:
    from rich.table import Table

    if len(views) == 1:
        return "\n".join(f"[bold]{name:>10}[/]  {text}" for name, text in _details(views[0]))
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "loss", "img/s", "MFU", "ETA", "saved", "restarts", "nodes", "job"):
        table.add_column(name, justify="left" if name in ("run", "state", "job") else "right", overflow="fold")
    for v in views:
        saved = "" if v.checkpoint is None else f"{v.checkpoint} ({span(v.checkpoint_age_s or 0)})"
        cells = [_number(v.loss), _number(v.img_per_s, ",.0f"), _number(v.mfu, ".1%"), _eta(v), saved]
        state = f"[{_COLOURS.get(v.state, 'yellow')}]{v.state}[/]"
        table.add_row(_plain(v.run), state, _steps(v), *cells, str(v.restarts), str(len(v.nodes) or ""), _job(v))
    return table


def _details(v: View) -> list[tuple[str, str]]:
    age = "" if v.checkpoint_age_s is None else f", {span(v.checkpoint_age_s)} ago"
    state = f"[{_COLOURS.get(v.state, 'yellow')}]{v.state}[/]" + (f"  {_plain(v.note)}" if v.note else "")
    epoch = f"  (epoch {v.epoch:.2f})" if v.epoch is not None else ""
    speed = _number(v.img_per_s, ",.0f")
    speed += f"  MFU {v.mfu:.1%}" if v.mfu is not None else ""
    speed += f"  data-wait {v.data_wait:.0%}" if v.data_wait is not None else ""
    hosts = ", ".join(v.nodes[:8]) + (", ..." if len(v.nodes) > 8 else "")
    hosts = f" on {len(v.nodes)} node{'s' * (len(v.nodes) > 1)}: {hosts}" if hosts else ""
    rows = [
        ("run", _plain(v.run)),
        ("state", state),
        ("slowest", _plain(str(v.slowest)) if v.slowest else ""),
        ("step", _steps(v) + epoch if v.step is not None else ""),
        ("loss", _number(v.loss) + (f"  val top-1 {v.top1:.2%}" if v.top1 is not None else "")),
        ("img/s", speed),
        ("ETA", _eta(v)),
        ("checkpoint", f"step {v.checkpoint}{age}" if v.checkpoint is not None else "none yet"),
        ("restarts", str(v.restarts)),
        ("ranks", f"{v.world_size or '?'} x {v.strategy or '?'}{hosts}"),
        ("job", _job(v)),
        ("logs", f"{_plain(v.run)}/logs/{v.start}" if v.start else ""),
    ]
    return [(name, text) for name, text in rows if text]


def _steps(v: View) -> str:
    return "" if v.step is None else f"{v.step:,}/{v.total_steps:,}" if v.total_steps else f"{v.step:,}"


def _eta(v: View) -> str:
    return "" if v.eta_s is None else span(v.eta_s)


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _job(v: View) -> str:
    if v.job is None:
        return ""
    return v.job + (f" {v.job_state.lower()}" if v.job_state else "") + (f", {v.job_left} left" if v.job_left else "")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print(shown: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 250  # a file or a pipe has no edge
    console.print(shown, soft_wrap=isinstance(shown, str))
