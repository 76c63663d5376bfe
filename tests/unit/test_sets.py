"""Mixtures and subsets end to end, in one process: what is drawn, what is refused, and how a difference is named."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import members, shards_of, train, write_dataset

from data_tools.errors import UserError
from pipeline.config import load_config
from pipeline.data.sets import unused_epoch
from pipeline.data.source import TarSource
from pipeline.data.subset import Subset
from pipeline.data.synthetic import SyntheticSource
from pipeline.inputs import open_training_data, open_val
from pipeline.run import RunFolder, read_digests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_dataset(root / "a", {"train": shards_of(members(60), [40, 20])})
    write_dataset(root / "b", {"train": shards_of(members(30, first=60), [30]), "val": [members(5, first=90)]})
    return root


def settings(folder: Path, a: float = 0.7, b: float = 0.3) -> list[str]:
    mixture = f"[{{path: {folder / 'a'}, weight: {a}}}, {{path: {folder / 'b'}, weight: {b}}}]"
    return [f"data.train={mixture}", "model.num_classes=3", "scheduler.name=constant"]


# ------------------------------------------------------------------------------------------------- subsets


def test_subsets_are_nested_and_of_the_size_asked_for():
    source = SyntheticSource("train", image_size=8, num_classes=4)
    chosen = [Subset.of(source, Fraction(p, 100)) for p in (3, 10, 30, 100)]
    for small, large in itertools.pairwise(chosen):
        assert set(small.ids.tolist()) < set(large.ids.tolist())
    for subset, p in zip(chosen, (3, 10, 30, 100)):
        expected, deviation = p * 100, 3 * np.sqrt(p * (100 - p)) + 1
        assert abs(len(subset.ids) - expected) <= deviation
        assert sum(subset.shard_sizes) == len(subset.ids) and len(subset.shard_sizes) == len(source.shard_sizes)
    assert len({s.digest for s in chosen} | {source.digest}) == 5


def test_membership_is_the_keys_own_whatever_lies_beside_it(folder, tmp_path):
    """Golden: which keys of one set are in; and the same keys are in wherever they lie."""
    source = TarSource(folder / "a", "train")
    chosen = Subset.of(source, Fraction(30, 100))
    keys = np.concatenate([source.keys(0), source.keys(1)])
    golden = json.loads((Path(__file__).parents[1] / "golden" / "mixture.json").read_text())["subset"]
    assert chosen.ids.tolist() == golden["ids"] and chosen.digest == golden["digest"]

    class Reordered:
        digest, shard_sizes = "x", [60]

        def keys(self, shard: int) -> np.ndarray:
            return keys[::-1]

    assert sorted(59 - Subset.of(Reordered(), Fraction(30, 100)).ids.astype(int)) == chosen.ids.tolist()


def test_a_subset_in_a_file_is_the_same_and_mapped(tmp_path):
    source = SyntheticSource("train", image_size=8, num_classes=4)
    plain, first = Subset.of(source, Fraction(1, 10)), Subset.of(source, Fraction(1, 10), tmp_path)
    again = Subset.of(source, Fraction(1, 10), tmp_path)
    assert isinstance(again.ids, np.memmap) and isinstance(first.ids, np.memmap)
    assert plain.ids.tolist() == first.ids.tolist() == again.ids.tolist()
    assert plain.shard_sizes == again.shard_sizes
    assert [p.name for p in tmp_path.iterdir()] == [f"subset-{plain.digest}.ids"]
    assert Subset.of(SyntheticSource("train", image_size=8, num_classes=4, samples=1), Fraction(1, 1000), tmp_path)(
        np.zeros(0, int)
    ).tolist() == []  # fmt: skip


def test_an_epoch_of_a_subset_holds_each_of_its_samples_once(folder):
    overrides = [f"data.train={folder / 'a'}", "data.subset=50%", "train.duration=1 epochs"]
    data = open_training_data(load_config(None, overrides).config)
    order = data.begin(seed=3, global_batch_size=4)
    chosen = data.sets[0].subset
    assert chosen is not None and 15 < len(chosen.ids) < 45
    seen = order.sample_ids(0, np.arange(order.steps_per_epoch * 4)).tolist()
    assert len(set(seen)) == len(seen) and set(seen) <= set(chosen.ids.tolist())
    assert order.num_samples == len(chosen.ids) and order.num_samples - len(seen) < 4


def test_train_on_a_subset_and_resume(folder, tmp_path):
    run, data = tmp_path / "run", [f"data.train={folder / 'a'}", "model.num_classes=3", "scheduler.name=constant"]
    assert train(run, *data, "data.subset=50%", "train.duration=3 steps") == 0
    with pytest.raises(UserError, match=r"data.subset is 40%, was 50%.*--allow data.train"):
        train(run, *data, "data.subset=40%", "train.duration=6 steps")
    with pytest.raises(UserError, match=r"data.subset is all, was 50%"):
        train(run, *data, "data.subset=null", "train.duration=6 steps")
    assert train(run, *data, "data.subset=50%", "train.duration=6 steps") == 0
    assert train(tmp_path / "whole", *data, "data.subset=50%", "train.duration=6 steps") == 0
    assert read_digests(run) == read_digests(tmp_path / "whole")
    assert len(list((run / "data").glob("subset-*.ids"))) == 2


# ------------------------------------------------------------------------------------------------ mixtures


def test_a_mixture_reads_from_both_sets(folder):
    config = load_config(None, [*settings(folder), "train.duration=1 epochs"]).config
    data = open_training_data(config)
    a, b = (TarSource(folder / name, "train") for name in "ab")
    for i in (0, 41, 59):
        assert data.source.read(i, 3).crc32 == a.read(i, 3).crc32 == data.source.crc32(np.array([i]))[0]
    for i in (60, 89):
        assert data.source.read(i, 3).crc32 == b.read(i - 60, 3).crc32 == data.source.crc32(np.array([i]))[0]
    assert data.source.shard_sizes == [40, 20, 30]
    assert [len(data.source.keys(s)) for s in range(3)] == [40, 20, 30]
    val = open_val(config, data.source)
    assert val is not None and val.shard_sizes == [5]  # of the first set that has one
    assert data.begin(seed=0, global_batch_size=16).num_samples == 90


def test_sets_of_other_classes_are_refused(folder, tmp_path):
    write_dataset(tmp_path / "c", {"train": [members(5)]}, classes=4)
    mixture = f"data.train=[{{path: {folder / 'a'}, weight: 1}}, {{path: {tmp_path / 'c'}, weight: 1}}]"
    with pytest.raises(UserError, match=r"c \(train\) has other classes than .*a \(train\): 4 instead of 3"):
        open_training_data(load_config(None, [mixture, "train.duration=1 epochs"]).config)


def test_train_on_a_mixture_resume_and_change_it(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, *settings(folder), "train.duration=0.5 epochs") == 0  # of 90 samples: 5 steps of 16
    assert "0.7 of" in capsys.readouterr().out
    assert sorted(read_digests(run)) == [1, 2, 3]
    with pytest.raises(UserError, match=r"shares of \[504, 504\] of 1008 slots, were \[706, 302\]"):
        train(run, *settings(folder, 1, 1), "train.duration=6 steps")
    with pytest.raises(UserError, match=r"1 set, was 2 \(.*a, .*b\)"):
        train(run, f"data.train={folder / 'a'}", *settings(folder)[1:], "train.duration=6 steps")
    own = load_config(str(run / "config.yaml")).config.data.train  # what was refused is not the run's from then on
    assert own == load_config(None, [*settings(folder), "train.duration=1 epochs"]).config.data.train
    assert train(run, *settings(folder, 7, 3), "train.duration=6 steps") == 0  # the same shares
    assert load_config(str(run / "config.yaml")).config.data.train[0]["weight"] == 7
    assert train(tmp_path / "whole", *settings(folder), "train.duration=6 steps") == 0
    assert read_digests(run) == read_digests(tmp_path / "whole")
    assert train(run, *settings(folder, 1, 1), "train.duration=8 steps", allow=["data.train"]) == 0
    assert list(read_digests(run).values())[6][:2] == (4, 0)  # above all that the sets were in


@pytest.mark.parametrize("steps", [1, 6, 100, 300])
def test_other_data_begins_above_every_epoch_that_a_set_was_in(folder, steps):
    """No sample of a set that stays is seen again in an epoch (and so with an augmentation) it was seen in."""
    before, after = (
        open_training_data(load_config(None, [*settings(folder, *w), "train.duration=1 epochs"]).config)
        for w in ((0.7, 0.3), (0.5, 0.5))
    )
    old, new = (d.begin(seed=0, global_batch_size=16) for d in (before, after))
    old.state = replace(old.state, position=16 * steps)
    seen = old.draw(0, np.arange(old.state.position))
    again = new.draw(unused_epoch(old.state.to_dict()), np.arange(2000))
    assert not set(zip(*map(np.ndarray.tolist, seen))) & set(zip(*map(np.ndarray.tolist, again)))


# ------------------------------------------------------------------------------- differences are named


def changed(tmp_path: Path, folder: Path, shards: list) -> str:
    config = load_config(None, [f"data.train={folder / 'a'}", "train.duration=1 epochs"]).config
    before = open_training_data(config)
    before.record(tmp_path / "facts")
    write_dataset(tmp_path / "new", {"train": shards})
    config = load_config(None, [f"data.train={tmp_path / 'new'}", "train.duration=1 epochs"]).config
    after = open_training_data(config)
    stored = before.begin(seed=0, global_batch_size=4).state.to_dict()
    with pytest.raises(UserError) as caught:
        after.resume(stored, global_batch_size=4, facts=tmp_path / "facts")
    assert "--allow data.train" in str(caught.value)
    return str(caught.value)


def test_the_shards_that_differ_are_named(tmp_path, folder):
    text = changed(tmp_path, folder, shards_of(members(59), [40, 19]))
    assert "59 samples in 2 shards, were 60 in 2: train-000001.tar has 19 samples, had 20" in text
    text = changed(tmp_path, folder, shards_of([*members(40), *members(20, first=200)], [40, 20]))
    assert "train-000001.tar holds other samples" in text and "train-000000" not in text
    text = changed(tmp_path, folder, shards_of(members(60), [40, 10, 10]))
    assert "train-000002.tar is new, train-000001.tar has 10 samples, had 20" in text
    text = changed(tmp_path, folder, shards_of(members(40), [40]))
    assert "40 samples in 1 shards, were 60 in 2: train-000001.tar is missing" in text


def test_without_a_record_the_digests_are_told(tmp_path, folder):
    config = load_config(None, [f"data.train={folder / 'a'}", "train.duration=1 epochs"]).config
    data = open_training_data(config)
    stored = {**data.begin(seed=0, global_batch_size=4).state.to_dict(), "manifest_sha": "0" * 32}
    with pytest.raises(UserError, match=r"digest [0-9a-f]{12}, was 000000000000"):
        data.resume(stored, global_batch_size=4, facts=tmp_path)
    with pytest.raises(UserError, match="version 9"):
        data.resume({**stored, "version": 9}, global_batch_size=4)


def test_the_record_of_the_data_is_in_the_run_folder(tmp_path, folder):
    run = tmp_path / "run"
    assert train(run, f"data.train={folder / 'a'}", "model.num_classes=3", "train.duration=1 steps") == 0
    (facts,) = RunFolder(run).data.iterdir()
    assert facts.stem == TarSource(folder / "a", "train").digest
    assert json.loads(facts.read_text())["samples"] == 60
