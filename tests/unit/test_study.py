"""Studies before they run: what belongs to one, what all its runs share, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import TINY_MODEL, members, shards_of, write_dataset

from data_tools.errors import UserError
from launch.compare.studies import scaling
from pipeline.compare.permutation import CONDITIONS, with_permutation
from pipeline.compare.scaling import on_share, parse_fractions
from pipeline.compare.study import AXIS, Cell, Plan, config_file, make_cells, parse_models, read_study, settle
from pipeline.config import load_config
from pipeline.inputs import open_training_data, permutation

SETTINGS = ["train.global_batch_size=4", "train.duration=3 epochs", "train.precision=fp32", "data.num_workers=0",
            "scheduler.warmup=1 epochs", "eval.every=1 epochs"]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    samples = members(90)
    return write_dataset(tmp_path / "set", {"train": shards_of(samples[:80], [50, 30]), "val": [samples[80:]]})


def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text("run: {name: tiny}\n")
    return str(path)


def plan_of(tmp_path: Path, data: Path, *overrides: str, study: str = "scaling") -> Plan:
    shape = [s for s in TINY_MODEL if "num_classes" not in s]
    models = {"A": [recipe(tmp_path), *shape], "B": [recipe(tmp_path), *shape, "model.hidden_dim=24"]}
    conditions = ["10%", "50%", "100%"] if study == "scaling" else list(CONDITIONS)
    return Plan(study, models, conditions, SETTINGS, [1, 2], [f"data.train={data}", *overrides])


def cells_of(tmp_path: Path, plan: Plan, out: str = "out") -> list[Cell]:
    return make_cells(plan, tmp_path / out, on_share if plan.study == "scaling" else with_permutation)


def test_all_runs_of_a_model_take_the_same_steps_on_nested_subsets(tmp_path, data):
    cells = cells_of(tmp_path, plan_of(tmp_path, data))
    assert [(c.model, c.condition) for c in cells] == [(m, s) for m in "AB" for s in ("10%", "50%", "100%")]
    assert {(c.config.train.duration, c.config.scheduler.warmup, c.config.eval.every) for c in cells} == {
        ("60 steps", "20 steps", "20 steps")  # 80 samples, 4 a step
    }
    assert [c.config.data.subset for c in cells[:3]] == ["10%", "50%", None]
    ids = []
    for cell in cells[:2]:
        subset = open_training_data(cell.config).sets[0].subset
        assert subset is not None
        ids.append(set(subset.ids.tolist()))
    assert ids[0] < ids[1] < set(range(80))
    assert {c.config.model.hidden_dim for c in cells[3:]} == {24} and cells[0].config.model.hidden_dim == 16
    # The probe takes the training set, and all of it, whatever the run's own share
    assert {(c.config.eval.fewshot, *c.config.eval.fewshot_shots) for c in cells} == {(str(data), 1, 2)}
    assert cells[0].name == "A-10pct" and cells[0].run.path == tmp_path / "out" / "runs" / "A-10pct"


def test_what_a_study_needs_is_said(tmp_path, data):
    with pytest.raises(UserError, match="leaves nothing to evaluate"):
        cells_of(tmp_path, plan_of(tmp_path, data, "data.val=none", "eval.every=null"))
    with pytest.raises(UserError, match="the subsets are this study's own; use --fractions"):
        cells_of(tmp_path, plan_of(tmp_path, data, "data.subset=20%"))
    with pytest.raises(UserError, match=r"say which the few-shot probe takes, eval.fewshot=SET"):
        cells_of(tmp_path, plan_of(tmp_path, data, f"data.train=[{{path: {data}, weight: 1}}]"))
    with pytest.raises(UserError, match="what is permuted is for this study to set"):
        cells_of(tmp_path, plan_of(tmp_path, data, "augment.permute=pixels", study="permutation"))
    names = Plan("scaling", {"A b": [recipe(tmp_path)], "A-b": [recipe(tmp_path)]}, ["3%"], SETTINGS, [1],
                 [f"data.train={data}", *TINY_MODEL])  # fmt: skip
    with pytest.raises(UserError, match="two runs of this study would be called A-b-3pct"):
        cells_of(tmp_path, names)


def test_another_study_in_the_same_folder_is_refused_and_the_difference_named(tmp_path, data):
    plan, out = plan_of(tmp_path, data), tmp_path / "out"
    settle(plan, cells_of(tmp_path, plan), out)
    assert Plan.stored(out, "scaling") == plan
    settle(plan, cells_of(tmp_path, plan), out)

    machine = plan_of(tmp_path, data, "data.num_workers=2", "logging.every=5 steps", "checkpoint.every=2 min")
    settle(machine, cells_of(tmp_path, machine), out)  # changes no result
    assert load_config(str(config_file(out, "B-10pct"))).config.data.num_workers == 2

    other = plan_of(tmp_path, data, "optimizer.lr=0.5")
    other.models["B"].append("run.seed=3")
    with pytest.raises(UserError) as e:
        settle(other, cells_of(tmp_path, other), out)
    assert "optimizer.lr: 0.001 -> 0.5;" in str(e.value)
    assert "run.seed: 0 -> 3 (of B-10pct, B-50pct, B-100pct)" in str(e.value)

    fewer = Plan("scaling", {"A": plan.models["A"]}, ["10%", "100%"], plan.settings, plan.shots, plan.overrides)
    with pytest.raises(UserError, match=r"models: A, B -> A; fractions: 10%, 50%, 100% -> 10%, 100%"):
        settle(fewer, cells_of(tmp_path, fewer), out)
    with pytest.raises(UserError, match="holds a study of scaling: give another --out"):
        Plan.stored(out, "permutation")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        settle(plan, cells_of(tmp_path, plan), data)


def test_models_and_fractions_on_the_command_line():
    given = ["mixer_b16_i1k", "ViT=vit_b16_i1k model.patch_size=32", "mine/small.yaml"]
    assert parse_models(given) == {
        "mixer_b16_i1k": ["mixer_b16_i1k"],
        "ViT": ["vit_b16_i1k", "model.patch_size=32"],
        "small": ["mine/small.yaml"],
    }
    with pytest.raises(UserError, match="is given twice"):
        parse_models(["digits", "digits optimizer.lr=1"])
    with pytest.raises(UserError, match="give a recipe, or NAME=RECIPE"):
        parse_models(["model.patch_size=4"])
    assert parse_fractions("100, 3%,10,0.5") == ["0.5%", "3%", "10%", "100%"]
    for wrong in ("0", "101", "a", "3,,10"):
        with pytest.raises(UserError, match="is no percentage; write for example 3,10,30,100"):
            parse_fractions(wrong)


@pytest.mark.parametrize(("name", "study", "runs"), [
    ("cifar_scaling", "scaling", 12),
    ("cifar_permutation", "permutation", 6),
    ("jft_scaling", "scaling", 28),
    ("jft_permutation", "permutation", 6),
])  # fmt: skip
def test_shipped_studies_load(tmp_path, data, name, study, runs):
    file = read_study(name, study)
    conditions = file.get(AXIS[study], list(CONDITIONS))
    small = ["scheduler.warmup=1 steps", "train.global_batch_size=4", "train.micro_batch_size=4"]
    plan = Plan(study, file["models"], conditions, file.get("settings", []), [5], [f"data.train={data}", *small])
    assert len(cells_of(tmp_path, plan)) == runs


def test_a_study_file_that_is_none_is_told(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no study of that name\nstudies: cifar_permutation, cifar_scaling, ",
    ):
        read_study("cifar", "scaling")
    with pytest.raises(UserError, match="it must begin with `study: permutation`"):
        read_study("cifar_scaling", "permutation")
    path = tmp_path / "s.yaml"
    for text, said in [
        ("study: scaling\nmodel: {}", "unknown key 'model'"),
        ("study: scaling\nmodels: [a]", "models must be a dict"),
        ("study: scaling\nmodels: {A: [model.name=x]}", "models: A: must be a list, a recipe and then settings"),
        ("a: [", "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_study(str(path), "scaling")


def test_a_model_without_patches_gets_the_permutation_of_one_with(tmp_path, data):
    """Figure 4 permutes the same 16 x 16 patches for both networks: augment.permute_patch says which."""
    plan = plan_of(tmp_path, data, "augment.permute_patch=4", study="permutation")
    plan.models["B"][:] = [recipe(tmp_path), "model.name=timm/resnetv2_50x1_bit", "model.image_size=8",
                           "model.hidden_dim=128", "model.num_blocks=1"]  # fmt: skip
    cells = cells_of(tmp_path, plan)
    assert [c.config.augment.permute for c in cells] == [*CONDITIONS, *CONDITIONS]
    orders = [permutation(c.config) for c in cells]
    assert orders[0] is None and orders[3] is None
    assert np.array_equal(orders[1], orders[4]) and np.array_equal(orders[2], orders[5])
    assert not np.array_equal(orders[1], orders[2])


def test_fractions_of_a_study_file_may_be_numbers(tmp_path, data, capsys):
    path = tmp_path / "s.yaml"
    small = "scheduler.warmup=1 steps, train.global_batch_size=4, train.micro_batch_size=4"
    path.write_text(f"study: scaling\nmodels: {{A: [digits]}}\nfractions: [100, 50, 10]\nsettings: [{small}]")
    scaling(str(path), [f"data.train={data}"], tmp_path / "out", prepare=True)
    assert [line.split("/")[-1].split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "A-10pct.yaml", "A-50pct.yaml", "A-100pct.yaml",
    ]  # fmt: skip
    path.write_text("study: scaling\nmodels: {A: [digits]}\nfractions: [a lot]")
    with pytest.raises(UserError, match="'alot' is no percentage"):
        scaling(str(path), [f"data.train={data}"], tmp_path / "other", prepare=True)
