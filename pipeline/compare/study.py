"""A study: a grid of trainings, each of some models under each of some conditions, that are compared at the end.

    OUT/ study.json          what was asked for; `mixer compare STUDY --out OUT` alone goes on with it
         configs/RUN.yaml    the whole configuration of each run
         runs/RUN/           the runs: ordinary ones, for `mixer status`, `mixer eval`, `mixer compare runs`, ...
         logs/RUN.log        what their commands said

This module says what belongs to a study, refuses another one in the same folder, and reads what its runs have reached;
`launch.study` runs them. What the conditions are and how they are reported is for the study's own module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import UserError
from pipeline.compare.runs import History, Point, read_history
from pipeline.config import Config, Duration, diff_configs, load_config, to_yaml, validate
from pipeline.run import RunFolder, replace_file

VERSION = 1
SHOTS = (1, 5, 10, 25)
AXIS = {"scaling": "fractions", "permutation": "permutations"}  # study -> what its conditions are called

# What does not change a result: may differ when a study is gone on with
_FREE = re.compile(
    r"run\.dir|data\.(num_workers|read|read_timeout|cache_dir|cache_size|storage_options)|launch\..*|logging\..*"
    r"|health\..*|checkpoint\.(?!best).*|train\.(micro_batch_size|strategy|shard_size|reshard_after_forward|offload"
    r"|compile|activation_checkpointing)"
)
_DURATIONS = ("train.duration", "scheduler.warmup", "eval.every", "checkpoint.every", "checkpoint.keep_every",
              "logging.every")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    models: name -> recipe and settings. conditions: names. shots: of the few-shot probe. Settings are `key=value`, and
    later ones win: `settings`, the model's own, `overrides`, what the condition sets.
    """

    study: str
    models: dict[str, list[str]]
    conditions: list[str]
    settings: list[str]
    shots: list[int]
    overrides: list[str]

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def stored(out: Path, study: str) -> Plan | None:
        """That of the study in this folder. Raises UserError where it is another kind of study, or cannot be read."""
        path = out / "study.json"
        if not path.exists():
            return None
        try:
            raw = json.loads(path.read_text())
            version, plan = raw.pop("version"), Plan(**raw)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: cannot be read as a study: {e}") from None
        if version != VERSION or plan.study != study:
            raise UserError(f"{out} holds a study of {plan.study}: give another --out")
        return plan


@dataclass(frozen=True)
class Cell:
    """One training of a study: `model` under `condition`."""

    model: str
    condition: str
    config: Config

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.config.run.dir)

    def finished(self) -> bool:
        return self.run.finished.exists()

    def submitted(self) -> bool:
        """Was it given to SLURM?"""
        return (self.run.path / "launch" / "submission.json").exists()


def parse_models(given: Sequence[str]) -> dict[str, list[str]]:
    """NAME="RECIPE key=value ..." or a recipe's name alone -> name -> recipe and settings. Raises UserError."""
    models: dict[str, list[str]] = {}
    for text in given:
        head, *settings = text.split()
        name, equals, recipe = head.partition("=")
        if not name or (equals and not recipe) or "." in name.split("/")[-1].removesuffix(".yaml"):
            raise UserError(f'--model {text!r}: give a recipe, or NAME=RECIPE, or NAME="RECIPE key=value ..."')
        label = name if equals else Path(name).stem
        if label in models:
            raise UserError(f"--model: {label} is given twice; write NAME=RECIPE with names of their own")
        models[label] = [recipe if equals else name, *settings]
    return models


def read_study(name_or_path: str, study: str) -> dict[str, Any]:
    """The YAML of a study, shipped (by name) or the user's own: {models, settings, shots, AXIS[study]}, as given.

    Raises:
        UserError: no such file, or not of this form.
    """
    import importlib.resources

    folder = importlib.resources.files("configs") / "studies"
    shipped = Path(str(folder / f"{name_or_path.removesuffix('.yaml')}.yaml"))
    path = Path(name_or_path).expanduser()
    path = path if path.is_file() else shipped
    if not path.is_file():
        names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
        raise UserError(
            f"{name_or_path}: no such file and no study of that name\n"
            f"studies: {', '.join(names)}; or give the path of a YAML file, or models with --model"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    kinds: dict[str, type] = {"study": str, "models": dict, "settings": list, "shots": list, AXIS[study]: list}
    if not isinstance(raw, dict) or raw.get("study") != study:
        raise UserError(f"{path}: is no study of `mixer compare {study}`: it must begin with `study: {study}`")
    for key, value in raw.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key!r} (keys: {', '.join(kinds)})")
        if not isinstance(value, kinds[key]):
            raise UserError(f"{path}: {key} must be a {kinds[key].__name__}")
    models = {}
    for name, words in raw.get("models", {}).items():
        if not isinstance(words, list) or not words or "=" in str(words[0]):
            raise UserError(f"{path}: models: {name}: must be a list, a recipe and then settings: [cifar10, key=value]")
        models[str(name)] = [str(w) for w in words]
    return {**raw, "models": models, "settings": [str(s) for s in raw.get("settings", [])]}


def make_cells(plan: Plan, out: Path, under: Callable[[Config, str], Config]) -> list[Cell]:
    """The trainings of a plan, model by model.

    under(config, condition): the model's configuration under a condition. Durations in epochs are epochs of the whole
    training set, so that all runs of a model take the same number of steps.

    Raises:
        UserError: a recipe or setting that does not load; a model of which nothing is evaluated.
    """
    cells = []
    for model, (recipe, *own) in plan.models.items():
        loaded = load_config(recipe, [*plan.settings, *own, *plan.overrides]).config
        prepared = _prepared(loaded, plan.shots)
        for condition in plan.conditions:
            name = re.sub(r"[^\w.+-]+", "-", f"{model}-{condition.replace('%', 'pct')}")
            run = replace(prepared.run, name=name, dir=str(out / "runs" / name))
            config = replace(under(prepared, condition), run=run)
            validate(config)
            cells.append(Cell(model, condition, config))
    names = [c.name for c in cells]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"two runs of this study would be called {twice}: give models and conditions other names")
    return cells


