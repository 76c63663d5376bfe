"""Figure 4 of the paper: a network on images whose pixels are permuted, the same permutation for all images.

none: as they are. patches: the patches change places, and the pixels inside of every patch do, all patches alike.
pixels: all pixels of the image do. A Mixer learns under the second as if nothing had happened (permuting its weights
alike undoes it); a convolutional network, built for neighbourhoods, loses under both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.errors import UserError
from pipeline.compare.chart import Curve, Panel, draw_curves
from pipeline.compare.report import markdown, save
from pipeline.compare.study import Result, facts
from pipeline.config import Config

CONDITIONS = ("none", "patches", "pixels")
NAMES = {"none": "original", "patches": "patches and pixels within", "pixels": "all pixels"}


def with_permutation(config: Config, kind: str) -> Config:
    """The same training on permuted images."""
    if config.augment.permute != "none":
        raise UserError(f"augment.permute={config.augment.permute}: what is permuted is for this study to set")
    return replace(config, augment=replace(config.augment, permute=kind))


def report_permutation(results: Sequence[Result], out: Path) -> str:
    """Writes OUT/permutation.md, .json and .png; returns the table. Accuracies are those at the end."""
    shots = results[0].cell.config.eval.fewshot_shots
    keys = [f"fewshot_{n}" for n in shots] + ["top1"]
    header = ["model", "parameters", "images are"] + [f"{n}-shot" for n in shots] + ["val top-1"]
    header += [f"{_shown(shots)}-shot to original", "top-1 to original"]
    original = {r.cell.model: r for r in results if r.cell.condition == "none"}
    rows = []
    for r in results:
        if r.last is None:
            continue
        row = [r.cell.model, f"{r.parameters:,}", NAMES[r.cell.condition], *(f"{r.last.values[k]:.2%}" for k in keys)]
        base = original.get(r.cell.model)
        rows.append([*row, *(_change(r, base, key) for key in (f"fewshot_{_shown(shots)}", "top1"))])
    table = markdown(header, rows)
    save(out, "permutation", table, facts(results))
    draw_curves(_panels(results, shots), out / "permutation.png")
    return table


def _change(result: Result, original: Result | None, key: str) -> str:
    """How far its accuracy lies from that on the original images, relative to the latter."""
    if result is original or not (original and original.last and result.last and original.last.values[key]):
        return "-"
    return f"{result.last.values[key] / original.last.values[key] - 1:+.1%}"


def _shown(shots: list[int]) -> int:
    return 5 if 5 in shots else shots[0]


def _panels(results: Sequence[Result], shots: list[int]) -> list[Panel]:
    """A column a model, as in figure 4: few-shot accuracy above, val accuracy below, against images seen."""
    panels = []
    shown = _shown(shots)
    for key, label in ((f"fewshot_{shown}", f"linear {shown}-shot top-1"), ("top1", "val top-1")):
        for model in dict.fromkeys(r.cell.model for r in results):
            curves = [
                Curve(
                    NAMES[r.cell.condition],
                    [float(p.samples) for p in r.history.val],
                    [p.values[key] for p in r.history.val],
                    colour=CONDITIONS.index(r.cell.condition),
                )
                for r in results
                if r.cell.model == model
            ]
            panels.append(Panel(curves, "images seen", label, model, percent=True))
    return panels
