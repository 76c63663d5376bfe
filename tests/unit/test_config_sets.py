"""`data.train` as a list of weighted sets and `data.subset`: loading, messages, round trips."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from data_tools.errors import UserError
from pipeline.config import TrainSet, diff_configs, format_config, load_config, to_yaml, train_sets
from pipeline.config.sets import parse_share

MIXTURE = "[{path: /shards/a, weight: 0.7}, {path: s3://b/c, weight: 3}]"
BASE = ["train.duration=8 steps"]


def test_one_path_is_one_set():
    loaded = load_config(None, ["data.train=/shards/a", *BASE])
    assert loaded.config.data.train == "/shards/a"
    assert train_sets(loaded.config.data.train) == [TrainSet("/shards/a", 1.0)]


@pytest.mark.parametrize("text", ["007", "12:30", "off", "a: b", "{oddly} named", "1e3"])
def test_a_path_stays_what_was_typed(text, tmp_path):
    config = load_config(None, [f"data.train={text}", *BASE]).config
    assert config.data.train == text
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)).config == config


def test_a_mixture_loads_prints_and_loads_again(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data:\n  train:\n    - {path: /shards/a, weight: 0.7}\n    - path: s3://b/c\n      weight: 3\n"
        "train: {duration: 8 steps}\n"
    )
    loaded = load_config(str(recipe))
    same = load_config(None, [f"data.train={MIXTURE}", *BASE])
    assert loaded.config == same.config
    assert train_sets(loaded.config.data.train) == [TrainSet("/shards/a", 0.7), TrainSet("s3://b/c", 3)]
    printed = format_config(same)
    assert "train: [{path: /shards/a, weight: 0.7}, {path: 's3://b/c', weight: 3}]  # command line" in printed
    again = tmp_path / "again.yaml"
    for text in (to_yaml(loaded.config), printed):
        again.write_text(text)
        assert load_config(str(again)).config == loaded.config
    other = load_config(str(recipe), ["data.train=/shards/a"]).config
    assert [c.key for c in diff_configs(loaded.config, other)] == ["data.train"]


def test_interpolations_inside_a_mixture(tmp_path, monkeypatch):
    monkeypatch.setenv("CORPUS", "/corpus")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'data: {train: [{path: "${oc.env:CORPUS}/a", weight: 1}, {path: "/${run.name}", weight: 1}]}\n'
        "train: {duration: 8 steps}\n"
    )
    assert [s.path for s in train_sets(load_config(str(recipe)).config.data.train)] == ["/corpus/a", "/mixer"]
    monkeypatch.delenv("CORPUS")
    with pytest.raises(UserError, match=r"recipe.yaml:1: data.train: .* needs the environment variable CORPUS"):
        load_config(str(recipe))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", r"data.train: the list is empty; write for example \[\{path"),
        ("[/a, /b]", r"data.train\[0\]: expected \{path: FOLDER, weight: NUMBER\}, not '/a'"),
        ("[{path: /a, wieght: 1}]", r"data.train\[0\].wieght: no such key; did you mean weight\?"),
        ("[{path: /a, weight: 1}, {path: /b}]", r"data.train\[1\].weight: has no value"),
        ("[{weight: 1}]", r"data.train\[0\].path: has no value"),
        ("[{path: 7, weight: 1}]", r"data.train\[0\].path: expected text, not 7"),
        ("[{path: /a, weight: 0}]", r"data.train\[0\].weight: 0 must be a number above 0"),
        ("[{path: /a, weight: true}]", r"data.train\[0\].weight: True must be a number above 0"),
        ("[{path: /a, weight: much}]", r"data.train\[0\].weight: 'much' must be a number above 0"),
        ("{path: /a, weight: 1}", r"data.train: expected a data set's folder or a list of \{path, weight\}"),
        ("null", r"data.train: expected a data set's folder"),
        ("[{path: /a, weight: 1", r"command line: data.train=\[\{path: /a, weight: 1: "),
    ],
)
def test_what_is_wrong_is_said(value, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [f"data.train={value}", *BASE])


def test_all_problems_of_a_mixture_are_said_at_once():
    with pytest.raises(UserError) as caught:
        load_config(None, ["data.train=[{path: /a}, {pth: /b, weight: -1}]", *BASE])
    assert len(str(caught.value).splitlines()) == 4


def test_subset():
    assert load_config(None, ["data.train=x", "data.subset=3.5%", *BASE]).config.data.subset == "3.5%"
    assert parse_share("3.5%") == Fraction(7, 200)
    assert parse_share("100 %") == 1
    for text in ("10", "0%", "101%", "-3%", "ten%"):
        with pytest.raises(UserError, match=r"data.subset: .* write for example 10%"):
            load_config(None, ["data.train=x", f"data.subset={text}", *BASE])


def test_recipes_may_hold_a_mixture_in_any_style(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: [{path: a, weight: 1}], subset: 10%}\ntrain: {duration: 0.5 epochs}\n")
    config = load_config(str(recipe)).config
    assert (train_sets(config.data.train), config.data.subset) == ([TrainSet("a", 1)], "10%")
