"""`mixer compare scaling` and `mixer compare permutation`: studies, which are grids of trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.errors import UserError

if TYPE_CHECKING:
    from pipeline.compare.study import Result
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
) -> None:
    """What each model gains from more data, at equal steps (paper, figure 2 right).

    Trains every model on nested subsets of one set, probes its features with a
    few images of each class, and writes one table and one picture. Started again
    it goes on: finished runs are kept, the interrupted ones resume.

    Examples:

      mixer compare scaling cifar_scaling data.train=CIFAR --out scaling --jobs 2

      mixer compare scaling --out scaling                   # goes on with it

      mixer compare scaling --model Mixer=mixer_b16_jft --model ViT="vit_b16_i1k
      train.global_batch_size=1024" data.train=/shards eval.fewshot=/imagenet
    """
    from pipeline.compare.scaling import FRACTIONS, on_share, parse_fractions, report_scaling

    given = {"models": models, "conditions": parse_fractions(fractions) if fractions else None, "shots": shots}
    _run("scaling", "fractions", FRACTIONS, study, overrides, out, given, on_share, report_scaling, jobs, nproc)


def permutation(
    study: Study = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("compare/permutation"),
    models: Models = None,
    shots: Shots = None,
    jobs: Jobs = 1,
    nproc: Nproc = None,
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

    given = {"models": models, "conditions": None, "shots": shots}
    _run(
        "permutation", "permutations", CONDITIONS, study, overrides, out, given, with_permutation, report_permutation,
        jobs, nproc,
    )  # fmt: skip


def _run(
    name: str,
    axis: str,
    conditions: Sequence[str],
    study: str | None,
    overrides: list[str] | None,
    out: Path,
    given: dict[str, Any],
    under: Callable[[Config, str], Config],
    report: Callable[[Sequence[Result], Path], str],
    jobs: int,
    nproc: int | None,
) -> None:
    from launch.study import run_study
    from pipeline.compare.chart import require_matplotlib
    from pipeline.compare.study import SHOTS, Plan, make_cells, parse_models, read_results, read_study, settle
    from pipeline.run import RunFolder

    require_matplotlib()
    settings = list(overrides or [])
    if study and "=" in study:
        study, settings = None, [study, *settings]
    before = Plan.stored(out, name)
    if not study and not given["models"] and before is None:
        raise UserError(
            f"{out} holds no study to go on with: give a study's name or file, or models with --model "
            f"(see `mixer compare {name} --help`)"
        )
    if study or given["models"] or before is None:
        file = read_study(study, name, axis) if study else {}
        plan = Plan(
            name,
            parse_models(given["models"]) if given["models"] else file.get("models", {}),
            given["conditions"] or [str(c) for c in file.get(axis, conditions)],
            file.get("settings", []),
            _shots(given["shots"]) if given["shots"] else list(file.get("shots", SHOTS)),
            settings,
        )
    else:
        plan = Plan(
            name,
            before.models,
            given["conditions"] or before.conditions,
            before.settings,
            _shots(given["shots"]) if given["shots"] else before.shots,
            [*before.overrides, *settings],
        )
    if not plan.models:
        raise UserError(f"{study}: names no models, and none are given with --model")
    cells = make_cells(plan, out, under)

    def tell() -> str | None:
        results = read_results(cells)
        return report(results, out) if results else None

    folder = RunFolder(out)  # one study at a time; the lock goes with the object
    folder.lock()
    settle(plan, cells, out)
    code = run_study(cells, out, jobs, nproc, tell)
    if (out / f"{name}.md").exists():
        typer.echo(f"written: {', '.join(str(out / f'{name}.{kind}') for kind in ('md', 'png', 'json'))}")
    if code:
        command = f"mixer compare {name} --out {out}"
        typer.echo(f"saved before the end; go on with `{command}`")
    raise typer.Exit(code)


def _shots(text: str) -> list[int]:
    numbers = text.replace(" ", "").split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise UserError(f"--shots {text}: must be numbers above 0, such as 1,5,10,25")
    return sorted({int(n) for n in numbers})
