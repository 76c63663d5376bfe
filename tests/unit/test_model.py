"""The Mixer: exact sizes, stochastic depth, initial values, and the messages of `create_model`."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from data_tools.errors import UserError
from pipeline.model import create_model, list_models, model_cost, peak_flops
from pipeline.model.mixer import MlpMixer, init_parameter
from pipeline.model.registry import FAMILIES

# name: (parameters without head, with a 1000-class head, forward MACs with that head), at 224 pixels. The
# first column rounds to the paper's table 1 (19, 18, 60, 59, 206, 207, 431 million).
SIZES = {
    "mixer_s32": (18_591_624, 19_104_624, 1_002_426_368),
    "mixer_s16": (18_015_264, 18_528_264, 3_776_958_464),
    "mixer_b32": (59_524_428, 60_293_428, 3_237_722_112),
    "mixer_b16": (59_111_472, 59_880_472, 12_601_767_936),
    "mixer_l32": (205_914_264, 206_939_264, 11_253_293_056),
    "mixer_l16": (207_171_168, 208_196_168, 44_547_678_208),
    "mixer_h14": (431_069_952, 432_350_952, 120_989_911_040),
}
# At 448 pixels with the token MLPs grown as in the paper's appendix C (S and D_S times 4): parameters, GMACs.
GROWN = {
    "mixer_b16": (86_996_392, 67.05),
    "mixer_l16": (280_500_584, 237.4),
    "mixer_h14": (589_723_368, 645.0),
}


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tokens_mlp_dim(name: str) -> int:
    return create_model(name, device="meta").get_parameter("blocks.0.mlp_tokens.fc1.weight").shape[0]


def tiny(**overrides) -> MlpMixer:
    """A Mixer of 4 blocks for images of 8 x 12 pixels, with a head that is not zero."""
    settings = {"patch_size": 4, "hidden_dim": 16, "num_blocks": 4, "num_classes": 5, **overrides}
    model = create_model("mixer_s16", image_size=(8, 12), **settings)
    if settings["num_classes"]:
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(seed))


# ---- sizes


def test_every_variant_of_the_paper_is_listed():
    assert [name for name in list_models() if name.startswith("mixer_")] == list(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_exact_parameter_counts_and_macs(name):
    without_head, with_head, macs = SIZES[name]
    assert parameters(create_model(name, num_classes=0, device="meta")) == without_head
    assert parameters(create_model(name, device="meta")) == with_head
    cost = model_cost(name)
    assert (cost.parameters, cost.forward_macs) == (with_head, macs)
    assert cost.training_flops == 6 * macs
    assert model_cost(name, num_classes=0).parameters == without_head


@pytest.mark.parametrize(("name", "count"), [("mixer_b16", 75_908_739), ("mixer_l16", 229_560_243)])
def test_exact_counts_with_the_classes_of_imagenet_21k(name, count):
    assert parameters(create_model(name, num_classes=21_843, device="meta")) == count
    assert model_cost(name, num_classes=21_843).parameters == count


@pytest.mark.parametrize("name", GROWN)
def test_exact_counts_at_448_pixels(name):
    count, gmacs = GROWN[name]
    grown = {"tokens_mlp_dim": 4 * tokens_mlp_dim(name)}
    assert parameters(create_model(name, image_size=448, device="meta", **grown)) == count
    cost = model_cost(name, image_size=448, **grown)
    assert cost.parameters == count
    assert cost.forward_macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_counts_at_448_pixels_without_growth(name):
    built = parameters(create_model(name, image_size=448, device="meta"))
    assert built == model_cost(name, image_size=448).parameters


def test_macs_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("mixer_b32", "mixer_h14"):
        with FlopCounterMode(display=False) as counter:
            create_model(name, device="meta")(torch.empty(1, 3, 224, 224, device="meta"))
        assert counter.get_total_flops() == 2 * model_cost(name).forward_macs


# ---- the network


def reference_forward(model: MlpMixer, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Equation 1 of the paper written out, batch-major, with a convolution as the stem."""
    w = dict(model.named_parameters())
    f = torch.nn.functional

    def norm(x, name):
        return f.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps=1e-6)

    def mlp(x, name):
        h = x @ w[name + ".fc1.weight"].T + w[name + ".fc1.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return h @ w[name + ".fc2.weight"].T + w[name + ".fc2.bias"]

    stem = w["stem.proj.weight"]
    x = f.conv2d(x, stem, w["stem.proj.bias"], stride=stem.shape[-1]).flatten(2).mT
    for i in range(len(model.blocks)):
        block = f"blocks.{i}"
        tokens = mlp(norm(x, f"{block}.norm1").mT, f"{block}.mlp_tokens").mT
        x = x + tokens * keep[:, 2 * i, None, None]
        channels = mlp(norm(x, f"{block}.norm2"), f"{block}.mlp_channels")
        x = x + channels * keep[:, 2 * i + 1, None, None]
    return norm(x, "norm").mean(dim=1) @ w["head.weight"].T + w["head.bias"]


def test_forward_and_gradients_are_those_of_the_papers_equations():
    model, x = tiny(hidden_dim=24).double(), images(6).double()
    for p in model.parameters():  # biases and norms away from 0 and 1
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double()
    keep = (torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.6).double()
    weights = list(model.parameters())
    ours, reference = model(x, keep), reference_forward(model, x, keep)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours.square().sum(), weights)
    expected = torch.autograd.grad(reference.square().sum(), weights)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


