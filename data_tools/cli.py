"""`mixer shard`: a thin command over the functions of this package (`mixer data ...` is in `cli_data`).

Only typer is imported here; everything else inside the command, so that `mixer --help` stays quick.
"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.cli_data import data_app
from data_tools.cli_values import format_bytes, format_seconds, format_shards, parse_bad, parse_size

if TYPE_CHECKING:
    from data_tools.manifest import DatasetManifest
    from data_tools.plan import ShardPlan

__all__ = ["data_app", "format_bytes", "parse_bad", "parse_size", "shard"]


class EngineChoice(StrEnum):
    """Who runs the packing tasks."""

    local = "local"
    ray = "ray"
    slurm = "slurm"


class OrderChoice(StrEnum):
    """In which order samples are laid into shards."""

    auto = "auto"
    shuffled = "shuffled"
    source = "source"


class DedupeChoice(StrEnum):
    """Whether images with the same bytes are kept once."""

    off = "off"
    exact = "exact"


def shard(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... OUT",
            help="Image folders, .csv/.tsv/.jsonl/.parquet manifests, tar or zip archives, folders of archives or of "
            "Parquet files, here or at URLs; then the folder for the shards, made if missing, or a URL "
            "(s3://bucket/set).",
        ),
    ],
    val_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the images for split val, by hash of their path.")
    ] = 0.0,
    shard_size: Annotated[str, typer.Option(help="Largest tar: 256MB, 1GiB, ...")] = "256MB",
    max_samples: Annotated[int, typer.Option(min=0, help="Most images in a tar; 0: no limit.")] = 0,
    order: Annotated[
        OrderChoice,
        typer.Option(
            help="shuffled: classes are mixed over all shards; source: as listed; auto: source for archives and "
            "Parquet files with images, else shuffled."
        ),
    ] = OrderChoice.auto,
    seed: Annotated[int, typer.Option(min=0, help="For the order and the split.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    verify: Annotated[bool, typer.Option(help="Decode every image, or read its header only.")] = True,
    max_bad: Annotated[str, typer.Option(help="Bad images to accept: a count, or 0.1%.")] = "0",
    max_pixels: Annotated[int, typer.Option(min=1, help="Quarantine larger images (width x height).")] = 10**8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard the shards of another plan or corpus in OUT.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    engine: Annotated[
        EngineChoice, typer.Option(help="Who packs: this machine's cores, Ray, or a SLURM array.")
    ] = EngineChoice.local,
    num_tasks: Annotated[int, typer.Option(min=0, help="Tasks of the array; 0: one a shard, at most 100.")] = 0,
    task_id: Annotated[
        int | None, typer.Option(min=0, help="Run only this part of the plan in OUT (needs --num-tasks).")
    ] = None,
    sbatch: Annotated[str, typer.Option(help='More arguments for sbatch: "--partition=cpu --time=2:00:00".')] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the SLURM array, then finalise.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write the plan to OUT, pack nothing.")] = False,
    finalize: Annotated[
        bool, typer.Option("--finalize", help="Only the last step: from packed shards to dataset.json.")
    ] = False,
    storage_options: Annotated[
        list[str] | None,
        typer.Option(help="For URLs: key=value or a JSON object; repeatable. Or in MIXER_STORAGE_OPTIONS."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Local folder for plan and unfinished shards when OUT is a URL.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="File with one class name a line, in order of their numbers; others are refused."),
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(help="Column with paths or URLs; default: path, file, url, ...")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Parquet column with image bytes.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the label, or with several; default: label, labels, class.")
    ] = None,
    label_from_folder: Annotated[
        bool,
        typer.Option("--label-from-folder", help="The class is the folder, or the archive, that an image lies in."),
    ] = False,
    header: Annotated[
        str | None, typer.Option(help="Column names of a CSV without header: Bucket,Key,Size,... (S3 Inventory).")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column whose equal values stay in one split (patient, product, video).")
    ] = None,
    dedupe: Annotated[
        DedupeChoice, typer.Option(help="exact: images with the same bytes are kept once (reads everything once more).")
    ] = DedupeChoice.off,
    dedupe_against: Annotated[
        list[str] | None, typer.Option(help="A finished data set (or its URL) whose images are kept out; repeatable.")
    ] = None,
    resize: Annotated[int, typer.Option(min=0, help="Shrink to this shorter side in pixels; 0: keep.")] = 0,
    encode: Annotated[str, typer.Option(help="keep the bytes, or jpeg:90, webp:85.")] = "keep",
) -> None:
    """Pack a corpus of images into WebDataset shards; run it again after any interruption.

    Subfolders are classes (photos/cat/1.jpg), or splits of classes
    (photos/train/cat/1.jpg); a flat folder has no labels. Archives are read as
    they are. Image bytes are kept unless --resize or --encode say otherwise.
    Bad images are listed in OUT/quarantine.jsonl and never enter a shard.

    Examples:

      mixer shard photos/ shards/ --val-fraction 0.02

      mixer shard labels.csv shards/ --shard-size 1GB --max-bad 0.1%

      mixer shard photos/ shards/ --dry-run

      mixer shard ILSVRC2012_img_train.tar shards/ --resize 256 --encode jpeg:90

      mixer shard products.parquet more/ shards/ --group-by product --dedupe exact

      mixer shard photos/ s3://bucket/set --storage-options endpoint_url=http://host:9000

      mixer shard photos/ shards/ --engine slurm --num-tasks 16 --sbatch "--time=2:00:00"

      mixer shard --finalize shards/
    """
    from data_tools import engines
    from data_tools.progress import ProgressPrinter
    from data_tools.sources import Columns
    from data_tools.storage import parse_storage_options

    stores = parse_storage_options(storage_options or [])
    *sources, out = paths
    if finalize:
        _one_place(paths, "--finalize")
        _show_result(engines.finalize_corpus(out, parse_bad(max_bad), stores, work), out)
        return
    if task_id is not None:
        _one_place(paths, "--task-id")
        with ProgressPrinter() as printer:
            engines.run_part(engines.Output.at(out, stores, work), task_id, num_tasks, workers, printer)
        return
    if not sources:
        raise typer.BadParameter("give the corpus and the output: SOURCE... OUT")
    options = engines.ShardOptions(
        sources, out, val_fraction, parse_size(shard_size), max_samples, order.value, seed, workers, verify,
        max_pixels, parse_bad(max_bad), overwrite, engine.value, num_tasks, tuple(shlex.split(sbatch)), stores, work,
        Columns(path_column, image_column, label_column, None, tuple((header or "").split(",")) if header else (),
                label_from_folder),
        classes, group_by, dedupe.value, tuple(dedupe_against or ()), resize, encode,
    )  # fmt: skip
    if dry_run:
        plan, seconds = engines.preview_corpus(options)
        _show_plan(plan)
        typer.echo(f"packing takes about {format_seconds(seconds)} on this machine")
        return
    if plan_only:
        _show_plan(engines.plan_into(options))
        return
    if engine is EngineChoice.slurm and not wait:
        job = engines.submit_corpus(options)
        typer.echo(f"SLURM job {job} packs it; when it has ended: mixer shard --finalize {shlex.quote(out)}")
        return
    with ProgressPrinter() as printer:
        manifest = engines.shard_corpus(options, printer)
    _show_result(manifest, out)


def _one_place(paths: list[str], option: str) -> None:
    if len(paths) != 1:
        raise typer.BadParameter(f"{option} takes the output alone: mixer shard {option} ... OUT")


def _show_result(manifest: DatasetManifest, out: str) -> None:
    from data_tools.storage import join

    for split, shards in manifest.splits.items():
        size = format_bytes(sum(s.bytes for s in shards))
        typer.echo(f"{split}: {manifest.samples(split):,} images, {format_shards(len(shards))}, {size}")
    if manifest.classes is not None:
        typer.echo(f"classes: {len(manifest.classes):,}")
    _show_ignored(manifest.source["ignored"])
    bad = manifest.source["quarantined"]
    if manifest.source.get("duplicates"):
        typer.echo(f"duplicates left out: {manifest.source['duplicates']:,}")
    typer.echo(f"bad images: {bad:,}" + (f", listed in {join(out, 'quarantine.jsonl')}" if bad else ""))
    typer.echo(f"finished: {join(out, 'dataset.json')}")


def _show_plan(plan: ShardPlan) -> None:
    typer.echo(f"{plan.corpus.samples:,} images, {format_bytes(plan.corpus.bytes)}")
    if plan.classes is not None:
        more = ", ..." if len(plan.classes) > 5 else ""
        typer.echo(f"classes: {len(plan.classes):,} ({', '.join(plan.classes[:5])}{more})")
    _show_ignored(plan.corpus.ignored)
    _show_left_out(plan.corpus.duplicates, plan.corpus.held_out)
    for split in dict.fromkeys(s.split for s in plan.shards):
        shards = [s for s in plan.shards if s.split == split]
        images, size = sum(s.samples for s in shards), format_bytes(sum(s.bytes for s in shards))
        typer.echo(f"{split}: {images:,} images, {format_shards(len(shards))}, {size} ({shards[0].name} ...)")


def _show_left_out(duplicates: int, held_out: int) -> None:
    if duplicates or held_out:
        typer.echo(f"left out: {duplicates:,} duplicates, {held_out:,} that other sets hold (duplicates.jsonl)")


def _show_ignored(ignored: dict[str, int]) -> None:
    if ignored:
        typer.echo("ignored: " + ", ".join(f"{n:,} {what}" for what, n in ignored.items()))
