"""The data-scaling study of the paper (figure 2, right): how much each model gains from more data, at equal steps.

Nested subsets of one set (3% lies inside 10%), every model trained on each for the same number of steps: 7 epochs of
all of it are 233 epochs of 3%. Of each run counts its best evaluation on the val split (the paper stops early by it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from data_tools.errors import UserError
from pipeline.compare.chart import Curve, Panel, draw_curves
from pipeline.compare.report import markdown, save
from pipeline.compare.study import Result, facts
from pipeline.config import Config
from pipeline.config.sets import parse_share

FRACTIONS = ("3%", "10%", "30%", "100%")


def parse_fractions(text: str) -> list[str]:
    """ "3,10,30,100" or "3%, 10%" -> shares in percent, ascending. Raises UserError."""
    shares: dict[Fraction, str] = {}
    for word in text.replace(" ", "").split(","):
        share = word.removesuffix("%") + "%"
        try:
            shares[parse_share(share)] = share
        except ValueError:
            raise UserError(f"fractions {text}: {word!r} is no percentage; write for example 3,10,30,100") from None
    return [shares[v] for v in sorted(shares)]


def on_share(config: Config, share: str) -> Config:
    """The same training on a part of its set."""
    if config.data.subset:
        raise UserError(f"data.subset={config.data.subset}: the subsets are this study's own; use --fractions")
    return replace(config, data=replace(config.data, subset=None if parse_share(share) == 1 else share))


def report_scaling(results: Sequence[Result], out: Path) -> str:
    """Writes OUT/scaling.md, .json and .png; returns the table."""
    shots = results[0].cell.config.eval.fewshot_shots
    header = ["model", "parameters", "share", "images", "epochs", "best step", "of", "val top-1"]
    header += [f"{n}-shot" for n in shots] + ["val loss", "loss at the end"]
    rows = []
    for r in results:
        best, last = r.best, r.last
        if best is None or last is None:
            continue
        rows.append(
            [
                r.cell.model,
                f"{r.parameters:,}",
                r.cell.condition,
                f"{r.samples:,}",
                f"{last.samples / r.samples:.3g}",
                f"{best.step:,}",
                f"{last.step:,}",
                f"{best.values['top1']:.2%}",
                *(f"{best.values[f'fewshot_{n}']:.2%}" for n in shots),
                f"{best.values['loss']:.3f}",
                f"{last.values['loss']:.3f}",
            ]
        )
    table = markdown(header, rows)
    save(out, "scaling", table, facts(results))
    draw_curves(_panels(results, shots), out / "scaling.png")
    return table


def _panels(results: Sequence[Result], shots: list[int]) -> list[Panel]:
    """Few-shot accuracy as in figure 2, and val accuracy, against the size of the training set."""
    shown = 5 if 5 in shots else shots[0]
    panels = []
    for key, label in ((f"fewshot_{shown}", f"linear {shown}-shot top-1"), ("top1", "val top-1")):
        curves = []
        for model in dict.fromkeys(r.cell.model for r in results):
            points = sorted((r.samples, r.best.values[key]) for r in results if r.cell.model == model and r.best)
            curves.append(Curve(model, [float(n) for n, _ in points], [v for _, v in points]))
        sizes = sorted({r.samples for r in results})
        panels.append(Panel(curves, "training images", label, log_x=True, percent=True, x_ticks=sizes))
    return panels