def test_bf16_autocast_stays_close_and_in_bf16():
    model, x = tiny(), images(3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        hidden = model.blocks[0].mlp_tokens.fc1(torch.randn(6, 32))
    assert hidden.dtype == torch.bfloat16  # a promoted bias would double the largest activation
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.1)


def test_wrong_image_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[B, 3, 8, 12\], got \[2, 3, 12, 8\]"):
        tiny()(torch.zeros(2, 3, 12, 8))


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_blocks_can_be_wrapped_from_outside(how):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = tiny(), tiny()
    for i, block in enumerate(wrapped.blocks):
        if how == "checkpointed":
            wrapped.blocks[i] = checkpoint_wrapper(block)
        else:  # traced as one graph; this backend needs no C++ compiler
            block.compile(backend="aot_eager", fullgraph=True)
    x, keep = images(3), torch.ones(3, 8)
    keep[0] = 0
    for model in (plain, wrapped):
        model(x, keep).square().sum().backward()
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad)


# ---- stochastic depth


def test_keeping_everything_equals_no_mask():
    model, x = tiny(), images(3)
    assert torch.equal(model(x, torch.ones(3, 8)), model(x))
    assert torch.equal(model(x, torch.ones(3, 8, dtype=torch.bool)), model(x))


def test_dropping_everything_leaves_stem_and_head():
    model, x = tiny(), images(3)
    pooled = model.norm(model.stem(x)).mean(dim=0)
    assert torch.equal(model.forward_features(x, torch.zeros(3, 8)), pooled)
    assert torch.equal(model(x, torch.zeros(3, 8)), model.head(pooled))


@pytest.mark.parametrize("column", range(8))
def test_each_column_drops_its_branch_of_its_sample_exactly(column):
    model, x = tiny(), images(3)
    keep = torch.ones(3, 8)
    keep[1, column] = 0
    cut = tiny()
    block = cut.blocks[column // 2]
    branch = block.mlp_channels if column % 2 else block.mlp_tokens
    torch.nn.init.zeros_(branch.fc2.weight)  # biases are zero at the start: the branch yields exactly 0
    logits = model(x, keep)
    assert torch.equal(logits[[0, 2]], model(x)[[0, 2]])
    assert torch.equal(logits[1], cut(x)[1])
    assert not torch.equal(logits[1], model(x)[1])


def test_drop_rates_grow_by_block():
    assert tiny(drop_path_rate=0.3).drop_rates() == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert tiny(drop_path_rate=0.3, num_blocks=1).drop_rates() == [0, 0]
    assert create_model("mixer_b16", device="meta").drop_rates() == [0] * 24


# ---- initial values


def test_initial_statistics():
    kernel = init_parameter("blocks.0.mlp_channels.fc1.weight", (1000, 400))
    std = (1 / 400) ** 0.5
    assert kernel.dtype == torch.float32
    assert kernel.mean().item() == pytest.approx(0, abs=4 * std / 400_000**0.5)
    assert kernel.std().item() == pytest.approx(std, rel=0.005)
    edge = 2 * std / 0.87962566103423978
    assert edge * 0.999 < kernel.abs().max().item() <= edge * (1 + 1e-6)
    # quartiles of the normal cut at +-2, in units of the uncut normal's sigma: erfinv(erf(sqrt 2) / 2) * sqrt
    # 2
    quartile = math.sqrt(2) * torch.erfinv(torch.tensor(math.erf(math.sqrt(2)) / 2)).item()
    assert kernel.abs().median().item() == pytest.approx(quartile * edge / 2, rel=0.01)


def test_fan_in_of_the_stem_is_the_patch():
    stem = init_parameter("stem.proj.weight", (768, 3, 16, 16))
    assert stem.std().item() == pytest.approx((1 / 768) ** 0.5, rel=0.01)


def test_biases_norms_and_head():
    model = create_model("mixer_s32", num_classes=7, hidden_dim=32, num_blocks=2, head_bias=-6.9)
    for name, p in model.named_parameters():
        if name == "head.bias":
            assert (p == -6.9).all()
        elif name.endswith("bias") or name == "head.weight":
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert p.std() > 0, name


def test_initial_values_depend_on_name_and_seed_alone():
    short, long = tiny(num_blocks=2, num_classes=3), tiny(num_blocks=4)
    torch.rand(7)  # the global generator plays no part
    again = dict(tiny(num_blocks=4).named_parameters())
    for name, p in long.named_parameters():
        assert torch.equal(p, again[name])
    for name, p in short.named_parameters():
        if not name.startswith("head"):
            assert torch.equal(p, again[name])
    assert not torch.equal(again["blocks.0.mlp_channels.fc1.weight"], again["blocks.1.mlp_channels.fc1.weight"])
    seed_0, seed_1 = (init_parameter("stem.proj.weight", (8, 3, 4, 4), seed) for seed in (0, 1))
    assert not torch.equal(seed_0, seed_1)


def test_initial_values_are_these():
    """They are part of "the same seed gives the same run": a change here breaks every recorded run."""
    values = init_parameter("stem.proj.weight", (2, 1, 1, 2), seed=0).flatten()
    expected = torch.tensor([0.469388, -1.091865, -1.014753, 0.809989])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)


