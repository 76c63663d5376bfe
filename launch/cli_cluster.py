"""`mixer launch slurm`, `mixer launch torchrun`, and `mixer resume` of a run that was submitted."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from data_tools.errors import UserError

Config = Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings: key=value ...", show_default=False)]
Allow = Annotated[str, typer.Option(help="Keys that a resumed run may change although they change its meaning.")]
Nodes = Annotated[str | None, typer.Option(help="How many, or MIN-MAX: as many as SLURM has, also after a requeue.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the job script, submit nothing.")]


def launch_slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="And processes a node. Default: launch.*")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one job, as SLURM takes it: 24:00:00.")] = None,
    profile: Annotated[str | None, typer.Option(help="What your cluster wants: a name or a YAML file.")] = None,
    dry_run: DryRun = False,
    inside: Annotated[bool, typer.Option("--inside", help="Run in this allocation (salloc) instead.")] = False,
    chain: Annotated[int, typer.Option(min=1, help="So many jobs, one after the other, until finished.")] = 1,
    then_eval: Annotated[bool, typer.Option("--then-eval", help="A dependent job evaluates the result.")] = False,
    template: Annotated[Path | None, typer.Option(help="A job script of your own (jinja2).")] = None,
    allow: Allow = "",
) -> None:
    """Submit a training that saves before its time limit, requeues and resumes by itself.

    Code, settings and versions are frozen into run.dir; requeued jobs run those.

    Examples:

      mixer launch slurm mixer_b16_i1k data.train=/shards --nodes 6-8 --gpus-per-node 8 --time 24:00:00

      mixer launch slurm digits data.train=synthetic --profile my_cluster.yaml --dry-run

      salloc --nodes=2 mixer launch slurm digits data.train=synthetic --inside
    """
    from launch.profiles import load_profile
    from launch.slurm import Submission
    from pipeline.checkpoint.place import checkpoint_root
    from pipeline.config import load_config
    from pipeline.run import RunFolder
    from pipeline.takeover import permitted_changes

    chosen = load_profile(profile)
    options = {"launch.nodes": nodes, "launch.gpus_per_node": gpus_per_node, "launch.time": time}
    typed = [f"{key}={value}" for key, value in options.items() if value is not None]
    settings = [*chosen.settings(), *(overrides or []), *typed]
    loaded = load_config(config, settings).config
    _absolute_run(loaded)
    submission = Submission(loaded, chosen, allow, chain, then_eval, template)
    if dry_run:
        typer.echo(submission.script(), nl=False)
        return
    permitted_changes(RunFolder(loaded.run.dir, checkpoint_root(loaded)), loaded, _keys(allow))
    if inside:
        raise typer.Exit(submission.inside())
    # A run of its own gets today's code; one that goes on keeps what it was submitted with
    _report(submission, submission.submit(by="user", refresh=True))


def resubmit(
    run: str, overrides: list[str], nodes: str | None, allow: str, dry_run: bool = False, refresh: bool = False
) -> None:
    """Submits a run again that was submitted before, with what is changed now."""
    from launch.profiles import parse_profile
    from launch.slurm import Submission, kept_template
    from pipeline.checkpoint.place import checkpoint_root
    from pipeline.config import load_config
    from pipeline.run import RunFolder
    from pipeline.takeover import permitted_changes

    folder = Path(run).absolute()
    old = json.loads((folder / "launch" / "submission.json").read_text())
    typed = [f"launch.nodes={nodes}"] if nodes else []
    settings = [f"run.dir={folder}", *overrides, *typed]
    loaded = load_config(str(folder / "launch" / "config.yaml"), settings).config
    profile = parse_profile({k: v for k, v in old["profile"].items() if v})
    submission = Submission(
        loaded, profile, allow, old["chain"], old["then_eval"], kept_template(folder), old["directory"]
    )
    if dry_run:
        typer.echo(submission.script(), nl=False)
        return
    permitted_changes(RunFolder(folder, checkpoint_root(loaded)), loaded, _keys(allow))
    _report(submission, submission.submit(by="resume", refresh=refresh))


def was_submitted(run: str) -> bool:
    """Does `mixer resume` of this run mean another job? Not inside one, and not where there is no SLURM."""
    inside = "SLURM_JOB_ID" in os.environ or "RANK" in os.environ
    return (Path(run) / "launch" / "submission.json").exists() and not inside and shutil.which("sbatch") is not None


def launch_torchrun(
    config: Config,
    overrides: Overrides = None,
    nnodes: Annotated[str, typer.Option(help="Hosts, or MIN:MAX: a lost host shrinks the job.")] = "1",
    rdzv_endpoint: Annotated[str, typer.Option(help="HOST:PORT of the first host, which must stay.")] = "",
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes a host. Default: one a GPU.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Run here, as this host. Default: print.")] = None,
    rdzv_id: Annotated[str, typer.Option(help="Tells one job from another at the same endpoint.")] = "mixer",
    allow: Allow = "",
) -> None:
    """Train on several hosts without a scheduler. Without --node-rank: print the command of each host.

    Examples:

      mixer launch torchrun digits data.train=/shards run.dir=/runs/d --nnodes 2:3 --rdzv-endpoint host0:29500

      mixer launch torchrun digits data.train=/shards --nnodes 2:3 --rdzv-endpoint host0:29500 --node-rank 0
    """
    from launch.torchrun import Host, parse_nnodes
    from pipeline.config import load_config

    low, high = parse_nnodes(nnodes)
    host, _, port = rdzv_endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise UserError("--rdzv-endpoint: give HOST:PORT of the first host, a name that all hosts resolve")
    if not re.fullmatch(r"[\w.+-]+", rdzv_id):
        raise UserError(f"--rdzv-id: {rdzv_id!r} names a folder of logs too: letters, digits and . _ + - only")
    loaded = load_config(config, overrides or []).config
    _absolute_run(loaded)
    if node_rank is None:
        command = ["mixer", "launch", "torchrun", config, *(overrides or []), "--nnodes", nnodes,
                   "--rdzv-endpoint", rdzv_endpoint, *(["--nproc", str(nproc)] if nproc else []),
                   *(["--allow", allow] if allow else []), "--rdzv-id", rdzv_id]  # fmt: skip
        for rank in range(high):
            typer.echo(f"# on {'the first host, ' + host if rank == 0 else f'host {rank}'}")
            typer.echo(shlex.join([*command, "--node-rank", str(rank)]))
        return
    if node_rank >= high:
        raise UserError(f"--node-rank must be below {high}: --nnodes is {nnodes}")
    if nproc is None:
        from launch.local import default_nproc

        nproc = loaded.launch.nproc or default_nproc()
    arguments = ["train", config, *(overrides or []), *(["--allow", allow] if allow else [])]
    raise typer.Exit(Host(loaded, arguments, (low, high), node_rank, rdzv_endpoint, rdzv_id, nproc).launch())


def _absolute_run(config: object) -> None:
    config.run.dir = str(Path(config.run.dir).expanduser().absolute())  # type: ignore[attr-defined]


def _keys(allow: str) -> set[str]:
    return {key for key in allow.split(",") if key}


def _report(submission: object, jobs: list[str]) -> None:
    run = submission.run.path  # type: ignore[attr-defined]
    typer.echo(f"submitted: job {', '.join(jobs)}; run folder {run}")
    typer.echo(f"  mixer status {run}    mixer logs {run} --follow    mixer stop {run}")
