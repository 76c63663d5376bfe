"""`mixer picture`: what a Mixer has learned, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def picture(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN|WEIGHTS", help="A run, a checkpoint, an .npz or .safetensors file, a timm folder."),
    ],
    checkpoint: Annotated[str, typer.Option(help="Of a run: last, best or step-N.")] = "last",
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights instead.")] = False,
    layers: Annotated[str, typer.Option(help="1-3 or 1,8; the first is 1.")] = "all",
    grid: Annotated[str | None, typer.Option(help="ROWSxCOLS of the tokens, where they are no square.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: RUN/pictures/CHECKPOINT.")] = None,
) -> None:
    """Draw token-mixing weights and stem filters, as in the paper's figures 5 to 7.

    A tile is a hidden unit: its weights over the tokens, as these lie in the
    image. Low frequencies first; beside each unit stands its closest inverse.

    Examples:

      mixer picture runs/b16 --layers 1-3

      mixer picture runs/b16 --checkpoint step-20000 --ema

      mixer picture Mixer-B_16.npz --out b16-pictures
    """
    from pipeline.weights.commands import run_picture

    raise typer.Exit(run_picture(source, out, checkpoint, ema, layers, grid))
