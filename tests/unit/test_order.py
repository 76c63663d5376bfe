"""The sample order: pinned values, an independent reference, and what it promises for every configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_reference import M64, ref_epoch, ref_key, ref_perm

from data_tools.errors import UserError
from pipeline.data import order as order_module
from pipeline.data.order import SampleOrder, key, perm, rank_slots

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "order.json").read_text())


def make(sizes: Sequence[int], batch: int, **options: Any) -> SampleOrder:
    options = {"seed": 0, "manifest_sha": "m", **options}
    return SampleOrder(sizes, global_batch_size=batch, **options)


def epoch_ids(order: SampleOrder, epoch: int) -> list[int]:
    return order.sample_ids(epoch, np.arange(order.steps_per_epoch * order.global_batch_size)).tolist()


# ------------------------------------------------------------------------------------------ golden vectors


def test_golden_keys():
    assert len(GOLDEN["key"]) >= 5
    for case in GOLDEN["key"]:
        assert f"{int(key(*case['parts'])):016x}" == case["hash"], case["parts"]


@pytest.mark.parametrize("case", GOLDEN["perm"], ids=lambda c: f"n={c['n']}")
def test_golden_permutations(case):
    assert perm(np.array(case["i"]), case["n"], int(case["key"], 16)).tolist() == case["image"]


@pytest.mark.parametrize("case", GOLDEN["orders"], ids=lambda c: c["name"])
def test_golden_orders(case):
    order = make(case["shard_sizes"], case["global_batch_size"], **case["options"])
    assert order.state.to_dict().items() >= case["state"].items()
    for rows in case["samples"]:
        positions = rows["first"] + np.arange(len(rows["ids"]))
        assert order.sample_ids(rows["epoch"], positions).tolist() == rows["ids"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(st.lists(st.integers(0, 120), min_size=1, max_size=8).filter(lambda s: sum(s) > 0))
    batch = draw(st.integers(1, min(sum(sizes), 40)))
    lanes = draw(st.sampled_from([v for v in range(1, batch + 1) if batch % v == 0]))
    return {
        "sizes": sizes,
        "batch": batch,
        "lanes": lanes,
        "chunk": draw(st.integers(1, 40)),
        "window": draw(st.sampled_from([1, 2, 7, 64, 65, 100, 1000])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "epoch": draw(st.integers(0, 2**40)),
    }


@settings(max_examples=60)
@given(configurations())
def test_equals_the_reference(c):
    order = make(c["sizes"], c["batch"], seed=c["seed"], lanes=c["lanes"], chunk=c["chunk"], window=c["window"])
    expected = ref_epoch(
        c["sizes"], c["batch"], seed=c["seed"], epoch=c["epoch"], lanes=c["lanes"], chunk=c["chunk"], window=c["window"]
    )
    assert epoch_ids(order, c["epoch"]) == expected


def test_equals_the_reference_where_every_permutation_is_a_feistel_network():
    sizes = [300, 1, 299]
    order = make(sizes, 4, seed=9, lanes=2, chunk=2, window=128)
    assert order.num_chunks > 64
    assert epoch_ids(order, 3) == ref_epoch(sizes, 4, seed=9, epoch=3, lanes=2, chunk=2, window=128)


@given(st.lists(st.one_of(st.integers(0, M64), st.text("abcdefgh", min_size=1, max_size=8)), max_size=5))
def test_key_equals_the_reference(parts):
    assert int(key(*parts)) == ref_key(*parts)


# ------------------------------------------------------------------------------------- what perm promises


def test_perm_is_a_bijection_for_every_small_n():
    for n in range(1, 301):
        assert sorted(perm(np.arange(n), n, 12345).tolist()) == list(range(n)), n


@settings(max_examples=25)
@given(st.integers(1, 50_000), st.integers(0, M64))
def test_perm_is_a_bijection(n, k):
    assert (np.sort(perm(np.arange(n), n, k)) == np.arange(n)).all()


@pytest.mark.parametrize("n", [5, 64, 65, 200])
def test_perm_broadcasts_keys_and_indices(n):
    i, k = np.arange(n)[:, None], key("test", np.arange(7))[None, :]
    table = perm(i, n, k)
    assert table.shape == (n, 7)
    for column in range(7):
        assert table[:, column].tolist() == [ref_perm(j, n, int(k[0, column])) for j in range(n)]


def test_perm_refuses_what_lies_outside():
    for i in (-1, 10):
        with pytest.raises(ValueError):
            perm(i, 10, 0)
    with pytest.raises(ValueError):
        perm(0, 0, 0)


def test_permutations_of_different_keys_look_independent():
    """Of every index, all images are about equally frequent: a network of too few rounds fails here."""
    for n in (24, 70):
        images = perm(np.arange(n)[:, None], n, key("keys", np.arange(4000))[None, :])
        counts = np.stack([np.bincount(row, minlength=n) for row in images])
        chi2_per_dof = ((counts - 4000 / n) ** 2 / (4000 / n)).sum() / (n * (n - 1))
        assert 0.8 < chi2_per_dof < 1.2, n


# ------------------------------------------------------------------------------------ what epochs promise


@settings(max_examples=60)
@given(configurations())
def test_no_sample_twice_and_few_left_out(c):
    order = make(c["sizes"], c["batch"], seed=c["seed"], lanes=c["lanes"], chunk=c["chunk"], window=c["window"])
    ids = epoch_ids(order, c["epoch"])
    assert len(set(ids)) == len(ids)
    assert set(ids) <= set(range(sum(c["sizes"])))
    assert sum(c["sizes"]) - len(ids) <= c["batch"] - 1


def test_those_left_out_change_with_the_epoch():
    order = make([97, 3, 55], 32, seed=4)
    left_out = [frozenset(range(155)) - frozenset(epoch_ids(order, e)) for e in range(12)]
    assert all(len(left) == 155 % 32 for left in left_out)
    assert not frozenset.intersection(*left_out[:6])
    assert len(set(left_out)) == 12


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_ids(make([500], 20, seed=s), e)) for s in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == 4


@given(st.integers(1, 300), st.data())
def test_ranks_share_the_batch_without_gap_or_overlap(batch, data):
    ranks = data.draw(st.integers(1, batch))
    slots = [rank_slots(r, ranks, batch) for r in range(ranks)]
    assert [s for first, last in slots for s in range(first, last)] == list(range(batch))
    sizes = {last - first for first, last in slots}
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@settings(max_examples=40)
@given(configurations(), st.data())
def test_concatenated_rank_slots_are_the_global_batch(c, data):
    order = make(c["sizes"], c["batch"], lanes=c["lanes"], chunk=c["chunk"], window=c["window"])
    position = data.draw(st.integers(0, order.steps_per_epoch - 1)) * c["batch"]
    ranks = data.draw(st.integers(1, c["batch"]))
    parts = [order.sample_ids(1, position + np.arange(*rank_slots(r, ranks, c["batch"]))) for r in range(ranks)]
    whole = order.sample_ids(1, position + np.arange(c["batch"]))
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize("ranks", [48, 56, 63, 120, 504])
def test_the_ranks_of_a_large_job_draw_the_batch_together(ranks):
    """B = 4096 over the ranks of whole nodes of 8, also where they do not divide it; the first step and the last."""
    order = make([10_000, 1, 9_999, 37_123], 4096, seed=11)
    for epoch, t in [(0, 0), (3, order.steps_per_epoch - 1)]:
        whole = order.sample_ids(epoch, t * 4096 + np.arange(4096))
        parts = [order.sample_ids(epoch, t * 4096 + np.arange(*rank_slots(r, ranks, 4096))) for r in range(ranks)]
        assert np.concatenate(parts).tolist() == whole.tolist()
        assert max(map(len, parts)) == -(-4096 // ranks)


def test_small_sets_get_small_chunks():
    for n, batch, asked, expected in [(1000, 10, 16, 16), (1000, 50, 16, 5), (100, 50, 16, 1), (8, 8, 64, 1)]:
        order = make([n], batch, chunk=asked)
        assert order.state.chunk == expected == min(asked, max(1, n // (4 * batch)))


def test_chunks_do_not_cross_shards_and_are_read_whole():
    """With one lane and a window of 1 the order is that of the chunks alone."""
    order = make([10, 25, 7], 1, lanes=1, chunk=4, window=1)
    ids = epoch_ids(order, 0)
    starts = {0, 4, 8, *range(10, 35, 4), 35, 39}
    runs = np.split(np.array(ids), [i for i in range(1, len(ids)) if ids[i] in starts])
    assert {r[0] for r in runs} == starts
    assert all((np.diff(r) == 1).all() for r in runs)


# -------------------------------------------------------------------------------------- state and resume


def test_a_late_position_costs_what_an_early_one_costs(monkeypatch):
    """The work is counted, not timed: how many indices go through `perm` once an epoch's tables stand."""
    worked: list[int] = []

    def counting(name: str) -> None:
        original = getattr(order_module, name)

        def function(*args: Any) -> np.ndarray:
            image = original(*args)
            worked.append(image.size)
            return image

        monkeypatch.setattr(order_module, name, function)

    order = make([50_000], 100, chunk=8)
    slots = np.arange(100)
    by_iteration = [order.sample_ids(0, t * 100 + slots).tolist() for t in range(500)]
    fresh = make([50_000], 100, chunk=8)
    fresh.sample_ids(0, 12_800 + slots)
    counting("perm")
    counting("perm_table")
    assert fresh.sample_ids(0, 0 + slots).tolist() == by_iteration[0]
    early = worked.copy()
    worked.clear()
    assert fresh.sample_ids(0, 44_700 + slots).tolist() == by_iteration[447]
    assert worked == early == [6400, 100]  # a window of all lanes, and among the chunks


