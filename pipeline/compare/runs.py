"""Runs side by side: accuracy and loss against samples seen and against device-hours. Imports no torch.

All figures are those that the runs logged (`metrics.jsonl`, `events.jsonl`). Curves hold what counts: lines that a
later attempt made void, after a crash or a rollback, are left out. Device-hours hold what was spent: the steps that
were undone too, on as many devices as each attempt had. They are those of the training loop; starting, loading and
evaluating are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from pipeline.compare.chart import Curve, Panel, draw_curves
from pipeline.compare.report import MISSING, markdown, save, shape_label
from pipeline.config import load_config
from pipeline.run import RunFolder, live_lines, read_lines

_BINS = 150  # points to which a training curve is averaged for the picture
_HOUR = 3600.0


@dataclass(frozen=True)
class Point:
    """A run at one moment. values: what was logged there (`loss`, `top1`, ...)."""

    step: int
    samples: int
    device_hours: float
    values: dict[str, float]


@dataclass(frozen=True)
class History:
    """One run as it counts: logged steps and evaluations, each in order."""

    name: str
    model: str
    loss_name: str
    train: list[Point]
    val: list[Point]
    device_hours: float  # spent in all
    attempts: int
    devices: list[int]  # of each attempt that logged a step
    finished: bool

    def best(self) -> Point | None:
        """The evaluation with the highest top-1."""
        return max(self.val, key=lambda p: p.values["top1"], default=None)


def read_history(run: str | Path, name: str | None = None) -> History:
    """Reads one run folder.

    Raises:
        UserError: no run folder, or one that has logged nothing yet.
    """
    folder = RunFolder(run)
    if not folder.config.exists():
        problem = "it has no config.yaml" if folder.path.is_dir() else "no such folder"
        raise UserError(f"{run} is not a run folder: {problem}. Runs are folders that `mixer train` made")
    config = load_config(str(folder.config), [f"run.dir={folder.path}"]).config
    batch = config.train.global_batch_size
    lines = list(read_lines(folder.metrics))
    if not lines:
        raise UserError(f"{run} has logged nothing yet: compare it after its first steps (`mixer status {run}`)")
    begun = {e["attempt"]: e for e in read_lines(folder.events) if e["event"] in ("start", "resume", "rollback")}
    train = [line for line in lines if line.get("split", "train") == "train"]
    spent = _spending(train, begun, batch)

    def points(some: list[dict[str, Any]]) -> list[Point]:
        found = []
        for line in live_lines(run, some):
            steps, seconds = spent.get(line["attempt"], ([0], [0.0]))
            hours = float(np.interp(line["step"], steps, seconds)) / _HOUR
            found.append(Point(line["step"], line.get("samples_seen", line["step"] * batch), hours, line))
        return found

    return History(
        name or folder.path.name,
        f"{config.model.name} {shape_label(config.model.overrides())}".rstrip(),
        config.loss.name,
        points(train),
        points([line for line in lines if line.get("split") == "val"]),
        max((seconds[-1] for _, seconds in spent.values()), default=0.0) / _HOUR,
        len(begun),
        [begun[a].get("world_size", 1) for a in spent if a in begun and len(spent[a][0]) > 1],
        folder.finished.exists(),
    )


def _spending(
    lines: list[dict[str, Any]], begun: dict[int, dict[str, Any]], batch: int
) -> dict[int, tuple[list[int], list[float]]]:
    """Attempt -> its steps and the device-seconds that all attempts had spent in the training loop by then."""
    spent: dict[int, tuple[list[int], list[float]]] = {}
    total = 0.0
    for attempt in sorted({*begun, *(line["attempt"] for line in lines)}):
        mine = [line for line in lines if line["attempt"] == attempt]
        steps, seconds = [begun.get(attempt, {}).get("step", 0)], [total]
        size = _batch_size(mine) or batch
        for line in mine:
            total += (line["step"] - steps[-1]) * size / line["img_per_s_per_device"]
            steps.append(line["step"])
            seconds.append(total)
        spent[attempt] = steps, seconds
    return spent


def _batch_size(lines: list[dict[str, Any]]) -> float | None:
    """Samples a step of one attempt, as they were logged: a resume may have changed the recipe's."""
    ends = [line for line in (*lines[:1], *lines[-1:]) if "samples_seen" in line]
    if len(ends) < 2 or ends[0]["step"] == ends[1]["step"]:
        return None
    return (ends[1]["samples_seen"] - ends[0]["samples_seen"]) / (ends[1]["step"] - ends[0]["step"])


