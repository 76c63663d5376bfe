"""What a demo's folder says of itself: facts, checks, table and picture, all read from the files of its two runs.

`DEMO/runs/interrupted` was killed and resumed elsewhere, `DEMO/runs/undisturbed` was not. The expected samples are
worked out once more from the data set's index and the order's formula, without asking either run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError
from data_tools.manifest import DatasetManifest, load_index
from pipeline.config import Config, load_config
from pipeline.data.order import SampleOrder, key
from pipeline.ledger import LedgerReader, ledger_ranks
from pipeline.run import RunFolder, read_digests, read_lines, read_metrics

ACCURACY = 0.95
LOSS_TOLERANCE = 0.01  # other strategies and world sizes add the same fp32 numbers in another order
STRATEGIES = {"ddp": "DDP", "fsdp": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


@dataclass(frozen=True)
class Attempt:
    """One start of the training processes: `first` steps were complete when it began, `last` when it ended."""

    number: int
    strategy: str
    world_size: int
    first: int
    last: int
    img_per_s: float  # median of its log lines

    def __str__(self) -> str:
        many = "es" if self.world_size > 1 else ""
        return f"{STRATEGIES.get(self.strategy, self.strategy)} on {self.world_size} process{many}"


@dataclass
class Report:
    """The facts of a demo; `problems` is empty if and only if it showed what it is there to show."""

    folder: Path
    total_steps: int
    parameters: str
    images: dict[str, int]
    shards: int
    classes: int
    attempts: list[Attempt]
    killed_processes: int | None
    same_samples: int  # steps whose samples are those of the undisturbed run and of the formula
    loss_same_until: int  # last logged step up to which all losses are equal, bit for bit
    loss_difference: float  # largest after that, absolute
    top1: float
    top1_undisturbed: float
    val_samples: int
    problems: list[str] = field(default_factory=list)

    @property
    def killed_after(self) -> int:
        return self.attempts[0].last

    @property
    def resumed_from(self) -> int:
        return self.attempts[-1].first


def interrupted_run(folder: Path) -> Path:
    return folder / "runs" / "interrupted"


def undisturbed_run(folder: Path) -> Path:
    return folder / "runs" / "undisturbed"


def expected_digests(config: Config, steps: int) -> dict[int, tuple[int, int, str]]:
    """step -> (epoch, position, digest), as `read_digests`, from the data set's index and the order's formula."""
    folder = Path(config.data.train)
    manifest = DatasetManifest.load(folder)
    shards = manifest.splits["train"]
    crc32 = np.concatenate([load_index(folder / s.index_name)["crc32"] for s in shards]).astype(np.int64)
    batch = config.train.global_batch_size
    order = SampleOrder(
        [s.samples for s in shards],
        manifest_sha=manifest.split_digest("train"),
        seed=config.run.seed,
        global_batch_size=batch,
        lanes=config.data.lanes,
        chunk=config.data.chunk,
        window=config.data.window,
    )
    digests, state = {}, order.state
    for step in range(1, steps + 1):
        slots = state.position + np.arange(batch)
        ids = order.sample_ids(state.epoch, slots)
        digest = int(key(slots, ids, crc32[ids], np.ones(batch, dtype=bool)).sum(dtype=np.uint64))
        digests[step] = state.epoch, state.position, f"{digest:016x}"
        state = order.next_state(state)
    return digests


def examine(folder: Path) -> Report:
    """Reads both runs and compares them. Raises UserError where a demo has not run to its end."""
    run, other = RunFolder(interrupted_run(folder)), RunFolder(undisturbed_run(folder))
    for r in (run, other):
        if not r.finished.exists():
            raise UserError(f"{r.path} is not finished: run `mixer demo {folder}` again")
    config = load_config(str(run.config)).config
    events = list(read_lines(run.events))
    total = next(int(e["step"]) for e in events if e["event"] == "finish")
    attempts = _attempts(run, events, config.train.global_batch_size)
    problems: list[str] = []

    if len(attempts) < 2 or not 0 < attempts[0].last < total:
        problems.append(f"the kill did not land between the first and the last of {total} steps")
    same = _same_samples(run, other, expected_digests(config, total), problems)
    until, difference = _compare_losses(run, other, problems)
    result, result_other = _evaluation(run, total), _evaluation(other, total)
    if result["top1"] < ACCURACY:
        problems.append(f"top-1 is {result['top1']:.2%}, below {ACCURACY:.0%}")

    manifest = DatasetManifest.load(config.data.train)
    kill = folder / "kill.json"
    return Report(
        folder,
        total,
        f"{_parameters(run, total) / 1e6:.2f}M parameters",
        {split: manifest.samples(split) for split in manifest.splits},
        sum(len(shards) for shards in manifest.splits.values()),
        len(manifest.classes or []),
        attempts,
        len(json.loads(kill.read_text())["pids"]) if kill.exists() else None,
        same,
        until,
        difference,
        result["top1"],
        result_other["top1"],
        result["samples"],
        problems,
    )


def _attempts(run: RunFolder, events: list[dict[str, Any]], batch: int) -> list[Attempt]:
    """Every start in events.jsonl; where it ended is what the ledger says: the last step that covers a batch."""
    covered: dict[tuple[int, int], int] = {}
    for rank in ledger_ranks(run.ledger):
        for s in LedgerReader(run.ledger, rank):
            for place in ((s.attempt, step) for step in range(s.step, s.end)):
                covered[place] = covered.get(place, 0) + s.last - s.first
    lines = [m for m in read_lines(run.metrics) if m.get("split", "train") == "train"]
    attempts = []
    for event in (e for e in events if e["event"] in ("start", "resume")):
        number = event["attempt"]
        steps = [step for (attempt, step), slots in covered.items() if attempt == number and slots == batch]
        rates = [m["img_per_s"] for m in lines if m["attempt"] == number]
        attempts.append(
            Attempt(
                number,
                event["strategy"],
                event["world_size"],
                event["step"],
                max(steps, default=event["step"]),
                float(np.median(rates)) if rates else 0.0,
            )
        )
    return attempts


def _same_samples(run: RunFolder, other: RunFolder, expected: dict[int, Any], problems: list[str]) -> int:
    """How many steps had the expected samples in both runs."""
    mine, others = read_digests(run.path), read_digests(other.path)
    for name, digests in (("interrupted", mine), ("undisturbed", others)):
        wrong = sorted(s for s in expected.keys() | digests.keys() if digests.get(s) != expected.get(s))
        if wrong:
            problems.append(
                f"the {name} run did not see the samples that the order's formula gives: {len(wrong)} steps differ, "
                f"the first is step {wrong[0]}"
            )
    differ = sorted(s for s in mine.keys() | others.keys() if mine.get(s) != others.get(s))
    if differ:
        problems.append(f"the two runs saw other samples in {len(differ)} steps, the first is step {differ[0]}")
    return sum(mine.get(s) == others.get(s) == e for s, e in expected.items())


def _compare_losses(run: RunFolder, other: RunFolder, problems: list[str]) -> tuple[int, float]:
    """(last step up to which all logged losses are equal, largest difference after that)."""
    mine, others = ({m["step"]: m["loss"] for m in read_metrics(r.path)} for r in (run, other))
    if mine.keys() != others.keys():
        problems.append("the runs did not log the same steps")
    until, difference = 0, 0.0
    for step in sorted(mine.keys() & others.keys()):
        gap = abs(mine[step] - others[step])
        if gap == 0 and difference == 0:
            until = step
        difference = max(difference, gap)
    if difference > LOSS_TOLERANCE:
        problems.append(f"the losses of the two runs differ by up to {difference:.2g} (allowed: {LOSS_TOLERANCE:g})")
    return until, difference


def _evaluation(run: RunFolder, step: int) -> dict[str, Any]:
    path = run.path / "eval" / f"step-{step:08d}.json"
    if not path.exists():
        raise UserError(f"{path} is missing: `mixer eval {run.path}` writes it")
    return json.loads(path.read_text())


def _parameters(run: RunFolder, step: int) -> int:
    manifest = json.loads((run.checkpoints / f"step-{step:08d}" / "MANIFEST.json").read_text())
    return sum(int(np.prod(shape)) for _, kind, shape in manifest["tensors"] if kind == "weight")


# --- the table ----------------------------------------------------------------------------------------------


def rows(report: Report) -> list[tuple[str, str]]:
    """The table: (what, how it went)."""
    r = report
    first, last = r.attempts[0], r.attempts[-1]
    total = r.total_steps
    processes = f" ({r.killed_processes} processes at once)" if r.killed_processes else ""
    repeated = r.killed_after - r.resumed_from
    agree = "as undisturbed, and as the order's formula says"
    table = [
        ("images", f"{r.images['train']:,} to train on, {r.images['val']:,} to validate; {r.classes} classes, "
                   f"{r.shards} shards"),
        ("model", f"Mixer, {r.parameters}, {total} steps"),
        ("started", f"{first}"),
        ("kill -9", f"after step {r.killed_after} of {total}{processes}"),
        ("resumed", f"from step {r.resumed_from}, {last}; {repeated} steps repeated"),
        ("samples", f"{r.same_samples} of {total} steps: {agree}"),
        ("losses", _losses(r)),
        ("top-1", f"{r.top1:.2%} of {r.val_samples} val images (undisturbed: {r.top1_undisturbed:.2%})"),
        ("speed", ", ".join(f"{a.img_per_s:,.0f} images/s ({a})" for a in r.attempts)),
        ("picture", str(r.folder / "loss.png")),
        ("curves", f"{_tensorboard()} --logdir {r.folder / 'runs'}"),
    ]  # fmt: skip
    return table


def _losses(r: Report) -> str:
    if r.loss_difference == 0:
        return "equal to the last bit, all the way"
    return f"equal to the last bit up to step {r.loss_same_until}, then within {r.loss_difference:.1g}"


def _tensorboard() -> str:
    """The command as one can type it here: with its folder unless that is on the PATH."""
    import shutil

    beside = Path(sys.executable).parent / "tensorboard"
    if shutil.which("tensorboard") == str(beside) or not beside.exists():
        return "tensorboard"
    try:
        return str(beside.relative_to(Path.cwd()))
    except ValueError:
        return str(beside)


def show(report: Report) -> None:
    """Prints the table, rich on a terminal and plain elsewhere, and what went wrong, if anything did."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, title="What happened", title_justify="left")
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows(report):
            table.add_row(*row)
        Console(highlight=False, markup=False).print(table)
    else:
        print("\n".join(["", *(f"  {what:<8}  {how}" for what, how in rows(report)), ""]), flush=True)
    for problem in report.problems:
        print(f"FAILED: {problem}", file=sys.stderr, flush=True)


