"""Batches, bit for bit: the same for any number of ranks and workers, after any interruption, beside bad samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import Member, members, shards_of, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.augment import EvalTransform, TrainTransform
from pipeline.data.loader import PADDING, Batch, Request, Share, TrainSamples, eval_batches, step_digest, train_batches
from pipeline.data.order import SampleOrder
from pipeline.data.source import TarSource

SIZE, BATCH, SEED = 8, 12, 3
DROP_RATES = [0.0, 0.3, 0.5, 0.6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """55 samples in uneven shards: four steps of 12 an epoch."""
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": shards_of(members(55), [20, 1, 0, 23, 11])})


def make(folder: Path) -> tuple[TrainSamples, SampleOrder]:
    source = TarSource(folder, "train")
    samples = TrainSamples(
        source, TrainTransform(SIZE, SEED), channels=3, num_classes=3, drop_rates=DROP_RATES, seed=SEED
    )
    order = SampleOrder(
        source.shard_sizes, manifest_sha=source.digest, seed=SEED, global_batch_size=BATCH, chunk=4, window=8
    )
    return samples, order


class Slots(NamedTuple):
    """One step's global batch: all ranks' slots behind each other, without padding."""

    ids: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    keep: torch.Tensor
    crc32: torch.Tensor
    digest: int


def steps_of(
    folder: Path, count: int, *, ranks: int = 1, workers: int = 0, micro: int | None = None, skip: int = 0
) -> list[Slots]:
    """`count` global batches as `ranks` ranks load them, after `skip` steps that nobody loads."""
    streams: list[Iterator[list[Batch]]] = []
    shares = [Share.of(r, ranks, BATCH, micro) for r in range(ranks)]
    samples, order = make(folder)
    for _ in range(skip):
        order.state = order.next_state(order.state)
    for share in shares:
        streams.append(train_batches(samples, order, share, num_workers=workers))
    state, steps = order.state, []
    for per_rank in islice(zip(*streams), count):
        parts = []
        for share, batches in zip(shares, per_rank):
            assert len(batches) == share.micro_steps
            joined = [torch.cat([getattr(b, f) for b in batches]) for f in Slots._fields[:-1]]
            n = share.last - share.first
            assert (joined[0][n:] == PADDING).all() and (joined[3][n:] == 0).all() and (joined[1][n:] == 0).all()
            parts.append([t[:n] for t in joined])
        digest = sum(step_digest(state.position, s, b) for s, b in zip(shares, per_rank)) % 2**64
        steps.append(Slots(*[torch.cat(ts) for ts in zip(*parts)], digest))  # type: ignore[arg-type]
        state = order.next_state(state)
    return steps


def assert_equal(left: Sequence[Slots], right: Sequence[Slots]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        for name, x, y in zip(Slots._fields, a, b):
            assert x == y if isinstance(x, int) else torch.equal(x, y), name


@pytest.fixture(scope="module")
def reference(folder) -> list[Slots]:
    """Ten steps (two and a half epochs), made sample by sample without any loader."""
    samples, order = make(folder)
    state, steps = order.state, []
    for _ in range(10):
        ids = order.sample_ids(state.epoch, state.position + np.arange(BATCH))
        images, labels, keep, crcs = [], [], [], []
        for i in ids.tolist():
            pixels, label, crc = samples.source.read(i, 3)
            images.append(TrainTransform(SIZE, SEED)(pixels, state.epoch, i))
            labels.append(label)
            crcs.append(crc)
            keep.append(samples.keep(state.epoch, i))
        batch = Batch(
            torch.stack(images),
            torch.tensor(labels),
            torch.ones(BATCH),
            torch.stack(keep),
            torch.from_numpy(ids),
            torch.tensor(crcs),
            [],
        )
        digest = step_digest(state.position, Share.of(0, 1, BATCH, None), [batch])
        steps.append(Slots(batch.ids, batch.images, batch.labels, batch.weights, batch.keep, batch.crc32, digest))
        state = order.next_state(state)
    return steps


@pytest.mark.parametrize(
    "ranks, workers, micro",
    [(1, 0, None), (1, 2, 5), (2, 0, 4), (3, 0, 1), (3, 2, 3), (5, 0, None), (5, 0, 2), (7, 0, None), (12, 0, 1)],
)
def test_the_global_batch_is_the_same_for_any_ranks_workers_and_micro_batches(folder, reference, ranks, workers, micro):
    assert_equal(steps_of(folder, 6, ranks=ranks, workers=workers, micro=micro), reference[:6])


@pytest.mark.parametrize("skip", [1, 3, 4, 7])
def test_a_stream_begun_in_the_middle_is_the_uninterrupted_one(folder, reference, skip):
    assert_equal(steps_of(folder, 3, ranks=2, skip=skip), reference[skip : skip + 3])


def test_epochs_show_the_same_samples_with_other_pixels(reference):
    first = {int(i): image for s in reference[:4] for i, image in zip(s.ids, s.images)}
    second = {int(i): image for s in reference[4:8] for i, image in zip(s.ids, s.images)}
    common = first.keys() & second.keys()
    assert len(first) == len(second) == 48 and len(common) >= 41
    assert sum(torch.equal(first[i], second[i]) for i in common) < len(common) / 4


def test_the_same_sample_in_another_batch_has_the_same_pixels(folder, reference):
    samples, _ = make(folder)
    source = samples.source
    order = SampleOrder(source.shard_sizes, manifest_sha="", seed=99, global_batch_size=5)
    batches = train_batches(samples, order, Share.of(0, 1, 5, None), num_workers=0)
    known = {int(i): image for s in reference[:4] for i, image in zip(s.ids, s.images)}
    compared = 0
    for (batch,) in islice(batches, 11):
        for i, image in zip(batch.ids.tolist(), batch.images):
            if i in known:
                assert torch.equal(image, known[i])
                compared += 1
    assert compared == 48


def test_no_masks_where_nothing_is_dropped(folder):
    source = TarSource(folder, "train")
    samples = TrainSamples(source, TrainTransform(SIZE, 0), channels=3, num_classes=3, drop_rates=[0.0, 0.0])
    order = SampleOrder(source.shard_sizes, manifest_sha="", seed=0, global_batch_size=4)
    (batch,) = next(train_batches(samples, order, Share.of(0, 1, 4, None), num_workers=0))
    assert batch.keep.shape == (4, 0)


@given(st.integers(1, 500), st.data())
def test_every_rank_does_as_many_micro_steps(batch, data):
    ranks = data.draw(st.integers(1, batch))
    micro = data.draw(st.one_of(st.none(), st.integers(1, 600)))
    shares = [Share.of(r, ranks, batch, micro) for r in range(ranks)]
    assert len({(s.micro_batch_size, s.micro_steps) for s in shares}) == 1
    assert [i for s in shares for i in range(s.first, s.last)] == list(range(batch))
    room = shares[0].micro_batch_size * shares[0].micro_steps
    assert all(s.last - s.first <= room for s in shares)
    # No micro-step that is padding on every rank
    assert room - max(s.last - s.first for s in shares) < shares[0].micro_batch_size


def test_step_digests_tell_steps_apart(folder, reference):
    digests = [s.digest for s in reference]
    assert len(set(digests)) == len(digests)
    swapped = reference[0].ids.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    s = reference[0]
    share = Share.of(0, 1, BATCH, None)

    def digest(ids: torch.Tensor, weights: torch.Tensor) -> int:
        return step_digest(0, share, [Batch(s.images, s.labels, weights, s.keep, ids, s.crc32, [])])

    assert digest(s.ids, s.weights) == s.digest
    assert digest(swapped, s.weights) != s.digest
    masked = s.weights.clone()
    masked[5] = 0
    assert digest(s.ids, masked) != s.digest


# -------------------------------------------------------------------------------------------- bad samples


def test_bad_samples_count_nothing_and_shift_nothing(folder, reference, tmp_path):
    """Flipped byte, bytes that are no image, label out of range: the other slots stay bit-equal."""
    samples = members(55)
    samples[3] = samples[3]._replace(crc32=1)
    samples[30] = Member(b"hello" * 20, samples[30].label)
    samples[40] = samples[40]._replace(label=-1)
    samples[54] = samples[54]._replace(label=3)
    bad = {
        3: "crc32",
        30: "cannot identify image",
        40: r"sample 40: label -1 outside \[0, 3\): it has no single class \(several labels, or none\)",
        54: r"label 3 outside \[0, 3\)$",
    }
    broken = write_dataset(tmp_path, {"train": shards_of(samples, [20, 1, 0, 23, 11])})
    seen = set()
    for expected, found in zip(reference[:8], steps_of(broken, 8, ranks=3, micro=2)):
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.keep, expected.keep)
        is_bad = torch.tensor([int(i) in bad for i in found.ids])
        assert torch.equal(found.images[~is_bad], expected.images[~is_bad])
        assert torch.equal(found.labels[~is_bad], expected.labels[~is_bad])
        assert torch.equal(found.weights, (~is_bad).float())
        assert (found.images[is_bad] == 0).all() and (found.labels[is_bad] == 0).all()
        assert (found.digest == expected.digest) == (not is_bad.any())
        seen |= set(found.ids[is_bad].tolist())
    assert seen == set(bad)
    broken_samples, _ = make(broken)
    for i, why in bad.items():
        (error,) = broken_samples[Request(np.array([0]), np.array([i]))].errors
        assert re.search(why, error)


def test_errors_travel_with_their_micro_batch(tmp_path):
    samples = members(8)
    samples[5] = samples[5]._replace(crc32=1)
    source = TarSource(write_dataset(tmp_path, {"train": [samples]}), "train")
    loader = TrainSamples(source, TrainTransform(SIZE, 0), channels=3, num_classes=3)
    order = SampleOrder([8], manifest_sha="", seed=0, global_batch_size=8)
    batches = next(train_batches(loader, order, Share.of(0, 1, 8, 2), num_workers=1))
    for batch in batches:
        assert len(batch.errors) == int(5 in batch.ids.tolist())
        assert all("train-000000.tar row 5: crc32" in e for e in batch.errors)


# --------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("batch_size, workers", [(1, 0), (8, 0), (100, 0)])
def test_evaluation_sees_each_sample_once(folder, world_size, batch_size, workers):
    source = TarSource(folder, "train")
    samples = TrainSamples(source, EvalTransform(SIZE), channels=3, num_classes=3)
    ids, lengths = [], set()
    for rank in range(world_size):
        batches = list(
            eval_batches(samples, rank=rank, world_size=world_size, batch_size=batch_size, num_workers=workers)
        )
        lengths.add(len(batches))
        for b in batches:
            assert b.images.shape == (batch_size, 3, SIZE, SIZE)
            assert torch.equal(b.weights > 0, b.ids != PADDING)
            ids += b.ids[b.weights > 0].tolist()
    assert ids == list(range(55))
    assert len(lengths) == 1


def test_evaluation_with_workers_gives_the_same_batches(folder):
    source = TarSource(folder, "train")
    samples = TrainSamples(source, EvalTransform(SIZE), channels=3, num_classes=3)
    plain, forked = (list(eval_batches(samples, rank=0, world_size=1, batch_size=5, num_workers=w)) for w in (0, 2))
    assert len(plain) == len(forked) == 11
    for a, b in zip(plain, forked):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.ids, b.ids)
