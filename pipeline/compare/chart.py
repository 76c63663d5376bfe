"""Curves and bars as PNG with matplotlib (extra `compare`), in one look for all of `mixer compare`.

Okabe and Ito's colours, and a marker of its own, tell a curve from the others with any kind of colour vision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F6000", "#000000")
INK = "#333333"
_MARKERS = "osD^vPX*"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
_FEW = 40  # points up to which each gets a marker


@dataclass(frozen=True)
class Curve:
    """One line of a panel. colour: curves with the same one belong together; None: by its place in the panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None = None
    dash: int = 0


@dataclass(frozen=True)
class Panel:
    """One pair of axes. x_ticks: the only values to mark on the x axis. percent: y are shares, shown in percent."""

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    x_ticks: Sequence[float] | None = None


def require_matplotlib() -> None:
    """To be called before the work that ends in a picture. Raises UserError where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures of comparisons need matplotlib: pip install 'mixer-pretraining[compare]'")


def draw_curves(panels: Sequence[Panel], path: Path, title: str = "", columns: int = 2) -> None:
    """Panels in rows of `columns`, one legend below for all of them; a label is listed once."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.2 * columns, 3.9 * rows + 0.5, title)
    seen: dict[str, Any] = {}
    for number, panel in enumerate(panels):
        axes: Any = figure.add_subplot(rows, columns, number + 1)
        for place, curve in enumerate(panel.curves):
            colour = place if curve.colour is None else curve.colour
            (line,) = axes.plot(
                curve.x,
                curve.y,
                color=COLOURS[colour % len(COLOURS)],
                linestyle=_DASHES[(curve.dash + colour // len(COLOURS)) % len(_DASHES)],
                marker=_MARKERS[colour % len(_MARKERS)] if len(curve.x) <= _FEW else None,
                markersize=5,
                linewidth=1.8,
                label=curve.label,
            )
            seen.setdefault(curve.label, line)
        _dress(axes, panel)
    if any(seen):
        figure.legend(
            seen.values(), seen.keys(), loc="outside lower center", ncols=min(len(seen), 2 * columns), frameon=False
        )
    save_figure(figure, path)


def draw_bars(
    labels: Sequence[str],
    groups: Sequence[tuple[str, Sequence[float | None]]],
    path: Path,
    x_label: str,
    title: str = "",
) -> None:
    """Horizontal bars, one group a label from the top down. groups: (name, a value or None for each label)."""
    figure = new_figure(8.5, 1.6 + len(labels) * (0.16 + 0.24 * len(groups)), title)
    axes: Any = figure.add_subplot()
    height = 0.8 / len(groups)
    for g, (name, values) in enumerate(groups):
        at = [i + (g - (len(groups) - 1) / 2) * height for i, v in enumerate(values) if v is not None]
        bars = axes.barh(at, [v for v in values if v is not None], height * 0.92, color=COLOURS[g], label=name)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8, color=INK)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.margins(x=0.12)
    _dress(axes, Panel((), x_label, ""))
    figure.legend(loc="outside lower center", ncols=len(groups), frameon=False)
    save_figure(figure, path)


def new_figure(width: float, height: float, title: str = "") -> Any:
    """A matplotlib figure of so many inches that no window system takes part in."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=12, color=INK, x=0.02, ha="left")
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes the PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _dress(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.x_ticks is not None:
        axes.set_xticks(panel.x_ticks)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_xlabel(panel.x_label, color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    if panel.title:
        axes.set_title(panel.title, fontsize=11, color=INK, loc="left")
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
