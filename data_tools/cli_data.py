"""`mixer data ...`: thin commands for finished data sets.

Only typer is imported here; everything else inside the command, so that `mixer --help` stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli_values import format_shards

data_app = typer.Typer(no_args_is_help=True, help="Look at, check, index and rearrange finished data sets.")

Storage = Annotated[
    list[str] | None,
    typer.Option(help="For URLs: key=value or a JSON object; repeatable.", envvar="MIXER_STORAGE_OPTIONS"),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")]


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
    typer.echo(f"{format_shards(len(checked))}, {sum(checked):,} images checked: {len(damage):,} problems")
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
