"""What `mixer compare throughput` says: table, the Mixer's ratio to the ViT of its size, picture, facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.compare.chart import draw_bars
from pipeline.compare.published import COUNTERPART, published_note, published_rate
from pipeline.compare.report import MISSING, markdown, save
from pipeline.compare.throughput import INFERENCE, MODES, TRAINING, Options, Timing
from pipeline.model.flops import peak_flops


def report(timings: Sequence[Timing], options: Options, device: torch.device, out: Path) -> str:
    """Writes OUT/throughput.md, .json and .png; returns the text."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    peak = peak_flops(name, options.precision) if device.type == "cuda" else None
    first = reference(timings)
    ratios = [_ratio_line(t, vit) for t, vit in pairs(timings)]
    how = (
        f"{name}; {options.precision}, compile={options.compile}, {options.num_classes} classes, "
        f"{options.rounds} rounds of {options.seconds:g} s each, interleaved; medians. "
        "Paper: forward pass, a core of TPU v3."
    )
    text = "\n\n".join([markdown(*_table(timings, first, peak)), "\n".join(ratios), how])
    save(out, "throughput", text, _facts(timings, options, name, peak))
    labels = [f"{t.candidate.name}\n{t.candidate.shape}{t.candidate.size} px" for t in timings]
    groups = [(mode, [t.ratio(first, mode) for t in timings]) for mode in MODES]
    paper = [_paper_ratio(t, first) for t in timings]
    if sum(p is not None for p in paper) > 1:
        groups.append(("paper: inference, TPU v3", paper))
    title = f"Images a second on {name}"
    draw_bars(labels, groups, out / "throughput.png", f"times {first.candidate.name}", title)
    return text


def reference(timings: Sequence[Timing]) -> Timing:
    """The model that others are given as multiples of: the first ViT, else the first."""
    return next((t for t in timings if _is_vit(t)), timings[0])


def pairs(timings: Sequence[Timing]) -> list[tuple[Timing, Timing]]:
    """Each Mixer with the ViT of its size and patch at its resolution, else with the first ViT."""
    vits = [t for t in timings if _is_vit(t)]
    found = []
    for t in timings:
        if t.candidate.model.startswith("mixer_") and vits:
            twin = COUNTERPART.get(t.candidate.model)
            same = (v for v in vits if (v.candidate.model, v.candidate.size) == (twin, t.candidate.size))
            found.append((t, next(same, vits[0])))
    return found


def _is_vit(t: Timing) -> bool:
    return t.candidate.model.startswith("timm/vit_")


def _paper_rate(t: Timing) -> float | None:
    return None if t.candidate.overrides else published_rate(t.candidate.model, t.candidate.size)


def _paper_ratio(t: Timing, to: Timing) -> float | None:
    mine, theirs = _paper_rate(t), _paper_rate(to)
    return mine / theirs if mine and theirs else None


def _ratio_line(mixer: Timing, vit: Timing) -> str:
    measured = ", ".join(f"{mode} {_times(mixer.ratio(vit, mode))}" for mode in MODES)
    paper = _paper_ratio(mixer, vit)
    published = f"; the paper's inference: {_times(paper)}" if paper else ""
    return f"**{mixer.candidate.label} / {vit.candidate.label}: {measured}**{published}"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def _table(timings: Sequence[Timing], first: Timing, peak: float | None) -> tuple[list[str], list[list[str]]]:
    header = ["model", "px", "M params", "GMAC", "batch", "inference img/s", "training img/s", "inference", "training"]
    header += ["training MFU"] if peak else []
    header += ["spread", "paper img/s/core", "paper"]
    rows = []
    for t in timings:
        c, rates = t.candidate, (t.rate(INFERENCE), t.rate(TRAINING))
        rows.append(
            [
                c.label,
                str(c.size),
                f"{t.cost.parameters / 1e6:.1f}",
                f"{t.cost.forward_macs / 1e9:.3g}",
                " / ".join(str(t.batch_size[mode]) for mode in MODES),
                *(MISSING if r is None else f"{r:,.0f}" if r >= 100 else f"{r:.3g}" for r in rates),
                *(_times(t.ratio(first, mode)) for mode in MODES),
                *([f"{t.mfu(TRAINING, peak) or 0:.0%}"] if peak else []),
                f"{max(t.spread(mode) for mode in MODES):.0%}",
                (published_note(c.model, c.size) if not c.overrides else "") or MISSING,
                _times(_paper_ratio(t, first)),
            ]
        )
    return header, rows


def _facts(timings: Sequence[Timing], options: Options, device: str, peak: float | None) -> dict[str, Any]:
    return {
        "device": device,
        "torch": torch.__version__,
        "precision": options.precision,
        "compile": options.compile,
        "channels_last": options.channels_last,
        "seconds": options.seconds,
        "models": [
            {
                "model": t.candidate.model,
                "image_size": t.candidate.size,
                "overrides": t.candidate.overrides,
                "parameters": t.cost.parameters,
                "forward_macs": t.cost.forward_macs,
                "batch_size": t.batch_size,
                "img_per_s": {mode: t.rate(mode) for mode in MODES},
                "rounds": t.rates,
                "mfu": {mode: t.mfu(mode, peak) for mode in MODES},
                "paper_img_per_s_per_core": _paper_rate(t),
            }
            for t in timings
        ],
        "ratios": [
            {
                "mixer": mixer.candidate.label,
                "vit": vit.candidate.label,
                **{mode: mixer.ratio(vit, mode) for mode in MODES},
                "paper_inference": _paper_ratio(mixer, vit),
            }
            for mixer, vit in pairs(timings)
        ],
    }