def test_a_window_read_at_once_slot_by_slot_or_by_a_rank_is_the_same():
    """Three ways inside: a table of the window, one row of it, and rows that differ."""
    order, other = make([3000], 64, seed=2), make([3000], 64, seed=2)
    whole = order.sample_ids(1, np.arange(2944))
    assert whole.tolist() == [int(other.sample_ids(1, np.array([p]))[0]) for p in range(2944)]
    some = np.array([5, 64, 700, 2943])
    assert make([3000], 64, seed=2).sample_ids(1, some).tolist() == whole[some].tolist()
    assert make([3000], 64, seed=2).sample_ids(1, np.arange(1281, 1287)).tolist() == whole[1281:1287].tolist()


def test_state_survives_json_and_goes_on():
    order = make([40, 60], 16, seed=5, chunk=4)
    state, seen = order.state, []
    for step in range(20):
        if step == 9:
            stored = json.loads(json.dumps(state.to_dict()))
        seen.append((state.epoch, order.sample_ids(state.epoch, state.position + np.arange(16)).tolist()))
        state = order.next_state(state)
    assert [e for e, _ in seen] == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 2
    again = SampleOrder.resume(stored, [40, 60], manifest_sha="m", global_batch_size=16)
    assert json.loads(json.dumps(again.state.to_dict())) == stored
    state = again.state
    for step in range(9, 20):
        ids = again.sample_ids(state.epoch, state.position + np.arange(16)).tolist()
        assert (state.epoch, ids) == seen[step]
        state = again.next_state(state)