def distinct_names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' folder names, with as many parents as it takes to tell them apart."""
    paths = [Path(run).absolute() for run in runs]
    deepest = max(len(p.parts) for p in paths)
    for depth in range(1, deepest + 1):
        names = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same run twice: {', '.join(map(str, runs))}")


def compare_runs(runs: Sequence[str], out: Path) -> str:
    """Writes OUT/runs.md, .json and .png; returns the table. Raises UserError for what is no run."""
    histories = [read_history(run, name) for run, name in zip(runs, distinct_names(runs))]
    table = markdown(*_table(histories))
    if len({h.loss_name for h in histories}) > 1:
        table += "\n\nLosses of different kinds are not comparable: " + ", ".join(
            f"{h.name} {h.loss_name}" for h in histories
        )
    save(out, "runs", table, [_facts(h) for h in histories])
    draw_curves(_panels(histories), out / "runs.png")
    return table


def _table(histories: list[History]) -> tuple[list[str], list[list[str]]]:
    shots = sorted({k for h in histories for p in h.val for k in p.values if k.startswith("fewshot_")}, key=_shots)
    header = ["run", "model", "samples seen", "device-hours", "train loss", "val loss", "top-1", "best top-1", "at"]
    header += [f"{_shots(k)}-shot" for k in shots] + ["devices", "attempts"]
    rows = []
    for h in histories:
        train, val, best = h.train[-1:], h.val[-1:], h.best()
        last = max((p.samples for p in [*train, *val]), default=0)
        rows.append(
            [
                h.name + ("" if h.finished else " (unfinished)"),
                h.model,
                f"{last:,}",
                f"{h.device_hours:.4g}",
                *(f"{p[0].values['loss']:.4f}" if p else MISSING for p in (train, val)),
                f"{val[0].values['top1']:.2%}" if val else MISSING,
                f"{best.values['top1']:.2%}" if best else MISSING,
                f"{best.samples:,}" if best else MISSING,
                *(f"{val[0].values[k]:.2%}" if val and k in val[0].values else MISSING for k in shots),
                ", ".join(map(str, dict.fromkeys(h.devices))),
                str(h.attempts),
            ]
        )
    return header, rows


def _shots(key: str) -> int:
    return int(key.removeprefix("fewshot_"))


def _panels(histories: list[History]) -> list[Panel]:
    """Left: against samples seen, right: against device-hours; above: accuracy, below: loss."""
    validated = any(h.val for h in histories)
    accuracy = "val top-1" if validated else "training accuracy"
    panels = []
    for title, share in ((accuracy, True), ("loss", False)):
        for axis in ("samples seen", "device-hours"):
            curves = []
            for colour, h in enumerate(histories):
                if not share or not validated:
                    value = "accuracy" if share else "loss"
                    curves.append(_curve(h, f"{h.name}, training", h.train, value, axis, colour))
                if h.val:
                    curves.append(
                        _curve(h, f"{h.name}, val", h.val, "top1" if share else "loss", axis, colour, 1, average=False)
                    )
            panels.append(Panel(curves, axis, title, percent=share))
    return panels


def _curve(
    h: History, label: str, points: list[Point], value: str, axis: str, colour: int, dash: int = 0, average: bool = True
) -> Curve:
    x = [float(p.samples if axis == "samples seen" else p.device_hours) for p in points]
    y = [float(p.values[value]) for p in points]
    return Curve(label, *(_averaged(x, y) if average else (x, y)), colour=colour, dash=dash)


def _averaged(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Neighbouring points averaged, at most _BINS of them: a step's loss jumps about."""
    edges = np.linspace(0, len(x), min(_BINS, len(x)) + 1).astype(int)
    parts = list(pairwise(edges))
    return [float(np.mean(x[a:b])) for a, b in parts], [float(np.mean(y[a:b])) for a, b in parts]


def _facts(h: History) -> dict[str, Any]:
    best = h.best()
    return {
        "run": h.name,
        "model": h.model,
        "loss_name": h.loss_name,
        "finished": h.finished,
        "attempts": h.attempts,
        "device_hours": h.device_hours,
        "last": _point(h.train[-1] if h.train else None),
        "last_val": _point(h.val[-1] if h.val else None),
        "best_val": _point(best),
    }


def _point(p: Point | None) -> dict[str, Any] | None:
    if p is None:
        return None
    values = {k: v for k, v in p.values.items() if k not in ("attempt", "split", "samples_seen", "step")}
    return {"step": p.step, "samples_seen": p.samples, "device_hours": p.device_hours, **values}
