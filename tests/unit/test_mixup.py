"""MixUp: who is mixed with whom and how much, bit for bit the same however the batch is divided."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import members, shards_of, train, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import UserError
from pipeline.data.augment import TrainTransform, normalize, uniforms
from pipeline.data.loader import PADDING, Batch, MicroBatches, Share, TrainSamples, step_digest, train_batches
from pipeline.data.mixup import MixUp, larger_beta, mix_images, mix_targets
from pipeline.data.order import SampleOrder
from pipeline.data.randaugment import RandAugment
from pipeline.data.source import TarSource
from pipeline.losses import make_loss
from pipeline.run import read_digests, read_metrics

SIZE, BATCH, SEED, CLASSES = 8, 12, 3, 3
TRANSFORM = TrainTransform(SIZE, SEED, randaugment=RandAugment(2, 15))


# ------------------------------------------------------------------------------------------ the weights


def below(alpha: float, x: float) -> float:
    """P(a <= x) of Beta(alpha, alpha), where it has a closed form."""
    return {0.5: 2 / math.pi * math.asin(math.sqrt(x)), 1.0: x, 2.0: 3 * x**2 - 2 * x**3}[alpha]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_weights_are_the_larger_part_of_a_beta(alpha):
    draws = 4000
    found = np.sort([larger_beta(alpha, *uniforms("mixup", 1, 0, i, 2)) for i in range(draws)])
    expected = np.array([below(alpha, x) - below(alpha, 1 - x) for x in found])
    steps = np.arange(draws + 1) / draws
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance * math.sqrt(draws) < 1.63  # Kolmogorov-Smirnov at 1%


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_weights_have_a_betas_variance(alpha):
    found = np.array([larger_beta(alpha, *uniforms("mixup", 2, 0, i, 2)) for i in range(4000)])
    assert ((found - 0.5) ** 2).mean() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


@given(st.floats(1e-6, 1e6), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_any_draw_gives_a_weight(alpha, u, v):
    assert 0.5 <= larger_beta(alpha, u, v) <= 1


def test_weights_hang_on_seed_epoch_and_place_of_the_group():
    mixup, slots = MixUp(0.5, 4, seed=1), np.arange(12)
    weights = mixup.weights(2, 24, slots)
    assert weights.dtype == np.float32
    assert (weights.reshape(3, 4) == weights.reshape(3, 4)[:, :1]).all() and len(set(weights.tolist())) == 3
    assert np.array_equal(mixup.weights(2, 24, slots[5:7]), weights[5:7])
    # Where a group begins in the epoch says which it is: also when the batch size has changed meanwhile
    assert np.array_equal(mixup.weights(2, 28, slots[:8]), weights[4:])
    for other in (mixup.weights(3, 24, slots), MixUp(0.5, 4, seed=2).weights(2, 24, slots)):
        assert not (other == weights).any()


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_partners_go_round_in_each_group(group, groups, data):
    mixup = MixUp(0.5, group, 0)
    everyone = mixup.partners(np.arange(group * groups))
    for i in range(groups):
        first = i * group
        assert everyone[first : first + group].tolist() == [*range(first + 1, first + group), first]
    a = data.draw(st.integers(0, group * groups - 1))
    b = data.draw(st.integers(a + 1, group * groups))
    mine = np.arange(a, b)
    assert np.array_equal(mixup.partners(mine), everyone[a:b])
    assert len(set(everyone[a:b].tolist()) - set(mine.tolist())) <= 2


# ------------------------------------------------------------------------------------------ the batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": shards_of(members(55), [20, 1, 0, 23, 11])})


def make(folder: Path) -> tuple[TrainSamples, SampleOrder]:
    source = TarSource(folder, "train")
    samples = TrainSamples(source, TRANSFORM, channels=3, num_classes=CLASSES, drop_rates=[0.0, 0.5], seed=SEED)
    order = SampleOrder(source.shard_sizes, manifest_sha=source.digest, seed=SEED, global_batch_size=BATCH, chunk=4)
    return samples, order


def mixed(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model and the loss get: images fp32 [m, C, H, W] and targets [m, K]."""
    images = mix_images(normalize(batch.images), batch.partners, batch.mix)
    return images, mix_targets(batch.labels, batch.partners, batch.mix, CLASSES)


