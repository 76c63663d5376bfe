"""RandAugment and MixUp on real ranks: the same samples, mixtures and losses on any number of them."""

from __future__ import annotations

import pytest
from mixer_process import undisturbed_run

from pipeline.run import read_digests, read_metrics

AUGMENTED = [
    "augment.randaugment_magnitude=15",
    "augment.mixup_alpha=0.5",
    "loss.name=sigmoid_xent",
    "train.duration=10 steps",
]


@pytest.mark.slow
def test_one_two_and_three_ranks_train_alike(tmp_path):
    runs = [undisturbed_run(tmp_path, n, *AUGMENTED) for n in (1, 2, 3)]
    digests = [list(read_digests(run).values()) for run in runs]
    losses = [[row["loss"] for row in read_metrics(run)] for run in runs]
    assert len(losses[0]) == 10 and digests[0] == digests[1] == digests[2]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6, rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6, rel=1e-6)
