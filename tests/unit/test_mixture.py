"""The order of mixtures: pinned values, an independent reference, and what it promises for every configuration."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_reference import ref_mixture

from data_tools.errors import UserError
from pipeline.data.mixture import MixedSet, MixtureOrder, quotas
from pipeline.data.order import rank_slots

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mixture.json").read_text())


def make(sets: list[tuple[float, list[int]]], batch: int, **options: Any) -> MixtureOrder:
    mixed = [MixedSet(f"set{i}", w, sizes, f"sha{i}", sum(sizes)) for i, (w, sizes) in enumerate(sets)]
    return MixtureOrder(mixed, **{"seed": 0, "global_batch_size": batch, **options})


def triples(order: MixtureOrder, count: int, epoch: int = 0) -> list[tuple[int, int, int]]:
    """(set, its epoch, sample of the set) at the first positions."""
    drawn = order.draw(epoch, np.arange(count))
    owner = np.searchsorted(order.first_ids, drawn.ids, side="right") - 1
    return list(zip(owner.tolist(), drawn.epochs.tolist(), (drawn.ids - order.first_ids[owner]).tolist()))


@pytest.mark.parametrize("case", GOLDEN["mixtures"], ids=lambda c: c["name"])
def test_golden_mixtures(case):
    order = make([(s["weight"], s["sizes"]) for s in case["sets"]], case["global_batch_size"], **case["options"])
    assert json.loads(json.dumps(order.state.to_dict())) == case["state"]
    for rows in case["samples"]:
        drawn = order.draw(rows["epoch"], rows["first"] + np.arange(len(rows["ids"])))
        assert drawn.ids.tolist() == rows["ids"]
        assert drawn.epochs.tolist() == rows["epochs"]


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda s: sum(s) > 0)
    weight = st.sampled_from([0.1, 0.25, 0.7, 1, 3])
    return {
        "sets": [(draw(weight), draw(sizes)) for _ in range(count)],
        "batch": draw(st.integers(1, 24)),
        "block": draw(st.sampled_from([64, 65, 100, 240])),
        "chunk": draw(st.integers(1, 20)),
        "window": draw(st.sampled_from([1, 7, 64])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


@settings(max_examples=40)
@given(mixtures(), st.sampled_from([0, 5]))
def test_equals_the_reference(c, first_epoch):
    order = make(
        c["sets"], c["batch"], block=c["block"], chunk=c["chunk"], window=c["window"], seed=c["seed"]
    )  # fmt: skip
    states = order.state.sets
    sets = [
        {"quota": s.quota, "sizes": sizes, "lanes": s.lanes, "chunk": s.chunk, "window": s.window}
        for s, (_, sizes) in zip(states, c["sets"])
    ]
    expected = ref_mixture(sets, 300, seed=c["seed"], block=c["block"], first_epoch=first_epoch)
    assert triples(order, 300, first_epoch) == expected


@settings(max_examples=40)
@given(mixtures())
def test_every_set_has_its_share_of_every_block_and_its_samples_once_an_epoch(c):
    order = make(c["sets"], c["batch"], block=c["block"], chunk=c["chunk"], window=c["window"], seed=c["seed"])
    rows = triples(order, 4 * c["block"])
    for at in range(0, len(rows), c["block"]):
        owners = Counter(i for i, _, _ in rows[at : at + c["block"]])
        assert [owners[i] for i in range(len(c["sets"]))] == [s.quota for s in order.state.sets]
    for i in range(len(c["sets"])):
        own = [e for s, e, _ in rows if s == i]
        assert own == sorted(own)  # one epoch after the other
    counts = Counter(rows)
    assert set(counts.values()) == {1}
    for i, (state, own) in enumerate(zip(order.state.sets, order.orders)):
        done = 4 * state.quota // own.epoch_length  # finished epochs of the set
        for e in range(done):
            assert sum(1 for s, n, _ in counts if (s, n) == (i, e)) == own.epoch_length
        assert state.samples - own.epoch_length < state.lanes <= max(1, c["batch"])


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.0, 2.5]), min_size=1, max_size=6), st.integers(64, 5000))
def test_quotas_are_the_weights_by_largest_remainder(weights, block):
    q = quotas(weights, block)
    total = sum(Fraction(str(w)) for w in weights)
    assert sum(q) == block
    assert all(abs(n - Fraction(str(w)) / total * block) < 1 for n, w in zip(q, weights))
    assert quotas([0.7, 0.3], 1000) == [700, 300]
    assert quotas([1, 1, 1], 100) == [34, 33, 33]


def test_from_a_batch_of_1000_on_every_batch_has_the_same_make_up():
    order = make([(0.7, [9000]), (0.3, [5000])], 1000)
    for t in range(5):
        ids = order.sample_ids(0, t * 1000 + np.arange(1000))
        assert (ids < 9000).sum() == 700
    assert make([(1, [900]), (1, [900])], 64).block == 1024


@pytest.mark.parametrize("ranks", [48, 56, 63, 120, 504])
def test_the_ranks_of_a_large_job_draw_the_batch_together(ranks):
    order = make([(0.6, [30_000, 20_000]), (0.3, [25_000]), (0.1, [3000])], 4096)
    for t in (0, 7, 100):
        whole = order.draw(0, t * 4096 + np.arange(4096))
        parts = [order.draw(0, t * 4096 + np.arange(*rank_slots(r, ranks, 4096))) for r in range(ranks)]
        assert np.concatenate([p.ids for p in parts]).tolist() == whole.ids.tolist()
        assert np.concatenate([p.epochs for p in parts]).tolist() == whole.epochs.tolist()


def test_state_survives_json_and_goes_on_also_with_another_batch():
    sets = [(0.5, [40, 60]), (0.5, [33])]
    mixed = [MixedSet(f"set{i}", w, sizes, f"sha{i}", sum(sizes)) for i, (w, sizes) in enumerate(sets)]
    order = make(sets, 16, seed=5, chunk=4)
    state = order.state
    for _ in range(9):
        state = order.next_state(state)
    stored = json.loads(json.dumps(state.to_dict()))
    again = MixtureOrder.resume(stored, mixed, global_batch_size=24)
    assert json.loads(json.dumps(again.state.to_dict())) == stored
    ahead = np.arange(9 * 16, 9 * 16 + 500)
    assert again.sample_ids(0, ahead).tolist() == order.sample_ids(0, ahead).tolist()
    assert again.next_state(again.state).position == 9 * 16 + 24


def test_skipped_ranges_are_jumped_over():
    order = make([(1, [50]), (1, [50])], 10)
    stored = {**order.state.to_dict(), "skips": [[0, 10, 20], [0, 20, 30], [1, 30, 40]]}
    mixed = [MixedSet(f"set{i}", 1, [50], f"sha{i}", 50) for i in range(2)]
    order = MixtureOrder.resume(stored, mixed, global_batch_size=10)
    state, visited = order.state, []
    while state.position < 60:
        visited.append(state.position)
        state = order.next_state(state)
    assert visited == [0, 30, 40, 50]


def test_sets_smaller_than_their_share_of_a_batch_repeat():
    order = make([(0.5, [1000]), (0.5, [3])], 64)
    rows = triples(order, 640)
    small = Counter((e, s) for i, e, s in rows if i == 1)
    assert set(small.values()) == {1} and max(e for e, _ in small) > 90


def test_refusals_say_what_to_do():
    with pytest.raises(UserError, match=r"set1 would get no slot in a block of 1000; give it at least 0.001"):
        make([(1.0, [500]), (0.0001, [500])], 1000)
    with pytest.raises(UserError, match="set0 has no samples"):
        make([(1, [0]), (1, [5])], 4)
