"""`mixer data ...`: thin commands for finished data sets.

Only typer is imported here; everything else inside the command, so that `mixer --help` stays quick.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli_values import format_bytes, format_shards, parse_bad, parse_fraction, parse_size

data_app = typer.Typer(no_args_is_help=True, help="Look at, check, index and rearrange finished data sets.")

Storage = Annotated[
    list[str] | None,
    typer.Option(help="For URLs: key=value or a JSON object; repeatable. Or in MIXER_STORAGE_OPTIONS."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")]


class Duplicates(StrEnum):
    """What becomes of a key that came before."""

    error = "error"
    drop = "drop"
    rename = "rename"


class CopyOrder(StrEnum):
    """In which order samples are laid into the new shards."""

    source = "source"
    shuffled = "shuffled"


@data_app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A finished data set: a folder or a URL.")],
    decode: Annotated[bool, typer.Option(help="Decode every image again.")] = True,
    workers: Workers = 0,
    report: Annotated[Path | None, typer.Option(help="Write what is damaged here as well, as JSON lines.")] = None,
    storage_options: Storage = None,
) -> None:
    """Read every byte again: hashes, index against tar, labels, images. Exits with 1 and lists what is damaged.

    Examples:

      mixer data verify shards/

      mixer data verify s3://bucket/set --no-decode --report damage.jsonl
    """
    from data_tools.storage import parse_storage_options, write_atomic
    from data_tools.verify import verify_dataset

    checked: list[int] = []
    stores = parse_storage_options(storage_options or [])
    damage = verify_dataset(folder, decode, workers, lambda shard: checked.append(shard.samples), stores)
    for item in damage:
        _say("  ".join(part for part in item if part), err=True)
    if report is not None:
        write_atomic(report, "".join(json.dumps(item._asdict()) + "\n" for item in damage).encode())
    typer.echo(f"{format_shards(len(checked))}, {sum(checked):,} images checked: {len(damage):,} problems")
    if damage:
        raise typer.Exit(1)


@data_app.command()
def index(
    folder: Annotated[str, typer.Argument(help="Folder or URL with WebDataset tars, whoever made them.")],
    out: Annotated[
        Path | None, typer.Option(help="Write here instead and link to the tars: for places that are read-only.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of all tars; default: by their names (train, val, test).")] = None,
    label: Annotated[str, typer.Option(help="Where labels are: cls, json:FIELD or none.")] = "cls",
    classes: Annotated[Path | None, typer.Option(help="File with one class name a line.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image, or read its header only.")] = False,
    max_bad: Annotated[str, typer.Option(help="Bad images to leave out: a count, or 0.1%.")] = "0",
    workers: Workers = 0,
    storage_options: Storage = None,
) -> None:
    """Make WebDataset tars readable by position (exact resume), without rewriting them.

    Examples:

      mixer data index tars/

      mixer data index /readonly/laion/ --out ~/laion-index --label none

      mixer data index s3://public/laion --out ~/laion-index

      mixer data index tars/ --label json:class_name --classes names.txt
    """
    from data_tools.indexing import IndexOptions, index_dataset
    from data_tools.labels import read_classes
    from data_tools.storage import join, parse_storage_options

    names = tuple(read_classes(classes)) if classes is not None else None
    options = IndexOptions(folder, out, split, label, names, decode, parse_bad(max_bad), workers)
    manifest = index_dataset(options, storage_options=parse_storage_options(storage_options or []))
    for name, shards in manifest.splits.items():
        typer.echo(f"{name}: {manifest.samples(name):,} images, {format_shards(len(shards))}")
    bad, ignored = manifest.source["quarantined"], manifest.source["ignored"]
    for count, what in [(bad, "bad images left out"), *((n, what) for what, n in ignored.items())]:
        if count:
            typer.echo(f"{what}: {count:,}")
    typer.echo(f"finished: {join(str(out or folder), 'dataset.json')}")


@data_app.command()
def reshard(
    paths: Annotated[list[str], typer.Argument(metavar="SET... OUT", help="Finished sets, then the new one.")],
    shard_size: Annotated[str, typer.Option(help="Largest tar: 256MB, 1GiB, ...")] = "256MB",
    max_samples: Annotated[int, typer.Option(min=0, help="Most samples in a tar; 0: no limit.")] = 0,
    order: Annotated[CopyOrder, typer.Option(help="source: as it is, set after set.")] = CopyOrder.source,
    seed: Annotated[int, typer.Option(min=0, help="For the order and the split.")] = 0,
    val_fraction: Annotated[
        float | None, typer.Option(help="Pool all splits and split anew by hash of key; default: keep the splits.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Take only this split; repeatable.")] = None,
    classes: Annotated[
        str,
        typer.Option(
            help="Keep only these classes, numbered anew: names with commas, or @FILE. Samples with no label, or with "
            "several, are left out."
        ),
    ] = "",
    subset: Annotated[
        str, typer.Option(help="Keep this fraction, by hash of key; small ones lie in large ones.")
    ] = "1",
    min_side: Annotated[int, typer.Option(min=0, help="Keep images whose shorter side has these pixels.")] = 0,
    keys: Annotated[Path | None, typer.Option(help="Keep only the keys in this file, one a line.")] = None,
    drop_keys: Annotated[Path | None, typer.Option(help="Leave out the keys in this file.")] = None,
    duplicates: Annotated[Duplicates, typer.Option(help="A key that came before.")] = Duplicates.error,
    workers: Workers = 0,
    storage_options: Storage = None,
    work: Annotated[Path | None, typer.Option(help="Local folder for unfinished shards when OUT is a URL.")] = None,
) -> None:
    """Merge, filter, cut and split finished sets anew. Byte ranges are copied, nothing is decoded.

    Examples:

      mixer data reshard shards/ larger/ --shard-size 1GB

      mixer data reshard a/ b/ merged/ --order shuffled --duplicates drop

      mixer data reshard shards/ tenth/ --subset 10% --val-fraction 0.05

      mixer data reshard shards/ pets/ --classes cat,dog --min-side 64
    """
    from data_tools.reshard import ReshardOptions
    from data_tools.reshard import reshard as run
    from data_tools.storage import join, parse_storage_options

    *sources, out = paths
    if not sources:
        raise typer.BadParameter("give the sets and the output: SET... OUT")
    named = tuple(_lines(Path(classes[1:]))) if classes.startswith("@") else tuple(c for c in classes.split(",") if c)
    options = ReshardOptions(
        tuple(sources), out, parse_size(shard_size), max_samples, order.value, seed, val_fraction, tuple(split or ()),
        named, parse_fraction(subset), min_side, tuple(_lines(keys)) if keys is not None else None,
        tuple(_lines(drop_keys)) if drop_keys is not None else (), duplicates.value, workers,
        parse_storage_options(storage_options or []), work,
    )  # fmt: skip
    manifest = run(options)
    for name, shards in manifest.splits.items():
        size = format_bytes(sum(s.bytes for s in shards))
        typer.echo(f"{name}: {manifest.samples(name):,} images, {format_shards(len(shards))}, {size}")
    typer.echo(f"finished: {join(out, 'dataset.json')}")


def _lines(path: Path) -> list[str]:
    from data_tools.errors import UserError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: {e}") from e


@data_app.command()
def stats(
    folder: Annotated[str, typer.Argument(help="A finished data set: a folder or a URL.")],
    top: Annotated[int, typer.Option(min=0, help="Classes to list: this many of the largest.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, for programs.")] = False,
    storage_options: Storage = None,
) -> None:
    """Counts, sizes, class balance, mean and standard deviation, counted anew from the indexes.

    Examples:

      mixer data stats shards/

      mixer data stats shards/ --json
    """
    from data_tools.inspection import describe_stats
    from data_tools.stats import split_stats
    from data_tools.storage import parse_storage_options
    from data_tools.stores import load_manifest, open_store

    store = open_store(folder, parse_storage_options(storage_options or []))
    manifest = load_manifest(store)
    counted = {split: split_stats(store, shards)[0] for split, shards in manifest.splits.items()}
    if as_json:
        typer.echo(json.dumps({"splits": counted, "classes": manifest.classes}, indent=1))
        return
    for line in describe_stats(counted, manifest.classes, top):
        typer.echo(line)


@data_app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A data set's folder, or one of its tars; or a URL.")],
    key: Annotated[str | None, typer.Argument(help="Show only this sample of a tar.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most samples to list.")] = 20,
    save: Annotated[Path | None, typer.Option(help="With KEY: write the sample's members into this folder.")] = None,
    storage_options: Storage = None,
) -> None:
    """Show what a data set, a shard or a sample holds.

    Examples:

      mixer data inspect shards/

      mixer data inspect shards/train-000000.tar

      mixer data inspect shards/train-000000.tar cat/0001 --save here/
    """
    from data_tools.inspection import describe_dataset, describe_shard
    from data_tools.storage import parse_storage_options
    from data_tools.stores import open_store

    stores = parse_storage_options(storage_options or [])
    if not target.endswith(".tar"):
        lines = describe_dataset(open_store(target, stores))
    else:
        folder, _, name = target.rpartition("/")
        lines = describe_shard(open_store(folder or ".", stores), name, key, limit, save)
    for line in lines:
        _say(line)


def _say(line: str, err: bool = False) -> None:
    """Keys in others' tars need not be valid UTF-8."""
    typer.echo(line.encode(errors="backslashreplace").decode(), err=err)
