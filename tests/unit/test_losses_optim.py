"""Losses, schedule and weight-decay mask against references written independently, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_tools.errors import UserError
from pipeline.losses import make_loss, sigmoid_xent, softmax_xent
from pipeline.model import create_model
from pipeline.optim import lr_scale, param_groups

B, K = 7, 11


def softmax_reference(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    return -(y * log_p).sum(1)


def sigmoid_reference(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    log_p, log_not_p = -np.logaddexp(0, -z), -np.logaddexp(0, z)
    return -(y * log_p + (1 - y) * log_not_p).sum(1)


REFERENCES = {"softmax_xent": softmax_reference, "sigmoid_xent": sigmoid_reference}


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, K] with some large ones, labels [B], soft targets [B, K] (two classes mixed)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, K)) * 4
    logits[0, 0], logits[1, 1] = 60, -60
    labels, others = rng.integers(0, K, B), rng.integers(0, K, B)
    share = rng.uniform(size=(B, 1))
    soft = share * np.eye(K)[labels] + (1 - share) * np.eye(K)[others]
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), torch.tensor(soft)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", REFERENCES)
def test_losses_match_numpy(name, smoothing):
    logits, labels, soft = case()
    loss = make_loss(name, smoothing)
    for target, hard in ((labels, np.eye(K)[labels.numpy()]), (soft, soft.numpy())):
        expected = REFERENCES[name](logits.numpy(), hard * (1 - smoothing) + smoothing / K)
        got = loss(logits, target)
        assert got.shape == (B,) and got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_labels_and_their_one_hot_rows_are_the_same_target(name):
    logits, labels, _ = case(1)
    loss = make_loss(name, 0.1)
    torch.testing.assert_close(loss(logits, labels), loss(logits, torch.eye(K)[labels]))
    torch.testing.assert_close(loss(logits, labels.int()), loss(logits, labels))


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_match_the_closed_form(name):
    logits, labels, _ = case(2)
    z = logits.double().requires_grad_()
    make_loss(name)(z, labels).sum().backward()
    p = torch.softmax(logits.double(), 1) if name == "softmax_xent" else torch.sigmoid(logits.double())
    assert z.grad is not None
    torch.testing.assert_close(z.grad, p - torch.eye(K)[labels].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_bf16_logits_are_reduced_in_fp32(name):
    logits, labels, _ = case(3)
    low = logits.bfloat16()
    got = make_loss(name)(low, labels)
    assert got.dtype == torch.float32
    assert torch.equal(got, make_loss(name)(low.float(), labels))


def test_a_negative_label_is_no_class():
    logits = case(4)[0]
    none = torch.full((B,), -1)
    assert torch.equal(softmax_xent(logits, none), torch.zeros(B))
    torch.testing.assert_close(sigmoid_xent(logits, none), sigmoid_xent(logits, torch.zeros(B, K)))


@pytest.mark.parametrize("loss", [softmax_xent, sigmoid_xent])
def test_a_label_beyond_the_classes_is_an_error(loss):
    with pytest.raises((IndexError, RuntimeError)):
        loss(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_unknown_losses_and_smoothings_are_refused():
    with pytest.raises(UserError, match="did you mean 'sigmoid_xent'"):
        make_loss("sigmoid_ce")
    with pytest.raises(UserError, match="label_smoothing=1"):
        make_loss("sigmoid_xent", 1.0)


# ---- schedule


@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (10, 50), (10_000, 92_897), (50, 50)])
def test_schedules_match_big_visions_formula(warmup, total):
    steps = np.unique(np.linspace(0, total + 3, 500).astype(int))
    e = 1e-5
    progress = np.clip((steps - warmup) / max(total - warmup, 1), 0, 1)
    ramp = np.minimum(1, steps / warmup) if warmup else 1
    expected = {
        "linear": (e + (1 - e) * (1 - progress)) * ramp,
        "cosine": (e + (1 - e) * (1 + np.cos(np.pi * progress)) / 2) * ramp,
        "constant": np.ones(len(steps)) * ramp,
    }
    for name, values in expected.items():
        got = [lr_scale(int(t), total_steps=total, warmup_steps=warmup, name=name, end_factor=e) for t in steps]
        np.testing.assert_allclose(got, values, rtol=1e-12, atol=1e-15)


def test_schedule_at_its_corners():
    def scale(step):
        return lr_scale(step, total_steps=100, warmup_steps=10, name="linear", end_factor=0.1)

    assert scale(0) == 0  # counted from 0: the first update changes nothing
    assert scale(5) == 0.5
    assert scale(10) == 1
    assert scale(55) == pytest.approx(0.55)
    assert scale(100) == scale(1000) == pytest.approx(0.1)


def test_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        lr_scale(0, total_steps=1, warmup_steps=0, name="cosin", end_factor=0)


# ---- weight decay


def test_kernels_decay_and_nothing_else():
    model = create_model("mixer_s32", num_classes=3, hidden_dim=16, num_blocks=2)
    decay, no_decay = param_groups(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    parameters = dict(model.named_parameters())
    assert set(decay["names"]) | set(no_decay["names"]) == set(parameters)
    assert len(decay["names"]) + len(no_decay["names"]) == len(parameters)
    # stem, head and four matrices a block
    assert len(decay["names"]) == 2 + 4 * 2
    assert not [n for n in decay["names"] if "norm" in n or n.endswith("bias")]
    for group in (decay, no_decay):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameters[name] is parameter


def test_position_tables_and_frozen_parameters():
    model = torch.nn.Module()
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 4, 8))
    model.fc = torch.nn.Linear(8, 8)
    model.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
    decay, no_decay = param_groups(model, 0.1)
    assert decay["names"] == ["fc.weight"]
    assert no_decay["names"] == ["pos_embed", "fc.bias"]


def test_adamw_takes_the_groups_and_decays_by_lr_times_weight_decay():
    model = torch.nn.Linear(4, 4)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before[0] * (1 - 1e-4), rtol=1e-6, atol=0)
    assert torch.equal(model.bias, before[1])


def test_groups_without_parameters_are_left_out():
    (only,) = param_groups(torch.nn.Linear(2, 2, bias=False), 0.1)
    assert only["names"] == ["weight"]
