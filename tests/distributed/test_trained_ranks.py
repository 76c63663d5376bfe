"""Features and logits of a trained model are the same on any number of ranks, whole or sharded over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import science_cases as cases
import torch

from pipeline.model import create_model
from pipeline.weights.importing import write_imported

# No size is a multiple of anything, as in engine_cases
SHAPE = {"patch_size": 5, "hidden_dim": 26, "num_blocks": 2, "tokens_mlp_dim": 3, "channels_mlp_dim": 17}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    model = create_model("mixer_s16", cases.CLASSES, cases.IMAGE, **SHAPE)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    settings = {f"model.{k}": v for k, v in SHAPE.items()}
    config = {"model.name": "mixer_s16", "model.image_size": cases.IMAGE, "train.precision": "fp32", **settings}
    write_imported(folder, dict(model.state_dict()), config, None, {})
    return folder


@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (3, "fsdp"), (4, "zero3")])
def test_few_shot_accuracies_are_those_of_one_rank(ranks, run, size, strategy):
    ((alone, samples, whole),) = ranks(1).run(cases.fewshot, str(run), "ddp")
    results = ranks(size).run(cases.fewshot, str(run), strategy)
    assert samples == 97 and len(alone) == 4
    for top1, count, held in results:
        assert top1 == alone and count == samples
        assert held == whole if strategy == "ddp" else held < 0.75 * whole
    assert strategy == "ddp" or sum(held for _, _, held in results) == whole


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_logits_are_those_of_one_rank(ranks, run, strategy):
    (alone,) = ranks(1).run(cases.logits, str(run), "ddp")
    assert torch.allclose(torch.cat(ranks(3).run(cases.logits, str(run), strategy)), alone, atol=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3", pytest.param("zero1", marks=pytest.mark.slow)])
def test_the_probe_during_training_sees_the_same_features(ranks, strategy):
    (alone,) = ranks(1).run(cases.fewshot_in_training, "ddp")
    assert all(top1 == alone for top1 in ranks(3).run(cases.fewshot_in_training, strategy))
