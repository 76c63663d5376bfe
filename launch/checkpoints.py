"""`mixer checkpoint ...`: what is there, is it whole, what is in it, how do two differ, what can go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.errors import UserError

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at and tidy up a run's checkpoints.")

Run = Annotated[str, typer.Argument(help="A run folder.")]
Which = Annotated[str, typer.Argument(help="last, best or step-N.")]


@checkpoint_app.command("list")
def list_(run: Run) -> None:
    """The checkpoints of a run: size, who wrote them, how they were evaluated.

    Example: mixer checkpoint list runs/b16
    """
    from pipeline.checkpoint.tools import listing

    rows = listing(_root(run))
    if not rows:
        raise UserError(f"{_root(run)} holds no checkpoint: the run has not saved yet")
    typer.echo(f"{'step':>10}  {'size':>9}  {'files':>5}  {'written by':<12}  {'top-1':>7}")
    for row in rows:
        score = f"{row.metrics['top1']:.2%}" if "top1" in row.metrics else ""
        note = "  best" if row.best else ""
        note += f"  DAMAGED: {row.damage}" if row.damage else ""
        writer = f"{row.strategy}/{row.world_size}"
        typer.echo(f"{row.step:>10}  {row.bytes / 1e6:>6.1f} MB  {row.files:>5}  {writer:<12}  {score:>7}{note}")


@checkpoint_app.command()
def verify(run: Run, which: Annotated[str, typer.Argument(help="last, best, step-N or all.")] = "all") -> None:
    """Read every byte and compare with the manifest's hashes; exit code 1 if anything is damaged.

    Example: mixer checkpoint verify runs/b16 last
    """
    from pipeline.checkpoint.manager import choose, committed_steps, step_folder
    from pipeline.checkpoint.tools import verify as check

    root = _root(run)
    folders = [step_folder(root, s) for s in committed_steps(root)] if which == "all" else [choose(root, which)]
    if not folders:
        raise UserError(f"{root} holds no checkpoint: the run has not saved yet")
    bad = 0
    for folder in folders:
        damage = check(folder)
        bad += damage is not None
        typer.echo(f"{folder.name}: {damage or 'whole'}")
    if bad:
        raise UserError(f"{bad} of {len(folders)} checkpoints are damaged; a resume leaves them aside")


@checkpoint_app.command()
def show(
    run: Run,
    which: Which = "last",
    digest: Annotated[bool, typer.Option("--digest", help="Hash all values, whoever wrote which piece.")] = False,
) -> None:
    """What one checkpoint holds: state, files, tensors.

    Example: mixer checkpoint show runs/b16 best --digest
    """
    import json
    from math import prod

    from pipeline.checkpoint.layout import CheckpointReader
    from pipeline.checkpoint.manager import choose

    reader = CheckpointReader(choose(_root(run), which))
    manifest = reader.manifest
    typer.echo(f"{reader.folder}")
    typer.echo(f"written by  {json.dumps(manifest.written_by)}")
    typer.echo(f"metrics     {json.dumps(manifest.metrics)}")
    typer.echo(f"state       {json.dumps(reader.state())}")
    for file in manifest.files:
        typer.echo(f"file        {file.name}  {file.bytes:,} bytes  xxh3 {file.hash}  {len(file.pieces)} pieces")
    for kind in sorted({k for _, k in manifest.tensors}):
        shapes = [s for (_, k), s in manifest.tensors.items() if k == kind]
        typer.echo(f"{kind:<11} {len(shapes)} tensors, {sum(prod(s) for s in shapes):,} elements")
    if digest:
        typer.echo(f"digest      {reader.digest()}")


@checkpoint_app.command()
def diff(
    run: Run,
    first: Which,
    second: Which,
    other: Annotated[str | None, typer.Option(help="Take the second from this run.")] = None,
) -> None:
    """How the tensors of two checkpoints differ; says so if they are equal bit for bit.

    Example: mixer checkpoint diff runs/a step-1000 step-1000 --other runs/b
    """
    from pipeline.checkpoint.layout import CheckpointReader
    from pipeline.checkpoint.manager import choose
    from pipeline.checkpoint.tools import differences

    a = CheckpointReader(choose(_root(run), first))
    b = CheckpointReader(choose(_root(other or run), second))
    count = 0
    for d in differences(a, b):
        count += 1
        typer.echo(f"{d.kind:<10} {d.name:<44} {d.note or f'largest {d.largest:.3e}  relative {d.relative:.3e}'}")
    total = len(a.manifest.tensors)
    typer.echo(f"{count} of {total} tensors differ" if count else f"all {total} tensors are equal, bit for bit")


@checkpoint_app.command()
def prune(
    run: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="The newest so many stay.")] = 1,
    keep_every: Annotated[int, typer.Option(min=0, help="And every multiple of so many steps; 0: none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove checkpoints. The best one and the newest whole one always stay.

    Example: mixer checkpoint prune runs/b16 --keep-last 2 --keep-every 50000
    """
    from pipeline.checkpoint.manager import Retention
    from pipeline.checkpoint.tools import prune as remove

    gone = remove(_root(run), Retention(keep_last, keep_every or None), dry_run)
    word = "would remove" if dry_run else "removed"
    typer.echo(f"{word} {len(gone)}: {', '.join(f'step-{s}' for s in gone)}" if gone else "nothing to remove")


def _root(run: str) -> Path:
    from pipeline.checkpoint.place import checkpoint_root
    from pipeline.cli import existing_run
    from pipeline.config import load_config

    folder = existing_run(run)
    return checkpoint_root(load_config(str(folder.config), [f"run.dir={folder.path}"]).config)
