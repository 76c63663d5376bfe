"""`mixer shard` and `mixer data ...`: thin commands over the functions of this package.

Only typer is imported here; everything else inside the command, so that `mixer --help` stays quick.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data_tools.plan import ShardPlan

data_app = typer.Typer(no_args_is_help=True, help="Look at and check finished data sets.")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class OrderChoice(StrEnum):
    """In which order samples are laid into shards."""

    shuffled = "shuffled"
    source = "source"


def parse_size(text: str) -> int:
    """Bytes from "256MB" (10^6), "1GiB" (2^30), "500000". Raises typer.BadParameter for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; try 256MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_bad(text: str) -> int | float:
    """A count ("10") or a fraction ("0.1%", "0.001"). Raises typer.BadParameter for anything else."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a count (10) nor a fraction (0.1%)") from None


def format_bytes(n: float) -> str:
    """Decimal units, three digits: "1.29 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"


def _shards(n: int) -> str:
    return f"{n:,} shard" + "s" * (n != 1)


def shard(
    source: Annotated[
        Path, typer.Argument(help="Image folder, or .csv/.tsv with columns path[,label][,split].")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; made if missing.")],
    val_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images for split val, by hash of their path.")
    ] = 0.0,
    shard_size: Annotated[str, typer.Option(help="Largest tar: 256MB, 1GiB, ...")] = "256MB",
    max_samples: Annotated[int, typer.Option(min=0, help="Most images in a tar; 0: no limit.")] = 0,
    order: Annotated[
        OrderChoice, typer.Option(help="shuffled: classes are mixed over all shards; source: as listed.")
    ] = OrderChoice.shuffled,
    seed: Annotated[int, typer.Option(min=0, help="For the order and the split.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    verify: Annotated[bool, typer.Option(help="Decode every image, or read its header only.")] = True,
    max_bad: Annotated[str, typer.Option(help="Bad images to accept: a count, or 0.1%.")] = "0",
    max_pixels: Annotated[int, typer.Option(min=1, help="Quarantine larger images (width x height).")] = 10
    ** 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the shards of another plan or corpus in OUT.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
) -> None:
    """Pack a corpus of images into WebDataset shards; run it again after any interruption.

    Subfolders are classes (photos/cat/1.jpg), or splits of classes
    (photos/train/cat/1.jpg); a flat folder has no labels. Image bytes are kept
    as they are. Bad images are listed in OUT/quarantine.jsonl and never enter
    a shard.

    Examples:

      mixer shard photos/ shards/ --val-fraction 0.02

      mixer shard labels.csv shards/ --shard-size 1GB --max-bad 0.1%

      mixer shard photos/ shards/ --dry-run
    """
    from data_tools.engines import ShardOptions, plan_corpus, shard_corpus
    from data_tools.progress import ProgressPrinter

    options = ShardOptions(
        source, out, val_fraction, parse_size(shard_size), max_samples, order.value, seed, workers, verify,
        max_pixels, parse_bad(max_bad), overwrite,
    )  # fmt: skip
    if dry_run:
        _show_plan(plan_corpus(options))
        return
    with ProgressPrinter() as printer:
        manifest = shard_corpus(options, printer)
    for split, shards in manifest.splits.items():
        size = format_bytes(sum(s.bytes for s in shards))
        typer.echo(f"{split}: {manifest.samples(split):,} images, {_shards(len(shards))}, {size}")
    if manifest.classes is not None:
        typer.echo(f"classes: {len(manifest.classes):,}")
    _show_ignored(manifest.source["ignored"])
    bad = manifest.source["quarantined"]
    typer.echo(f"bad images: {bad:,}" + (f", listed in {out / 'quarantine.jsonl'}" if bad else ""))
    typer.echo(f"finished: {out / 'dataset.json'}")


def _show_plan(plan: ShardPlan) -> None:
    typer.echo(f"{plan.corpus.samples:,} images, {format_bytes(plan.corpus.bytes)}")
    if plan.classes is not None:
        more = ", ..." if len(plan.classes) > 5 else ""
        typer.echo(f"classes: {len(plan.classes):,} ({', '.join(plan.classes[:5])}{more})")
    _show_ignored(plan.corpus.ignored)
    for split in dict.fromkeys(s.split for s in plan.shards):
        shards = [s for s in plan.shards if s.split == split]
        images, size = sum(s.samples for s in shards), format_bytes(sum(s.bytes for s in shards))
        typer.echo(f"{split}: {images:,} images, {_shards(len(shards))}, {size} ({shards[0].name} ...)")


def _show_ignored(ignored: dict[str, int]) -> None:
    if ignored:
        typer.echo("ignored: " + ", ".join(f"{n:,} {what}" for what, n in ignored.items()))


@data_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A finished data set.")],
    decode: Annotated[bool, typer.Option(help="Decode every image again.")] = True,
    workers: Annotated[int, typer.Option(min=0, help="Threads; 0: one a core.")] = 0,
) -> None:
    """Read every byte again: hashes, index against tar, images. Exits with 1 and lists what is damaged.

    Example:  mixer data verify shards/
    """
    from data_tools.verify import verify_dataset

    checked: list[int] = []
    damage = verify_dataset(folder, decode, workers, lambda shard: checked.append(shard.samples))
    for item in damage:
        typer.echo(f"{item.shard}  {item.key}  {item.what}".replace("    ", "  "), err=True)
    typer.echo(f"{_shards(len(checked))}, {sum(checked):,} images checked: {len(damage):,} problems")
    if damage:
        raise typer.Exit(1)


@data_app.command()
def inspect(
    target: Annotated[Path, typer.Argument(help="A data set's folder, or one of its tars.")],
    key: Annotated[str | None, typer.Argument(help="Show only this sample of a tar.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most samples to list.")] = 20,
) -> None:
    """Show what a data set, a shard or a sample holds.

    Examples:

      mixer data inspect shards/

      mixer data inspect shards/train-000000.tar cat/0001
    """
    from data_tools.inspection import describe_dataset, describe_shard

    for line in describe_dataset(target) if target.is_dir() else describe_shard(target, key, limit):
        typer.echo(line)