def test_names_of_wrappers_are_ignored():
    plain = init_parameter("blocks.1.mlp_tokens.fc1.weight", (4, 6))
    assert torch.equal(
        plain, init_parameter("_orig_mod.blocks.1._checkpoint_wrapped_module.mlp_tokens.fc1.weight", (4, 6))
    )


def test_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="pos_embed"):
        init_parameter("pos_embed", (1, 196, 768))


def test_meta_build_then_reset_equals_a_direct_build():
    settings = {"patch_size": 4, "hidden_dim": 16, "num_blocks": 2, "num_classes": 5, "image_size": 8}
    direct = create_model("mixer_s16", seed=3, **settings)
    late = create_model("mixer_s16", device="meta", **settings)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu").reset_parameters(seed=3)
    for (name, a), (other, b) in zip(direct.named_parameters(), late.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    assert not list(late.buffers())  # nothing that `to_empty` would leave unset


# ---- create_model


def test_widths_follow_an_overridden_hidden_dim():
    shapes = {n: tuple(p.shape) for n, p in create_model("mixer_b16", hidden_dim=64).named_parameters()}
    assert shapes["blocks.0.mlp_tokens.fc1.weight"] == (32, 196)
    assert shapes["blocks.0.mlp_channels.fc1.weight"] == (256, 64)
    given = create_model("mixer_b16", hidden_dim=64, tokens_mlp_dim=10, channels_mlp_dim=None, device="meta")
    assert given.get_parameter("blocks.0.mlp_tokens.fc1.weight").shape == (10, 196)
    assert given.get_parameter("blocks.0.mlp_channels.fc1.weight").shape == (256, 64)


def test_channels_and_rectangles():
    settings = {"image_size": (8, 12), "patch_size": 4, "in_chans": 1, "hidden_dim": 16, "num_blocks": 1}
    model = create_model("mixer_s16", num_classes=3, **settings)
    assert model(torch.zeros(2, 1, 8, 12)).shape == (2, 3)
    assert parameters(model) == model_cost("mixer_s16", 3, **settings).parameters


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mixer_b15", {}, "mixer_b1?6"),
        ("Mixer-B/16", {}, "mixer_b16"),
        ("resnet50", {}, "there is no model 'resnet50'"),
        ("mixer_b16", {"image_size": 225}, "224 and 240"),
        ("mixer_b16", {"image_size": (224, 10)}, "16 and 32"),
        ("mixer_b16", {"hiden_dim": 4}, "did you mean 'hidden_dim'"),
        ("mixer_b16", {"num_blocks": 0}, "num_blocks=0"),
        ("mixer_b16", {"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
    ],
)
def test_mistakes_get_a_message_that_helps(name, settings, message):
    for make in (create_model, model_cost):
        with pytest.raises(UserError, match=message):
            make(name, **settings)


def test_another_family_is_one_module_and_one_line(monkeypatch):
    family = type(sys)("another_family")
    family.names = lambda: ["other/net"]
    family.build = lambda name, *args, **overrides: (name, args, overrides)
    monkeypatch.setitem(sys.modules, "another_family", family)
    monkeypatch.setitem(FAMILIES, "other/", "another_family")
    assert list_models()[-1] == "other/net"
    assert create_model("other/net", 10, depth=3) == ("other/net", (10, 224, None, 0, 0.0), {"depth": 3})


def test_costs_need_no_torch():
    code = "import sys; from pipeline.model import *; model_cost('mixer_b16'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- hardware peaks


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("AMD EPYC 7763", "fp32", None),
    ],
)
def test_peak_flops(device, precision, tflops):
    assert peak_flops(device, precision) == (None if tflops is None else tflops * 1e12)
