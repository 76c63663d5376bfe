"""The recipes are the paper's, and what they ask for is what the authors' code computes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from helpers import train

from pipeline.config import Config, find_recipe, list_recipes, load_config
from pipeline.losses import make_loss
from pipeline.model import create_model, model_cost
from pipeline.optim import lr_scale, param_groups
from pipeline.run import read_lines

# Paper, table 4: recipe -> epochs, lr, weight decay, RandAugment magnitude, MixUp p, stochastic depth
TABLE_4 = {
    "mixer_b16_i1k_table4": (300, 0.001, 0.1, 15, 0.5, 0.1),
    "mixer_b16_i1k": (300, 0.001, 0.1, 15, 0.5, 0.1),
    "mixer_l16_i1k": (300, 0.001, 0.1, 15, 0.5, 0.1),
    "mixer_b16_i21k": (300, 0.001, 0.1, 10, 0.2, 0.1),
    "mixer_l16_i21k": (300, 0.001, 0.1, 20, 0.5, 0.1),
    "mixer_s16_jft": (5, 0.003, 0.03, None, 0.0, 0.0),
    "mixer_b16_jft": (7, 0.003, 0.03, None, 0.0, 0.0),
    "mixer_l16_jft": (14, 0.001, 0.03, None, 0.0, 0.0),
    "mixer_h14_jft": (14, 0.001, 0.03, None, 0.0, 0.0),
}
IMAGES = {"i1k": 1_281_167, "i21k": 14_000_000, "jft": 300_000_000}
CLASSES = {"i1k": 1000, "i21k": 21_843, "jft": 18_000}
PRETRAINING = [*TABLE_4, "vit_b16_i1k", "bit_r50_i1k"]


def load(name: str) -> Config:
    return load_config(name, ["data.train=synthetic"]).config


def corpus(name: str) -> str:
    return next(c for c in ("i21k", "i1k", "jft") if c in name)


@pytest.mark.parametrize("name", TABLE_4)
def test_rows_of_table_4(name):
    c = load(name)
    a = c.augment
    row = (c.train.duration, c.optimizer.lr, c.optimizer.weight_decay, a.randaugment_magnitude, a.mixup_alpha)
    epochs, *values, depth = TABLE_4[name]
    assert row == (f"{epochs} epochs", *values) and c.model.drop_path_rate == depth
    # Section 3, for all of them
    assert (c.optimizer.name, c.optimizer.betas, c.optimizer.clip_grad_norm) == ("adamw", [0.9, 0.999], 1.0)
    assert (c.train.global_batch_size, c.scheduler.name, c.scheduler.warmup) == (4096, "linear", "10000 steps")
    assert (c.model.image_size, a.crop, a.hflip, a.scale) == (224, "inception", 0.5, [0.05, 1.0])
    assert c.loss.name == "sigmoid_xent"
    assert c.model.name == "mixer_" + name.split("_")[1]


@pytest.mark.parametrize("name", [n for n in PRETRAINING if n.startswith("mixer")])
def test_costs_in_the_headers_are_the_models(name):
    c = load(name)
    text = find_recipe(name).read_text()
    said = re.search(r"# cost: ([\d,.]+) EFLOP", text)
    assert said
    epochs = int(c.train.duration.split()[0])
    cost = model_cost(c.model.name, CLASSES[corpus(name)]).training_flops * epochs * IMAGES[corpus(name)]
    assert float(said[1].replace(",", "")) == pytest.approx(cost / 1e18, rel=0.02)


@pytest.mark.compare
@pytest.mark.parametrize("name", ["vit_b16_i1k", "bit_r50_i1k"])
def test_recipes_of_the_compared_models_differ_in_the_model_alone(name):
    mixer, other = load("mixer_b16_i1k_table4"), load(name)
    other.model.name, other.run = mixer.model.name, mixer.run
    assert other == mixer
    cost = model_cost(load(name).model.name).training_flops * 300 * IMAGES["i1k"]
    said = re.search(r"# cost: ([\d.]+) EFLOP", find_recipe(name).read_text())
    assert said and float(said[1]) == pytest.approx(cost / 1e18, rel=0.02)


@pytest.mark.compare
def test_compared_models_see_identical_batches(tmp_path):
    """The same samples, bytes and pixels, whatever the model: also where stochastic depth draws other masks."""
    shape = [f"model.{k}=null" for k in ("tokens_mlp_dim", "channels_mlp_dim")]
    vit = [*shape, "model.name=timm/vit_base_patch16_224", "model.hidden_dim=64", "model.drop_path_rate=0.2"]
    shared = ["augment.randaugment_magnitude=15", "augment.mixup_alpha=0.5", "train.duration=3 steps"]
    assert train(tmp_path / "mixer", *shared, "model.drop_path_rate=0.1") == 0
    assert train(tmp_path / "vit", *shared, *vit) == 0
    from pipeline.inputs import mixup, train_transform

    configs = [load_config(str(tmp_path / r / "config.yaml")).config for r in ("mixer", "vit")]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    a, b = (train_transform(c)(pixels, 1, 5) for c in configs)
    assert torch.equal(a, b)
    first, second = (mixup(c) for c in configs)
    assert first == second
    losses = [[m["loss"] for m in read_lines(tmp_path / r / "metrics.jsonl")] for r in ("mixer", "vit")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6) == pytest.approx(math.log(4))  # a head of zeros
    assert losses[0][2] != losses[1][2]


def test_sigmoid_with_the_head_bias_starts_at_the_loss_of_rare_classes():
    """big_vision, mlp_mixer_i1k: a bias of -6.9 over 1,000 classes; without it the first loss is 693."""
    c = load("mixer_b16_i1k")
    model = create_model("mixer_s32", 1000, 32, hidden_dim=16, num_blocks=1, head_bias=c.loss.head_bias)
    logits = model(torch.randn(4, 3, 32, 32))
    loss = make_loss(c.loss.name)(logits, torch.arange(4))
    p = 1 / (1 + math.exp(6.9))
    expected = -math.log(p) - 999 * math.log1p(-p)
    torch.testing.assert_close(loss, torch.full((4,), expected), rtol=1e-4, atol=0)
    assert 7 < expected < 9


def test_the_update_is_the_authors_codes():
    """big_vision: clip by the global norm, Adam, times lr, plus decay times the kernels, times s(t), minus: in numpy,
    against torch's AdamW as the recipe sets it up."""
    c = load("mixer_b16_i1k")
    lr, steps, warmup, end = c.optimizer.lr, 60, 10, c.scheduler.end_factor
    wd = 1e-4  # big_vision's, not multiplied by the learning rate
    model = create_model("mixer_s32", 3, 32, hidden_dim=16, num_blocks=1).double()
    groups = param_groups(model, c.optimizer.weight_decay)
    kernels = set(groups[0]["names"])
    torch_optimizer = torch.optim.AdamW(
        [{k: v for k, v in g.items() if k != "names"} for g in groups],
        betas=tuple(c.optimizer.betas),
        eps=c.optimizer.eps,
    )
    theirs = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    m, v = ({n: np.zeros_like(p) for n, p in theirs.items()} for _ in range(2))
    rng = np.random.default_rng(0)
    for t in range(steps):
        gradients = {n: rng.normal(size=p.shape) * 3 ** rng.uniform(-4, 1) for n, p in theirs.items()}
        # in torch
        for n, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[n].copy())
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.optimizer.clip_grad_norm)
        for group in torch_optimizer.param_groups:
            group["lr"] = lr * lr_scale(t, total_steps=steps, warmup_steps=warmup, name="linear", end_factor=end)
        torch_optimizer.step()
        # as big_vision writes it down; optax counts from 0
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        s = (end + (1 - end) * (1 - np.clip((t - warmup) / (steps - warmup), 0, 1))) * min(1.0, t / warmup)
        for n, g in gradients.items():
            g = g / max(1.0, norm)
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.999 * v[n] + 0.001 * g**2
            u = (m[n] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[n] / (1 - 0.999 ** (t + 1))) + 1e-8)
            u = lr * u + (wd * theirs[n] if n in kernels else 0)
            theirs[n] = theirs[n] - s * u
    for n, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), theirs[n], rtol=0, atol=1e-8, err_msg=n)
    assert {n for n in theirs if n.endswith("weight") and "norm" not in n} == kernels


def test_every_pretraining_recipe_is_covered_here():
    rest = {"digits", "cifar10", *(n for n in list_recipes() if n.startswith("finetune"))}
    assert set(list_recipes()) - rest == set(PRETRAINING)