def one_by_one(folder: Path, group: int, steps: int, bad: frozenset[int] = frozenset()) -> list[tuple]:
    """(ids, images, targets) of each step: every slot on its own, in float32 arithmetic of numpy."""
    samples, order = make(folder)
    state, found = order.state, []
    for _ in range(steps):
        ids = order.sample_ids(state.epoch, state.position + np.arange(BATCH)).tolist()
        pixels, targets = [], []
        for slot, sample in enumerate(ids):
            first = slot // group * group
            partner = ids[slot + 1 if slot + 1 < first + group else first]
            u, v = uniforms("mixup", SEED, state.epoch, state.position + first, 2)
            a = np.float32(1 if partner in bad else larger_beta(0.5, u, v))
            target = np.zeros(CLASSES, dtype=np.float32)
            image = np.zeros((3, SIZE, SIZE), dtype=np.float32)
            for who, share in [(sample, a), (partner, np.float32(1) - a)]:
                if who not in bad:
                    row = samples.row(state.epoch, who)
                    image += (row.image.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)) * share
                    target[row.label] += share
            pixels.append(image)
            targets.append(target)
        found.append((ids, np.stack(pixels), np.stack(targets)))
        state = order.next_state(state)
    return found


DIVISIONS = [(1, 0, None), (2, 0, 4), (3, 0, 1), (5, 0, None), (5, 0, 2), (12, 0, 1)]


@pytest.mark.parametrize(
    "group, ranks, workers, micro",
    [(g, *d) for g in (12, 4, 3, 2, 1) for d in DIVISIONS] + [(12, 1, 2, 5), (3, 3, 1, 1)],
)
def test_the_mixed_batch_is_the_same_for_any_ranks_workers_and_micro_batches(folder, group, ranks, workers, micro):
    samples, order = make(folder)
    mixup = MixUp(0.5, group, SEED)
    shares = [Share.of(r, ranks, BATCH, micro) for r in range(ranks)]
    streams = [train_batches(samples, order, s, num_workers=workers, mixup=mixup) for s in shares]
    state = order.state
    plain = train_batches(samples, order, Share.of(0, 1, BATCH, None), num_workers=0)
    for (ids, images, targets), per_rank, unmixed in zip(one_by_one(folder, group, 5), zip(*streams), plain):
        slot, digest = 0, 0
        for share, batches in zip(shares, per_rank):
            left = share.last - share.first
            for b in batches:
                m = len(b.weights)
                assert len(b.images) - m <= 2 and len(b.labels) == len(b.images)
                assert len(b.ids) == len(b.crc32) == len(b.keep) == len(b.partners) == len(b.mix) == m
                got, shares_of_classes = mixed(b)
                n = min(m, left)
                assert b.ids[:n].tolist() == ids[slot : slot + n] and (b.ids[n:] == PADDING).all()
                assert np.array_equal(got[:n].numpy(), images[slot : slot + n])
                assert np.array_equal(shares_of_classes[:n].numpy(), targets[slot : slot + n])
                slot, left = slot + n, left - n
            digest += step_digest(state.position, share, batches)
        assert slot == BATCH
        # The ledger speaks of a step's own slots: partners change nothing in it
        assert digest % 2**64 == step_digest(state.position, Share.of(0, 1, BATCH, None), unmixed)
        state = order.next_state(state)


def test_nothing_is_mixed_with_a_bad_sample_and_only_its_own_rank_tells_of_it(folder, tmp_path):
    bad = frozenset({3, 30, 54})
    broken = members(55)
    for i in bad:
        broken[i] = broken[i]._replace(crc32=1)
    damaged = write_dataset(tmp_path, {"train": shards_of(broken, [20, 1, 0, 23, 11])})
    expected = one_by_one(folder, 6, 8, bad)
    samples, order = make(damaged)
    shares = [Share.of(r, 5, BATCH, 1) for r in range(5)]
    streams = [train_batches(samples, order, s, num_workers=0, mixup=MixUp(0.5, 6, SEED)) for s in shares]
    for (ids, images, targets), per_rank in zip(expected, zip(*streams)):
        batches = [b for s, bs in zip(shares, per_rank) for b in bs[: s.last - s.first]]
        for slot, b in enumerate(batches):
            assert b.weights.tolist() == [float(ids[slot] not in bad)]
            assert len(b.errors) == (ids[slot] in bad)
            if b.weights:
                got, shares_of_classes = mixed(b)
                assert np.array_equal(got[0].numpy(), images[slot])
                assert np.array_equal(shares_of_classes[0].numpy(), targets[slot])


