"""Keys, order, split and shard boundaries: pure functions of the listing and the options."""

import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools import ustar
from data_tools.errors import UserError
from data_tools.keys import MAX_KEY, member_key, member_keys
from data_tools.plan import PlanOptions, make_plan
from data_tools.plan_store import load_plan, read_slice, save_plan
from data_tools.sources import Corpus, Sample

SAFE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]*)*")


def corpus(n: int, root: str = "/a", size: int = 1000) -> Corpus:
    return Corpus(
        "folder", Path(root), [Sample(f"c{i % 3}/{i:05d}.jpg", size, 5, i % 3) for i in range(n)], None
    )


@given(st.text("ab./-_ \n\\:ä☃", min_size=1) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_name_gives_a_safe_key(path):
    key = member_key(path)
    assert SAFE.fullmatch(key) and len(key) <= MAX_KEY and len(key) + len(".webp") <= ustar.MAX_NAME


def test_plain_names_are_kept_and_odd_ones_are_told_apart():
    assert member_key("n01440764/n01440764_10026.JPEG") == "n01440764/n01440764_10026"
    odd = ["a b.jpg", "a\nb.jpg", "a.b.jpg", "a_b.jpg", "ä.jpg", "../x.jpg", "/x.jpg", ".x.jpg",
           "x" * 300 + ".jpg", "x" * 301 + ".jpg", "\udcff.jpg", "..jpg", "noext", ".jpg"]  # fmt: skip
    keys = member_keys([Sample(p, 1, 1) for p in odd])
    assert len(set(keys)) == len(odd)
    assert not any(".." in k or k.startswith("/") for k in keys)


def test_same_stem_with_two_suffixes_gives_two_keys():
    keys = member_keys([Sample(p, 1, 1) for p in ("c/a.jpg", "c/a.png", "c/b.jpg")])
    assert len(set(keys)) == 3 and keys[2] == "c/b"


@given(st.text("abcXYZ09_-/", min_size=1, max_size=90), st.integers(0, ustar.MAX_SIZE))
def test_header_reads_back(name, size):
    name = name.strip("/") or "x"
    info = tarfile.TarInfo.frombuf(ustar.header(name, size), "ascii", "strict")  # checks the checksum
    assert (info.name, info.size, info.isreg(), info.mtime, info.uid, info.gid) == (name, size, True, 0, 0, 0)


def test_header_refuses_what_does_not_fit():
    for name, size in [("", 1), ("x" * 101, 1), ("x", -1), ("x", 8**11), ("ä", 1)]:
        with pytest.raises(ValueError):
            ustar.header(name, size)


def test_digest_depends_on_corpus_and_options_only():
    plan, samples = make_plan(corpus(50), PlanOptions())
    again, samples_again = make_plan(corpus(50, root="/elsewhere"), PlanOptions())
    assert (plan.digest, samples) == (again.digest, samples_again)
    others = [
        make_plan(corpus(51), PlanOptions())[0],
        make_plan(corpus(50, size=1001), PlanOptions())[0],
        make_plan(corpus(50), PlanOptions(seed=1))[0],
        make_plan(corpus(50), PlanOptions(val_fraction=0.3))[0],
        make_plan(replace(corpus(50), classes=["a", "b", "c"]), PlanOptions())[0],
    ]
    assert len({plan.digest, *(p.digest for p in others)}) == 6


def test_shuffled_order_mixes_and_source_order_keeps():
    _, shuffled = make_plan(corpus(300), PlanOptions())
    _, reseeded = make_plan(corpus(300), PlanOptions(seed=1))
    _, source = make_plan(corpus(300), PlanOptions(order="source"))
    assert [s.path for s in source] == [s.path for s in corpus(300).samples]
    assert sorted(shuffled) == sorted(source) == sorted(reseeded)
    assert len({tuple(s.path for s in order) for order in (shuffled, source, reseeded)}) == 3


def test_val_split_is_stable_when_the_corpus_grows_or_shards_change():
    def val(n: int, **kw) -> set[str]:
        plan, samples = make_plan(corpus(n), PlanOptions(val_fraction=0.1, **kw))
        train = sum(s.samples for s in plan.shards if s.split == "train")
        return {s.path for s in samples[train:]}

    small, large = val(2000), val(4000)
    assert 150 < len(small) < 250
    assert small == {p for p in large if p in {s.path for s in corpus(2000).samples}}
    assert small == val(2000, max_samples=7) == val(2000, order="source") != val(2000, seed=1)


def test_golden_order_and_split():
    """The order and the split are promises to data sets that exist: these values must never change."""
    plan, samples = make_plan(corpus(12), PlanOptions(val_fraction=0.25, seed=3))
    assert " ".join(s.key[-2:] for s in samples) == "06 05 02 07 10 11 00 04 08 03 09 01"
    assert [(s.split, s.samples) for s in plan.shards] == [("train", 6), ("val", 6)]
    assert plan.digest == "e74ada4b13bc1ca7c6ad5be87e4343d0"


def test_shards_respect_both_limits():
    options = PlanOptions(shard_size=20_000, max_samples=4)
    plan, samples = make_plan(corpus(50), options)
    assert sum(s.samples for s in plan.shards) == len(samples) == 50
    assert all(s.bytes <= 20_000 and 1 <= s.samples <= 4 for s in plan.shards)
    big, _ = make_plan(corpus(3, size=50_000), options)
    assert [s.samples for s in big.shards] == [1, 1, 1]


def test_explicit_splits():
    samples = [Sample(f"{i}.jpg", 10, 1, -1, split) for i, split in enumerate(["val", "train", "test", None])]
    given = Corpus("csv", Path("/a"), samples, None)
    plan, _ = make_plan(given, PlanOptions())
    assert {s.split: s.samples for s in plan.shards} == {"train": 2, "test": 1, "val": 1}
    with pytest.raises(UserError, match="val split of its own"):
        make_plan(given, PlanOptions(val_fraction=0.1))
    only_test, _ = make_plan(Corpus("csv", Path("/a"), samples[2:3], None), PlanOptions())
    assert [s.name for s in only_test.shards] == ["test-000000.tar"]


def test_empty_val_split_is_refused():
    with pytest.raises(UserError, match="choose another fraction"):
        make_plan(corpus(3), PlanOptions(val_fraction=0.0001))


def test_plan_survives_the_disk(tmp_path):
    plan, samples = make_plan(corpus(50), PlanOptions(max_samples=7))
    saved = save_plan(plan, samples, tmp_path)
    assert load_plan(tmp_path) == saved
    assert [s for shard in saved.shards for s in read_slice(tmp_path, shard)] == samples
