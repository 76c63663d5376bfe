"""B = 64 on 1, 2, 3, 5 and 7 real processes, with 0 to 8 workers, stopped and gone on with in between: the same
batches, bit for bit (ids, augmented pixels, MixUp partners, masks), and losses within 1e-6.

The data is a mixture, shares are uneven, batches are accumulated, and every augmentation is on.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import elastic_cases as cases
import pytest
from helpers import TINY_MODEL, members, shards_of, write_dataset

from pipeline.audit import audit
from pipeline.config import load_config
from pipeline.run import RunFolder, read_digests, read_metrics

STEPS = 9
TOLERANCE = 1e-6


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("elastic")
    write_dataset(root / "a", {"train": shards_of(members(300), [120, 100, 80])})
    write_dataset(root / "b", {"train": shards_of(members(90, first=300), [50, 40])})
    return [
        f"data.train=[{{path: {root / 'a'}, weight: 0.7}}, {{path: {root / 'b'}, weight: 0.3}}]",
        "data.val=none",
        *TINY_MODEL[:-1],
        "model.num_classes=3",
        "model.drop_path_rate=0.2",
        "augment.randaugment_magnitude=15",
        "augment.mixup_alpha=0.5",
        "train.global_batch_size=64",
        "train.precision=fp32",
        "train.strategy=ddp",
        f"train.duration={STEPS} steps",
        "optimizer.lr=0.01",
        "checkpoint.every=100 steps",
        "logging.every=1 steps",
        "logging.to=[]",
    ]


@cache
def undisturbed(ranks, root: Path, settings: tuple[str, ...]) -> tuple[cases.Seen, dict[int, float]]:
    """One process, no workers, whole batches, from the first step to the last."""
    overrides = [*settings, "data.num_workers=0", "train.micro_batch_size=64"]
    (seen,) = ranks(1).run(cases.train_part, str(root), overrides, None)
    return seen, {row["step"]: row["loss"] for row in read_metrics(root)}


@pytest.fixture
def reference(ranks, settings, tmp_path_factory) -> tuple[cases.Seen, dict[int, float]]:
    root = tmp_path_factory.getbasetemp() / "elastic-reference"
    return undisturbed(ranks, root, tuple(settings))


def merged(parts: list[cases.Seen]) -> cases.Seen:
    """What all ranks saw; no slot twice."""
    whole: cases.Seen = {}
    for part in parts:
        for step, slots in part.items():
            assert not whole.setdefault(step, {}).keys() & slots.keys()
            whole[step].update(slots)
    return whole


def assert_same(run: Path, seen: cases.Seen, reference: tuple[cases.Seen, dict[int, float]]) -> None:
    expected, losses = reference
    assert seen.keys() == expected.keys()
    for step in expected:
        assert dict(sorted(seen[step].items())) == expected[step], step
    own = {row["step"]: row["loss"] for row in read_metrics(run)}
    assert own.keys() == losses.keys()
    assert max(abs(own[step] - losses[step]) for step in losses) <= TOLERANCE
    report = audit(load_config(str(run / "config.yaml")).config, RunFolder(run))
    assert report.faults == [] and report.steps == STEPS


def write_config(run: Path, overrides: list[str]) -> None:
    """The audit reads it; in a pool nobody takes over the run folder."""
    from pipeline.config import to_yaml

    RunFolder(run).config.write_text(to_yaml(load_config(None, [*overrides, f"run.dir={run}"]).config))


@pytest.mark.parametrize(
    ("size", "workers", "micro"),
    [
        (2, 3, 7),
        (3, 0, 5),
        pytest.param(5, 1, 13, marks=pytest.mark.slow),
        pytest.param(7, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_sees_the_same_batches(ranks, tmp_path, settings, reference, size, workers, micro) -> None:
    overrides = [*settings, f"data.num_workers={workers}", f"train.micro_batch_size={micro}"]
    seen = merged(ranks(size).run(cases.train_part, str(tmp_path), overrides, None))
    write_config(tmp_path, overrides)
    assert_same(tmp_path, seen, reference)


@pytest.mark.slow
def test_ranks_and_workers_that_change_in_mid_run(ranks, tmp_path, settings, reference) -> None:
    seen: cases.Seen = {}
    plan = [(2, 8, 5, 2), (7, 0, 4, 3), (3, 5, 22, 5), (5, 1, 6, 6), (1, 4, 9, 8), (2, 0, 32, STEPS)]
    for size, workers, micro, stop_at in plan:
        overrides = [*settings, f"data.num_workers={workers}", f"train.micro_batch_size={micro}"]
        part = merged(ranks(size).run(cases.train_part, str(tmp_path), overrides, stop_at))
        assert not part.keys() & seen.keys()
        seen.update(part)
    write_config(tmp_path, settings)
    assert_same(tmp_path, seen, reference)


def test_the_reference_is_what_it_should_be(reference, settings) -> None:
    """MixUp and both sets are at work: else the comparisons above would show little."""
    seen, losses = reference
    assert sorted(seen) == sorted(losses) == list(range(1, STEPS + 1))
    assert all(sorted(slots) == list(range(64)) for slots in seen.values())
    ids = [i for slots in seen.values() for i, _ in slots.values()]
    assert sum(i >= 300 for i in ids) == pytest.approx(0.3 * len(ids), rel=0.15)
    assert len({digest for slots in seen.values() for _, digest in slots.values()}) == 64 * STEPS


def test_digests_in_the_ledger_are_those_of_any_number_of_ranks(reference, tmp_path_factory) -> None:
    digests = read_digests(tmp_path_factory.getbasetemp() / "elastic-reference")
    assert [(e, p) for e, p, _ in digests.values()] == [(0, 64 * t) for t in range(STEPS)]
