"""timm's models by name: built, trained, evaluated, exported and imported like a Mixer; randomness keyed by sample."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from helpers import as_before, train

from data_tools.errors import UserError
from pipeline.cli_eval import run_eval, run_fewshot
from pipeline.model import create_model, initial_values, list_models, model_cost
from pipeline.weights.commands import run_export, run_import
from pipeline.weights.trained import TrainedModel, head_of

pytestmark = pytest.mark.compare


@pytest.fixture(scope="module", autouse=True)
def timm():
    from pipeline.model.timm_compat import import_timm

    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm or torchvision is not installed: {error}")


VIT = {"patch_size": 8, "hidden_dim": 64, "num_blocks": 2}


def test_names_and_mistakes():
    assert {"timm/vit_base_patch16_224", "timm/resnetv2_50x1_bit", "timm/halonet50ts", "timm/dm_nfnet_f4"} <= set(
        list_models()
    )
    with pytest.raises(UserError, match="did you mean timm/vit_base_patch16_224"):
        create_model("timm/vit_base_patch_16_224")
    with pytest.raises(UserError, match=r"no setting model\.channels_mlp_dim"):
        create_model("timm/vit_base_patch16_224", channels_mlp_dim=3, device="meta")
    with pytest.raises(UserError, match="multiple of 128"):
        create_model("timm/resnetv2_50x1_bit", hidden_dim=100, device="meta")
    with pytest.raises(UserError, match=r"model\.drop_rate: a Mixer has no dropout"):
        create_model("mixer_b16", drop_rate=0.1)


def test_sizes_are_the_published_ones():
    """ViT-B/16 86.6M and 17.6 GMAC, BiT-R50x1 25.5M, NFNet-F0 71.5M (their papers and timm's tables)."""
    vit, bit = model_cost("timm/vit_base_patch16_224"), model_cost("timm/resnetv2_50x1_bit")
    assert (vit.parameters, bit.parameters) == (86_567_656, 25_549_352)
    assert vit.forward_macs / 1e9 == pytest.approx(17.6, abs=0.1)
    assert model_cost("timm/dm_nfnet_f0", image_size=192).parameters == 71_489_284


def test_values_are_timms_own_with_a_head_of_zeros_and_depend_on_the_seed():
    shape = {"num_classes": 5, "image_size": 16, **VIT}
    model = create_model("timm/vit_base_patch16_224", seed=3, head_bias=-2.0, **shape)
    assert head_of(model).weight.abs().max() == 0 and (head_of(model).bias == -2).all()
    values = initial_values("timm/vit_base_patch16_224", shapes={}, seed=3, head_bias=-2.0, **shape)
    assert all(torch.equal(values(n), p) for n, p in model.state_dict().items())
    other = create_model("timm/vit_base_patch16_224", seed=4, **shape)
    assert not torch.equal(other.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_stochastic_depth_and_dropout_are_functions_of_the_samples_mask():
    model = create_model("timm/vit_base_patch16_224", 5, 16, drop_path_rate=0.4, drop_rate=0.25, **VIT).train()
    torch.nn.init.normal_(head_of(model).weight, generator=torch.Generator().manual_seed(0))
    rates = model.drop_rates()
    assert rates[:2] == pytest.approx([0.4, 0.4]) and rates[2:] == [0.5] * 32  # the first block of two drops nothing
    g = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=g)
    keep = (torch.rand(4, len(rates), generator=g) >= torch.tensor(rates)).float()
    whole = model(images, keep)
    parts = torch.cat([model(images[i : i + 1], keep[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, parts)
    torch.manual_seed(99)
    assert torch.equal(model(images, keep), whole)  # no generator plays a part
    assert not torch.allclose(model(images, None), whole)
    flipped = keep.clone()
    flipped[0, -1] = 1 - flipped[0, -1]
    changed = model(images, flipped)
    assert not torch.allclose(changed[0], whole[0]) and torch.allclose(changed[1:], whole[1:])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keyed_dropout_drops_its_share_and_is_unbiased(p):
    from pipeline.model.timm_wrap import KeyedDropout

    layers = [KeyedDropout(p, i) for i in (0, 1)]
    for layer in layers:
        layer.key = torch.arange(64)
    masks = [(layer(torch.ones(64, 50, 40)) != 0).float() for layer in layers]
    for mask in masks:
        assert mask.mean() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / mask.numel()) ** 0.5)
        assert mask.mean((1, 2)).std() < 0.02 and mask.mean(0).std() < 0.08  # no sample and no element is special
    assert layers[0](torch.ones(64, 50, 40)).mean() == pytest.approx(1, abs=0.01)
    a, b = (m.flatten() - (1 - p) for m in masks)
    assert abs((a * b).mean()) / (p * (1 - p)) < 0.02  # layers are independent
    c = masks[0].flatten(1) - (1 - p)
    assert abs((c[:-1] * c[1:]).mean()) / (p * (1 - p)) < 0.02  # and so are samples


BIT = ["model.name=timm/resnetv2_50x1_bit", "model.image_size=32", "model.hidden_dim=128", "model.num_blocks=1"]
NONE = [f"model.{k}=null" for k in ("patch_size", "tokens_mlp_dim", "channels_mlp_dim")]


@pytest.mark.slow
def test_a_run_of_a_bit_is_trained_resumed_evaluated_and_probed(tmp_path, capsys):
    run = tmp_path / "run"
    settings = [*NONE, *BIT, "train.duration=2 steps", "train.global_batch_size=4", "checkpoint.every=1 steps"]
    assert train(run, *settings) == 0
    assert train(run, *settings, "train.duration=3 steps") == 0
    assert "RESUMED from step 2" in capsys.readouterr().out
    with as_before():
        assert run_eval(str(run), "last", False, ["data.val=synthetic", "eval.batch_size=250"]) == 0
        assert run_fewshot(str(run), "synthetic", None, "last", False, [], [1], 1, 20, 1024.0) == 0
    report = json.loads((run / "eval" / "step-00000003.json").read_text())
    assert report["samples"] == 1000
    with pytest.raises(UserError, match="export it as safetensors"):
        run_export(str(run), tmp_path / "timm", "timm", "last", False, "float32")


def test_batch_norm_is_said_to_be_elastic_in_data_only(tmp_path, capsys):
    settings = [*NONE, "model.name=timm/test_byobnet", "model.hidden_dim=null", "model.num_blocks=null"]
    assert train(tmp_path / "run", *settings, "model.image_size=32", "train.duration=2 steps",
                 "train.global_batch_size=4") == 0  # fmt: skip
    assert "BatchNorm: elastic in its data only" in capsys.readouterr().out
    trained = TrainedModel.open(str(tmp_path / "run"))
    running = [n for n, _ in trained.tensors() if n.endswith("running_mean")]
    assert running and all(trained.reader.tensor(n, "buffer").abs().max() > 0 for n in running)


def test_export_and_import_of_timms_own(tmp_path):
    run = tmp_path / "run"
    settings = ["model.name=timm/vit_base_patch16_224", "model.hidden_dim=64", "model.patch_size=4"]
    assert train(run, *NONE, *settings, "train.duration=2 steps", "train.global_batch_size=4") == 0
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_export(str(run), tmp_path / "timm", "timm", "last", False, "float32") == 0
    scope: dict = {}
    exec("\n".join(line.strip() for line in said.getvalue().splitlines()[1:]), scope)
    trained = TrainedModel.open(str(run))
    ours = trained.network("cpu").eval()
    ours.load_state_dict(dict(trained.tensors()))
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        np.testing.assert_allclose(ours(images), scope["model"].eval()(images), atol=1e-6)
    assert run_import(str(tmp_path / "timm"), tmp_path / "again", None, None, None) == 0
    again = dict(TrainedModel.open(str(tmp_path / "again")).tensors())
    assert all(torch.equal(again[n], t) for n, t in trained.tensors())
