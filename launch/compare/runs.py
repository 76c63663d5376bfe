"""`mixer compare runs`: accuracy and loss of run folders, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="Folder for runs.md, runs.png and runs.json.")] = Path("compare"),
) -> None:
    """Accuracy and loss against samples seen and against device-hours, of any number of runs.

    Steps that were undone by a crash or a rollback are in no curve, but in the
    device-hours: they were paid for.

    Examples:

      mixer compare runs runs/b16 runs/vit_b16

      mixer compare runs runs/*/ --out report
    """
    from pipeline.compare.chart import require_matplotlib
    from pipeline.compare.runs import compare_runs

    require_matplotlib()
    typer.echo(compare_runs(folders, out))
    typer.echo(f"\nwritten: {out / 'runs.md'}, {out / 'runs.png'}, {out / 'runs.json'}")