def _prepared(config: Config, shots: list[int]) -> Config:
    """With a few-shot probe, durations in steps, and the classes counted."""
    if config.data.val == "none":
        raise UserError("a study compares accuracies: data.val=none leaves nothing to evaluate")
    data = config.data.train
    if config.eval.fewshot is None:
        if not isinstance(data, str):
            raise UserError("data.train is several sets: say which the few-shot probe takes, eval.fewshot=SET")
        config = replace(config, eval=replace(config.eval, fewshot=data))
    config = replace(config, eval=replace(config.eval, fewshot_shots=list(shots)))
    batch, (samples, classes) = config.train.global_batch_size, _whole_set(config)
    config = replace(config, model=replace(config.model, num_classes=classes))
    for key in _DURATIONS:
        section, name = key.split(".")
        part = getattr(config, section)
        text = getattr(part, name)
        if text is not None and (d := Duration.parse(text)).unit == "epochs":
            steps = f"{d.to_steps(batch, samples)} steps"
            config = replace(config, **{section: replace(part, **{name: steps})})
    if config.eval.every is None:  # accuracies are those of the best evaluation: there must be some
        steps = Duration.parse(config.train.duration).to_steps(batch, samples)
        config = replace(config, eval=replace(config.eval, every=f"{max(1, steps // 10)} steps"))
    return config


def _whole_set(config: Config) -> tuple[int, int]:
    """(samples, classes) of the whole training set. Raises UserError."""
    from pipeline.inputs import num_classes, open_training_data

    data = open_training_data(replace(config, data=replace(config.data, subset=None)))
    return data.samples, num_classes(config, data.source)


def settle(plan: Plan, cells: Sequence[Cell], out: Path) -> None:
    """Writes down what the study is, at its first start; later ones must ask for the same.

    Raises:
        UserError: the folder holds another study; what differs is named.
    """
    before = Plan.stored(out, plan.study)
    if before is None:
        if out.is_dir() and any(p.name != ".lock" for p in out.iterdir()):
            raise UserError(f"{out} is not empty and holds no study: give another --out")
    else:
        if differences := _differences(before, plan, cells, out):
            raise UserError(
                f"{out} holds this study with other options: {'; '.join(differences)}. "
                "Set them back (without options it goes on as it was), or give another --out"
            )
    if before is None:  # first: a folder that holds more than a lock, and no study, is taken for something else
        replace_file(out / "study.json", plan.to_json())
    for cell in cells:
        replace_file(config_file(out, cell.name), to_yaml(cell.config))


def config_file(out: Path, name: str) -> Path:
    """The whole configuration of the run of that name, which `mixer train` is given."""
    return out / "configs" / f"{name}.yaml"


def _differences(before: Plan, plan: Plan, cells: Sequence[Cell], out: Path) -> list[str]:
    words = []
    for what, old, new in (
        ("models", list(before.models), list(plan.models)),
        (AXIS[plan.study], before.conditions, plan.conditions),
    ):
        if old != new:
            words.append(f"{what}: {', '.join(old)} -> {', '.join(new)}")
    changed: dict[str, list[str]] = {}
    for cell in cells:
        path = config_file(out, cell.name)
        if path.exists():
            stored = load_config(str(path)).config
            for change in diff_configs(stored, cell.config):
                if not _FREE.fullmatch(change.key):
                    changed.setdefault(str(change), []).append(cell.name)
    for change, names in changed.items():
        words.append(change if len(names) == len(cells) else f"{change} (of {', '.join(names)})")
    return words


@dataclass(frozen=True)
class Result:
    """What a run of a study has reached. samples: of its training set. parameters: of the model."""

    cell: Cell
    parameters: int
    samples: int
    history: History

    @property
    def best(self) -> Point | None:
        """Its best evaluation on the val split: the paper stops early too (figure 2)."""
        return self.history.best()

    @property
    def last(self) -> Point | None:
        return self.history.val[-1] if self.history.val else None


def read_results(cells: Sequence[Cell]) -> list[Result]:
    """Of the finished runs."""
    from pipeline.model.registry import model_cost

    results = []
    for cell in cells:
        if cell.finished():
            m = cell.config.model
            parameters = model_cost(m.name, m.num_classes or 0, m.image_size, **m.overrides()).parameters
            facts = [json.loads(p.read_text()) for p in sorted(cell.run.data.glob("*.json"))]
            results.append(
                Result(cell, parameters, sum(f["samples"] for f in facts), read_history(cell.run.path, cell.name))
            )
    return results


def facts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For the study's JSON: each run with its curve of evaluations."""
    return [
        {
            "run": r.cell.name,
            "model": r.cell.model,
            "condition": r.cell.condition,
            "parameters": r.parameters,
            "samples": r.samples,
            "best": _values(r.best),
            "evaluations": [_values(p) for p in r.history.val],
        }
        for r in results
    ]


def _values(point: Point | None) -> Mapping[str, Any] | None:
    if point is None:
        return None
    left_out = ("attempt", "split", "step", "samples_seen", "samples", "bad")
    values = {k: v for k, v in point.values.items() if k not in left_out}
    return {"step": point.step, "samples_seen": point.samples, **values}