# --- the picture --------------------------------------------------------------------------------------------

# Okabe and Ito's palette: told apart with any kind of colour vision, and in grey
ORANGE, BLUE, GREEN, RED, INK = "#E69F00", "#0072B2", "#009E73", "#B03A00", "#333333"


def draw(report: Report, path: Path) -> None:
    """The losses of both runs in one picture of 1000 x 450 pixels, the kill and the resume marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    total = report.total_steps
    other = read_metrics(undisturbed_run(report.folder))
    axes.plot(*_curve(other), color=ORANGE, linewidth=7, alpha=0.55, solid_capstyle="round",
              label="never interrupted")  # fmt: skip
    run = RunFolder(interrupted_run(report.folder))
    lines = [m for m in read_lines(run.metrics) if m.get("split", "train") == "train"]
    styles: list[dict[str, Any]] = [
        {"color": BLUE, "linestyle": "-", "linewidth": 2.6},
        {"color": GREEN, "linestyle": (0, (3, 1)), "linewidth": 1.7},
    ]
    for attempt, style in zip(report.attempts, styles):
        mine = [m for m in lines if m["attempt"] == attempt.number]
        verb = "resumed" if attempt.first else "started"
        axes.plot(*_curve(mine), label=f"{verb}: {attempt}", **style)
    losses = [m["loss"] for m in [*other, *lines]]
    axes.set_yscale("log")
    axes.set_ylim(max(min(losses), 1e-3) * 0.8, max(losses) * 2.2)
    axes.set_xlim(0, total)
    _mark(axes, report.killed_after, f"kill -9 after step {report.killed_after}", RED, "left")
    _mark(axes, report.resumed_from, f"resumed from step {report.resumed_from}", GREEN, "right")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlabel("step", fontsize=12, color=INK)
    axes.set_ylabel("training loss", fontsize=12, color=INK)
    axes.tick_params(labelsize=11, colors=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower left", fontsize=11, frameon=False, handlelength=2.6)
    figure.suptitle(
        f"Killed, resumed on another strategy and {report.attempts[-1].world_size} processes: "
        f"the same samples, the same curve, {report.top1:.1%} top-1",
        fontsize=13, color=INK, x=0.02, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _curve(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [m["step"] for m in lines], [m["loss"] for m in lines]


def _mark(axes: Any, step: int, text: str, color: str, side: str) -> None:
    """A vertical line with its label beside it, at the top."""
    axes.axvline(step, color=color, linewidth=1.4, linestyle=":")
    offset = 6 if side == "left" else -6
    axes.annotate(
        text, (step, 1), xycoords=("data", "axes fraction"), xytext=(offset, -12), textcoords="offset points",
        ha=side, color=color, fontsize=11, fontweight="bold",
    )  # fmt: skip
