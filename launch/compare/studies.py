"""`mixer compare scaling` and `mixer compare permutation`: studies, which are grids of trainings."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.errors import UserError

if TYPE_CHECKING:
    from pipeline.compare.study import Plan, Result
    from pipeline.config import Config

Study = Annotated[
    str | None, typer.Argument(help="A study's name, or the path of a YAML file; not needed to go on with one.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings of all runs: key=value ...", show_default=False)]
Models = Annotated[
    list[str] | None, typer.Option("--model", help='RECIPE, or NAME="RECIPE key=value ...". Once a model.')
]
Shots = Annotated[str | None, typer.Option(help="Images of each class. Default: 1,5,10,25.")]
Jobs = Annotated[int, typer.Option(min=1, help="Trainings side by side on this machine.")]
Prepare = Annotated[
    bool, typer.Option("--prepare", help="Write the runs' configurations and print the command of each: for a cluster.")
]
Nproc = Annotated[int | None, typer.Option(min=1, help="Processes of each training. Default: one a GPU.")]


def scaling(
    study: Study = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("compare/scaling"),
    models: Models = None,
    fractions: Annotated[str | None, typer.Option(help="Percent of the set. Default: 3,10,30,100.")] = None,
    shots: Shots = None,
    jobs: Jobs = 1,
    nproc: Nproc = None,
    prepare: Prepare = False,
) -> None:
    """What each model gains from more data, at equal steps (paper, figure 2 right).

    Trains every model on nested subsets of one set, probes its features with a
    few images of each class, and writes one table and one picture. Started again
    it goes on: finished runs are kept, the interrupted ones resume. --prepare leaves
    the training to a cluster.

    Examples:

      mixer compare scaling cifar_scaling data.train=CIFAR --out scaling --jobs 2

      mixer compare scaling --out scaling                   # goes on with it

      mixer compare scaling jft_scaling data.train=CORPUS eval.fewshot=IMAGENET --out /runs/fig2 --prepare

      mixer compare scaling --model Mixer=mixer_b16_i1k --model ViT=vit_b16_i1k data.train=SHARDS
    """
    from pipeline.compare.scaling import FRACTIONS, on_share, parse_fractions, report_scaling

    asked = _Asked("scaling", study, overrides, models, shots, parse_fractions(fractions) if fractions else None)
    plan = asked.plan(out, FRACTIONS)
    plan = replace(plan, conditions=parse_fractions(",".join(plan.conditions)))  # a file's may be numbers
    _run(plan, out, on_share, report_scaling, jobs, nproc, prepare)


def permutation(
    study: Study = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("compare/permutation"),
    models: Models = None,
    shots: Shots = None,
    jobs: Jobs = 1,
    nproc: Nproc = None,
    prepare: Prepare = False,
) -> None:
    """How networks learn from images whose pixels are permuted (paper, figure 4).

    Three trainings a model: on the images as they are; with patches permuted, and
    the pixels inside of every patch; with all pixels permuted. One table, and
    the curves as a picture. Started again it goes on.

    Examples:

      mixer compare permutation cifar_permutation data.train=CIFAR --out permutation

      mixer compare permutation --model mixer_b16_i1k --model bit_r50_i1k data.train=/shards
    """
    from pipeline.compare.permutation import CONDITIONS, report_permutation, with_permutation

    asked = _Asked("permutation", study, overrides, models, shots, None)
    _run(asked.plan(out, CONDITIONS), out, with_permutation, report_permutation, jobs, nproc, prepare)


@dataclass(frozen=True)
class _Asked:
    """The command line of a study."""

    kind: str
    study: str | None
    overrides: list[str] | None
    models: list[str] | None
    shots: str | None
    conditions: list[str] | None

    def plan(self, out: Path, conditions: Sequence[str]) -> Plan:
        """Where neither a study nor models are given: that of the folder. conditions: if none are named anywhere.

        Raises:
            UserError: there is no study to go on with, or nothing to train.
        """
        from pipeline.compare.study import AXIS, SHOTS, Plan, parse_models, read_study

        study, overrides = self.study, list(self.overrides or [])
        if study and "=" in study:
            study, overrides = None, [study, *overrides]
        shots = _shots(self.shots) if self.shots else None
        before = Plan.stored(out, self.kind)
        if not study and not self.models:
            if before is None:
                raise UserError(
                    f"{out} holds no study to go on with: give a study's name or file, or models with --model "
                    f"(see `mixer compare {self.kind} --help`)"
                )
            return replace(
                before,
                conditions=self.conditions or before.conditions,
                shots=shots or before.shots,
                overrides=[*before.overrides, *overrides],
            )
        file = read_study(study, self.kind) if study else {}
        models = parse_models(self.models) if self.models else file.get("models")
        if not models:
            raise UserError(f"{study}: names no models, and none are given with --model")
        return Plan(
            self.kind,
            models,
            self.conditions or [str(c) for c in file.get(AXIS[self.kind], conditions)],
            file.get("settings", []),
            shots or list(file.get("shots", SHOTS)),
            overrides,
        )


def _run(
    plan: Plan,
    out: Path,
    under: Callable[[Config, str], Config],
    report: Callable[[Sequence[Result], Path], str],
    jobs: int,
    nproc: int | None,
    prepare: bool,
) -> None:
    from launch.study import run_study
    from pipeline.compare.chart import require_matplotlib
    from pipeline.compare.study import config_file, make_cells, read_results, settle
    from pipeline.run import RunFolder

    require_matplotlib()
    cells = make_cells(plan, out, under)

    def tell() -> str | None:
        results = read_results(cells)
        return report(results, out) if results else None

    folder = RunFolder(out)  # one study at a time; the lock goes with the object
    folder.lock()
    settle(plan, cells, out)
    if prepare:
        for cell in cells:
            file = shlex.quote(str(config_file(out, cell.name)))
            typer.echo(f"mixer launch slurm {file} --nodes NODES --gpus-per-node GPUS")
        typer.echo(f"\nwhen they are finished, the table and the picture: mixer compare {plan.study} --out {out}")
        return
    code = run_study(cells, out, jobs, nproc, tell)
    name = plan.study
    if (out / f"{name}.md").exists():
        typer.echo(f"written: {', '.join(str(out / f'{name}.{kind}') for kind in ('md', 'png', 'json'))}")
    if code:
        typer.echo(f"saved before the end; go on with `mixer compare {name} --out {out}`")
    raise typer.Exit(code)


def _shots(text: str) -> list[int]:
    numbers = text.replace(" ", "").split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(f"--shots {text}: must be numbers above 0, such as 1,5,10,25")
    return sorted({int(n) for n in numbers})