def test_a_larger_batch_after_a_resume_goes_on_or_begins_the_next_epoch():
    """With `--allow train.global_batch_size`: what is left of the epoch may be less than the new batch."""
    order = make([100], 20)
    state = order.next_state(order.next_state(order.state))
    grown = SampleOrder.resume(state.to_dict(), [100], manifest_sha="m", global_batch_size=40)
    assert (grown.state.epoch, grown.state.position) == (0, 40)
    state = order.next_state(order.next_state(state))
    assert state.position == 80
    grown = SampleOrder.resume(state.to_dict(), [100], manifest_sha="m", global_batch_size=40)
    assert (grown.state.epoch, grown.state.position) == (1, 0)
    grown.sample_ids(grown.state.epoch, grown.state.position + np.arange(40))


@given(st.integers(1, 6), st.data())
def test_skipped_ranges_are_jumped_over(batch, data):
    """After a roll-back: no step touches a skipped range, all others keep their places, and state tells it all."""
    n = data.draw(st.integers(batch, 60))
    steps = n // batch
    places = [(e, t * batch) for e in range(3) for t in range(steps)]
    skipped = set(data.draw(st.lists(st.sampled_from(places), max_size=len(places) - 1)))
    order = make([n], batch)
    stored = {**order.state.to_dict(), "skips": [[e, p, p + batch] for e, p in skipped]}
    order = SampleOrder.resume(json.loads(json.dumps(stored)), [n], manifest_sha="m", global_batch_size=batch)
    state, visited = order.state, []
    while state.epoch < 3:
        visited.append((state.epoch, state.position))
        state = order.next_state(state)
    assert visited == [place for place in places if place not in skipped]


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match="lower it to at most 9"):
        make([4, 5], 10)
    with pytest.raises(UserError, match=r"data.lanes=3 must divide train.global_batch_size=10"):
        make([100], 10, lanes=3)
    state = make([100], 10).state.to_dict()
    with pytest.raises(UserError, match=r"data.train has changed.*--allow data.train"):
        SampleOrder.resume(state, [100], manifest_sha="other", global_batch_size=10)
    with pytest.raises(UserError, match="version 2"):
        SampleOrder.resume({**state, "version": 2}, [100], manifest_sha="m", global_batch_size=10)
    with pytest.raises(UserError, match=r"data.lanes=10 must divide train.global_batch_size=15"):
        SampleOrder.resume(state, [100], manifest_sha="m", global_batch_size=15)
    with pytest.raises(UserError, match="lower it to at most 100"):
        SampleOrder.resume(state, [100], manifest_sha="m", global_batch_size=110)
    order = make([100], 10)
    for position in (-1, 100):
        with pytest.raises(ValueError):
            order.sample_ids(0, np.array([position]))


@settings(max_examples=25)
@given(st.integers(1, 5000), st.integers(0, M64))
def test_unperm_is_the_inverse(n, k):
    indices = np.arange(n)
    assert (order_module.unperm(perm(indices, n, k), n, k) == indices).all()


@pytest.mark.parametrize("sizes", [[64, 128], [0, 0, 5], [7] * 100, [100, 0, 1, 33] * 40, [64] * 90 + [1]])
def test_places_are_found_without_a_table_of_chunks(sizes):
    """Shards of whole chunks only, of less than one, and empty ones; few chunks and many."""
    order = make(sizes, 1, lanes=1, chunk=32, window=1, seed=3)
    c = order.state.chunk
    assert epoch_ids(order, 2) == ref_epoch(sizes, 1, seed=3, epoch=2, lanes=1, chunk=c, window=1)


def test_tables_grow_with_shards_not_with_samples():
    order = make([10_000_000, 9_999_990] * 50, 4096, chunk=64)
    order.sample_ids(0, np.arange(4096))
    assert order.num_chunks > 10**7
    assert sum(a.nbytes for a in order._short_chunks(0)) < 10_000
