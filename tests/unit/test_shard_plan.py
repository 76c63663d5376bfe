"""Keys, order, split and shard boundaries: pure functions of the listing and the options; plans on disk."""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from tempfile import TemporaryFile

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_tools import planner, scan, ustar
from data_tools.dedupe import Dropped
from data_tools.errors import UserError
from data_tools.keys import MAX_KEY, key_hashes, member_key, sample_key
from data_tools.labels import number_labels
from data_tools.plan import PlanOptions, cut
from data_tools.plan_store import iter_samples, load_plan, read_slice
from data_tools.planner import Numbering, build_plan
from data_tools.scan import scan_sources
from data_tools.sources.rows import Row, batches_of
from data_tools.tar_writer import HashedTar

SAFE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]*)*")


class RowSource:
    """A corpus given as rows."""

    kind, names, classes, stamp = "test", False, None, None
    sequential = forward_only = many_units = False

    def __init__(self, rows: list[Row], root: str = "/a", units: int = 1) -> None:
        self.root, self._rows, self._units = root, rows, units

    def units(self) -> list[str]:
        return [str(i) for i in range(self._units)]

    def batches(self, unit: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        ignored["seen"] += 1
        return batches_of(self._rows[int(unit) :: self._units])


def rows(n: int, size: int = 1000) -> list[Row]:
    return [Row(f"c{i % 3}/{i:05d}.jpg".encode(), size, 5, f"c{i % 3}") for i in range(n)]


class Planned:
    """A plan made in `folder` from rows, with its samples in tar order."""

    def __init__(self, folder, given: list[Row], root: str = "/a", classes=None, dropped=None, **options) -> None:
        source = RowSource(given, root)
        listing = scan_sources([source], folder / "work")
        numbering = Numbering(*number_labels(listing.labels, [source], classes))
        self.folder = folder
        self.plan = build_plan(
            listing, PlanOptions(**options), numbering, (0,), dropped or Dropped(), folder, folder / "work" / "runs"
        )
        self.samples = [s for shard in self.plan.shards for s in read_slice(folder, shard)]
        self.paths = [s.path for s in self.samples]


@pytest.fixture
def planned(tmp_path):
    numbers = iter(range(1000))
    return lambda given, **kw: Planned(tmp_path / str(next(numbers)), given, **kw)


# --- keys ---------------------------------------------------------------------------------------------------


@given(st.text("ab./-_ \n\\:ä☃", min_size=1) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_name_gives_a_safe_key(path):
    key = member_key(path)
    assert SAFE.fullmatch(key) and len(key) <= MAX_KEY and len(key) + len(".webp") <= ustar.MAX_NAME


@given(st.text("ab.jpgPNG/-_ ä", min_size=1))
def test_the_quick_way_gives_the_same_key(path):
    from data_tools.index import key_hash

    assert sample_key(path.encode()) == member_key(path)
    assert key_hashes([path.encode()]) == [key_hash(member_key(path))]


def test_plain_names_are_kept_and_odd_ones_are_told_apart(planned):
    assert member_key("n01440764/n01440764_10026.JPEG") == "n01440764/n01440764_10026"
    odd = ["a b.jpg", "a\nb.jpg", "a.b.jpg", "a_b.jpg", "ä.jpg", "../x.jpg", "/x.jpg", ".x.jpg",
           "x" * 300 + ".jpg", "x" * 301 + ".jpg", "\udcff.jpg", "..jpg", "noext", ".jpg",
           "s3://b/k.jpg", "c/a.jpg", "c/a.png", "c/b.jpg"]  # fmt: skip
    keys = {s.path: s.key for s in planned([Row(os.fsencode(p), 1, 1) for p in odd]).samples}
    assert len(set(keys.values())) == len(odd) == len(keys)
    assert not any(".." in k or k.startswith("/") for k in keys.values())
    assert keys["c/b.jpg"] == "c/b" and keys["c/a.jpg"].startswith("c/a-") and keys["c/a.png"].startswith("c/a-")


def test_a_key_that_another_image_needs_is_refused(planned):
    taken = sample_key(b"c/a.png", twin=True)
    with pytest.raises(UserError, match="is needed for another image"):
        planned([Row(p, 1, 1) for p in (b"c/a.jpg", b"c/a.png", taken.encode() + b".jpg")])


@given(st.text("abcXYZ09_-/", min_size=1, max_size=90), st.integers(0, ustar.MAX_SIZE))
def test_header_reads_back(name, size):
    name = name.strip("/") or "x"
    info = tarfile.TarInfo.frombuf(ustar.header(name, size), "ascii", "strict")  # checks the checksum
    assert (info.name, info.size, info.isreg(), info.mtime, info.uid, info.gid) == (name, size, True, 0, 0, 0)


@given(st.lists(st.tuples(st.text("abc09_/-", min_size=1, max_size=90), st.integers(0, 40_000)), max_size=30))
def test_members_written_together_read_back(members):
    given = [(name.strip("/") or "x", os.urandom(1) * size) for name, size in members]
    with TemporaryFile(buffering=0) as file:
        tar = HashedTar(file)
        offsets = [tar.add(name, data) for name, data in given]
        tar.close()
        file.seek(0)
        raw = file.read()
    assert len(raw) == tar.offset and xxhash.xxh3_128_hexdigest(raw) == tar.hexdigest()
    assert [raw[at : at + len(data)] for at, (_, data) in zip(offsets, given)] == [data for _, data in given]
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        assert [(m.name, m.size, m.offset_data) for m in archive] == [
            (name, len(data), at) for at, (name, data) in zip(offsets, given)
        ]


def test_header_refuses_what_does_not_fit():
    for name, size in [("", 1), ("x" * 101, 1), ("x", -1), ("x", 8**11), ("ä", 1)]:
        with pytest.raises(ValueError):
            ustar.header(name, size)


# --- order, split, digest -----------------------------------------------------------------------------------


def test_digest_depends_on_corpus_and_options_only(planned):
    first, again = planned(rows(50)), planned(rows(50), root="/elsewhere")
    assert (first.plan.digest, first.samples) == (again.plan.digest, again.samples)
    relabelled = [r._replace(label="c0") for r in rows(50)]
    others = [
        planned(rows(51)), planned(rows(50, size=1001)), planned(rows(50), seed=1), planned(relabelled),
        planned(rows(50), val_fraction=0.3), planned(rows(50), classes=["c0", "c1", "c2", "c3"]),
        planned([r._replace(extra="{}") for r in rows(50)]),
    ]  # fmt: skip
    assert len({first.plan.digest, *(p.plan.digest for p in others)}) == 8


def test_shuffled_order_mixes_and_source_order_keeps(planned):
    shuffled, reseeded, source = (planned(rows(300), **kw) for kw in ({}, {"seed": 1}, {"order": "source"}))
    assert source.paths == [r.path.decode() for r in rows(300)]
    assert sorted(shuffled.samples) == sorted(source.samples) == sorted(reseeded.samples)
    assert len({tuple(p.paths) for p in (shuffled, source, reseeded)}) == 3


def test_val_split_is_stable_when_the_corpus_grows_or_shards_change(planned):
    def val(n: int, **kw) -> set[str]:
        made = planned(rows(n), val_fraction=0.1, **kw)
        return set(made.paths[sum(s.samples for s in made.plan.shards if s.split == "train") :])

    small, large = val(2000), val(4000)
    assert 150 < len(small) < 250
    assert small == large & {r.path.decode() for r in rows(2000)}
    assert small == val(2000, max_samples=7) == val(2000, order="source") != val(2000, seed=1)


def test_a_group_never_straddles_splits(planned):
    given_rows = [r._replace(group=f"patient {i // 7}") for i, r in enumerate(rows(2100))]
    made = planned(given_rows, val_fraction=0.2, group_by="patient")
    train = sum(s.samples for s in made.plan.shards if s.split == "train")
    group = {r.path.decode(): r.group for r in given_rows}
    train_groups, val_groups = ({group[p] for p in part} for part in (made.paths[:train], made.paths[train:]))
    assert not train_groups & val_groups and 40 < len(val_groups) < 80


def test_golden_order_and_split(planned):
    """The order and the split are promises to data sets that exist: these values must never change."""
    made = planned([Row(f"c{i % 3}/{i:05d}.jpg".encode(), 1000, 5) for i in range(12)], val_fraction=0.25, seed=3)
    assert " ".join(s.key[-2:] for s in made.samples) == "06 05 02 07 10 11 00 04 08 03 09 01"
    assert [(s.split, s.samples) for s in made.plan.shards] == [("train", 6), ("val", 6)]
    assert made.plan.digest == "b44cd2d3bd2c3baa6b945941a2152813"


def test_explicit_splits(planned):
    given_rows = [
        Row(f"{i}.jpg".encode(), 10, 1, None, None, split) for i, split in enumerate(["val", "train", "test", None])
    ]
    assert {s.split: s.samples for s in planned(given_rows).plan.shards} == {"train": 2, "test": 1, "val": 1}
    with pytest.raises(UserError, match="val split of its own"):
        planned(given_rows, val_fraction=0.1)
    assert [s.name for s in planned(given_rows[2:3]).plan.shards] == ["test-000000.tar"]


def test_empty_val_split_is_refused(planned):
    with pytest.raises(UserError, match="choose another fraction"):
        planned(rows(3), val_fraction=0.0001)


# --- shard boundaries ---------------------------------------------------------------------------------------


def test_shards_respect_both_limits(planned):
    made = planned(rows(50), shard_size=20_000, max_samples=4)
    assert sum(s.samples for s in made.plan.shards) == len(made.samples) == 50
    assert all(s.bytes <= 20_000 and 1 <= s.samples <= 4 for s in made.plan.shards)
    big = planned(rows(3, size=50_000), shard_size=20_000, max_samples=4)
    assert [s.samples for s in big.plan.shards] == [1, 1, 1]


@given(
    st.lists(st.integers(1024, 30_000), min_size=1, max_size=300),
    st.integers(10_000, 200_000),
    st.integers(0, 50),
)
def test_cut_covers_all_and_keeps_the_limits(costs, size, most):
    ends = cut(np.array(costs), PlanOptions(shard_size=size, max_samples=most))
    begins = [0, *ends[:-1]]
    assert ends[-1] == len(costs) and all(a < b for a, b in zip(begins, ends))
    for a, b in zip(begins, ends):
        assert b - a == 1 or (sum(costs[a:b]) <= size - 1024 and (not most or b - a <= most))


@given(st.integers(1, 5000), st.integers(1, 40))
def test_equal_samples_are_dealt_evenly(n, most):
    sizes = np.diff(cut(np.full(n, 2048), PlanOptions(max_samples=most)), prepend=0)
    assert len(sizes) == -(-n // most) and sizes.max() - sizes.min() <= 1


def test_the_last_shard_is_not_small():
    costs = np.random.default_rng(0).lognormal(11.4, 0.5, 100_000).astype(np.int64)
    sizes = np.add.reduceat(costs, np.append(0, cut(costs, PlanOptions())[:-1]))
    assert sizes.min() > 0.98 * sizes.max() and sizes.max() <= 256_000_000
    assert len(sizes) <= 1.02 * costs.sum() / 256_000_000 + 1


# --- on disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    """Many parts, cells and row groups even for a few hundred samples."""
    monkeypatch.setattr(scan, "PART_ROWS", 64)
    monkeypatch.setattr(planner, "CELL_ROWS", 100)
    monkeypatch.setattr(planner, "SLICE_GROUP_ROWS", 16)
    monkeypatch.setattr(planner, "_HASHES_AT_ONCE", 128)


@pytest.mark.parametrize("options", [{}, {"order": "source"}, {"val_fraction": 0.2, "max_samples": 7}])
def test_many_pieces_give_the_same_plan_as_one(planned, monkeypatch, small_pieces, options):
    pieces = planned(rows(1000), **options)
    assert len(list(pieces.folder.glob("samples-*.parquet"))) > 4
    monkeypatch.setattr(planner, "CELL_ROWS", 1 << 21)
    whole = planned(rows(1000), **options)
    assert pieces.samples == whole.samples and pieces.plan.digest == whole.plan.digest
    assert [(s.name, s.samples, s.bytes) for s in pieces.plan.shards] == [
        (s.name, s.samples, s.bytes) for s in whole.plan.shards]  # fmt: skip
    assert list(iter_samples(pieces.folder)) == pieces.samples
    assert load_plan(pieces.folder) == pieces.plan


def test_twins_and_repeated_paths_are_found_across_pieces(planned, small_pieces):
    twin = [*rows(400), Row(b"c0/00000.png", 9, 1, "c0")]
    keys = {s.path: s.key for s in planned(twin).samples}
    assert len(set(keys.values())) == 401 and keys["c0/00000.jpg"] != "c0/00000" and keys["c1/00001.jpg"] == "c1/00001"
    with pytest.raises(UserError, match=r"'c0/00000.jpg' is listed twice"):
        planned([*rows(400), Row(b"c0/00000.jpg", 9, 1, "c0")])


def test_dropped_rows_are_not_planned(planned, small_pieces):
    dropped = Dropped(np.array([0, 63, 64, 399]), 3, 1, "x")
    made = planned(rows(400), order="source", dropped=dropped)
    gone = {rows(400)[i].path.decode() for i in (0, 63, 64, 399)}
    assert made.paths == [r.path.decode() for r in rows(400) if r.path.decode() not in gone]
    assert (made.plan.corpus.listed, made.plan.corpus.samples) == (400, 396)
    assert made.plan.digest != planned(rows(400), order="source").plan.digest


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 4, 7, 9, 14, 20])
def test_a_killed_planning_goes_on_to_the_same_plan(tmp_path, monkeypatch, small_pieces, after):
    """Kills after any number of committed files, and again, until the plan is made."""
    from data_tools import storage, tables

    undisturbed = Planned(tmp_path / "whole", rows(500), val_fraction=0.1)
    commits, real = 0, storage.atomic_file

    def counting(path):
        nonlocal commits
        commits += 1
        if commits % after == 0:
            raise Killed
        return real(path)

    monkeypatch.setattr(tables, "atomic_file", counting)
    folder, kills = tmp_path / "killed", 0
    while True:
        try:
            source = RowSource(rows(500), units=1)
            listing = scan_sources([source], folder / "work")
            numbering = Numbering(*number_labels(listing.labels, [source], None))
            plan = build_plan(
                listing, PlanOptions(val_fraction=0.1), numbering, (0,), Dropped(), folder, folder / "work" / "runs"
            )
            break
        except Killed:
            kills += 1
            assert kills < 60
            if after == 1:
                after = 3
    assert kills and plan == undisturbed.plan and listing.ignored == {"seen": 1}
    assert list(iter_samples(folder)) == undisturbed.samples


def test_a_plan_of_another_release_is_refused(planned):
    made = planned(rows(3))
    header = json.loads((made.folder / "plan.json").read_bytes())
    (made.folder / "plan.json").write_text(json.dumps({**header, "version": 1}))
    with pytest.raises(UserError, match="another release"):
        load_plan(made.folder)