# -------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["softmax_xent", "sigmoid_xent"])
def test_the_loss_of_a_mixture_is_the_mixture_of_losses(name, smoothing):
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(6, 5, generator=g), torch.tensor([0, 4, 2, 2, 1, 3, 3, 0])
    partners, a = torch.tensor([1, 2, 3, 6, 7, 5]), torch.tensor([0.5, 0.7, 0.9, 0.6, 1.0, 0.8])
    loss = make_loss(name, smoothing)
    expected = a * loss(logits, labels[:6]) + (1 - a) * loss(logits, labels[partners])
    targets = mix_targets(labels, partners, a, 5)
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert torch.allclose(loss(logits, targets), expected, atol=1e-6)


AUGMENTED = ["augment.randaugment_magnitude=15", "augment.mixup_alpha=0.5", "model.drop_path_rate=0.1"]


@pytest.mark.parametrize("loss", ["softmax_xent", "sigmoid_xent"])
def test_training_is_the_same_for_any_micro_batch(tmp_path, loss):
    runs = {}
    for name, *extra in [("whole", "train.micro_batch_size=16"), ("parts", "train.micro_batch_size=5"), ("plain",)]:
        mixing = AUGMENTED if extra else []
        assert train(tmp_path / name, *mixing, *extra, f"loss.name={loss}") == 0
        runs[name] = [r["loss"] for r in read_metrics(tmp_path / name)]
    assert runs["parts"] == pytest.approx(runs["whole"], abs=1e-6 if loss == "softmax_xent" else 1e-5)
    assert runs["plain"] != pytest.approx(runs["whole"], abs=1e-3)
    digests = [list(read_digests(tmp_path / name).values()) for name in runs]
    assert digests[0] == digests[1] == digests[2]


def test_a_resumed_training_goes_on_with_the_same_mixtures(tmp_path):
    assert train(tmp_path / "parts", *AUGMENTED, "train.duration=4 steps", "scheduler.name=constant") == 0
    assert train(tmp_path / "parts", *AUGMENTED, "scheduler.name=constant") == 0
    assert train(tmp_path / "constant", *AUGMENTED, "scheduler.name=constant") == 0
    losses = {n: {r["step"]: r["loss"] for r in read_metrics(tmp_path / n)} for n in ("parts", "constant")}
    assert losses["parts"] == losses["constant"]


def test_groups_divide_the_batch(tmp_path):
    with pytest.raises(UserError, match=r"augment.mixup_group \(5\) does not divide"):
        train(tmp_path, *AUGMENTED, "augment.mixup_group=5")
    with pytest.raises(UserError, match=r"augment.mixup_alpha: -1"):
        train(tmp_path, "augment.mixup_alpha=-1")


@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_rows_of_partners_point_at_partners(groups, group, data):
    """For any division of the batch, without decoding: ids stand for images."""
    batch = groups * group
    ranks = data.draw(st.integers(1, batch))
    rank = data.draw(st.integers(0, ranks - 1))
    micro = data.draw(st.none() | st.integers(1, batch))
    order = SampleOrder([batch * 3], manifest_sha="", seed=1, global_batch_size=batch)
    share = Share.of(rank, ranks, batch, micro)
    mixup = MixUp(0.5, group, 1)
    requests = list(islice(MicroBatches(order, order.state, share, mixup), share.micro_steps))
    slots = np.arange(share.first, share.last)
    own = order.sample_ids(0, slots)
    partner = order.sample_ids(0, mixup.partners(slots))
    m = share.micro_batch_size
    assert np.array_equal(np.concatenate([r.ids[:m] for r in requests])[: len(slots)], own)
    assert np.array_equal(np.concatenate([r.ids[r.partners] for r in requests])[: len(slots)], partner)
    assert all(len(r.ids) <= m + 2 and len(r.partners) == len(r.mix) == m for r in requests)
