"""Our Mixer against timm's, with the same weights: logits and every gradient."""

from __future__ import annotations

import pytest
import torch

from pipeline.model import create_model
from pipeline.model.timm_compat import import_timm, timm_twin

pytestmark = pytest.mark.compare

CASES = {
    "mixer_b16": {"name": "mixer_b16"},
    "small": {"name": "mixer_s16", "num_classes": 10, "image_size": 32, "patch_size": 4, "hidden_dim": 64},
    "odd": {  # nothing is a multiple of 8, and the image is no square
        "name": "mixer_s32",
        "num_classes": 7,
        "image_size": (35, 21),
        "patch_size": 7,
        "in_chans": 1,
        "hidden_dim": 51,
        "num_blocks": 3,
        "tokens_mlp_dim": 13,
        "channels_mlp_dim": 77,
    },
}


@pytest.fixture(scope="module", autouse=True)
def _timm():
    try:
        import_timm()
    except ImportError as error:
        pytest.skip(f"timm or torchvision is not installed: {error}")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_timms(case):
    ours = create_model(**CASES[case])
    timm_model = timm_twin(ours)
    generator = torch.Generator().manual_seed(0)
    for name, p in timm_model.named_parameters():  # every bias, norm and the head away from 0 and 1
        spread = 1.0 if name == "head.weight" else 0.1
        p.data = ours.get_parameter(name).data + spread * torch.randn(p.shape, generator=generator) / (
            p.shape[-1] ** 0.5 if p.ndim > 1 else 1
        )
    ours.load_state_dict(timm_model.state_dict(), strict=True)

    images = torch.randn(2, ours.stem.in_chans, *ours.stem.image_size, generator=generator)
    direction = torch.randn(2, ours.num_classes, generator=generator)
    logits, expected = ours(images), timm_model(images)
    assert expected.abs().max() > 0.1
    assert (logits - expected).abs().max().item() < 1e-5

    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, p in timm_model.named_parameters():
        got, reference = ours.get_parameter(name).grad, p.grad
        assert got is not None and reference is not None
        if name.endswith("mlp_tokens.fc2.bias"):
            # Shifts all channels of a token alike, which the next LayerNorm removes: the gradient is 0 up to
            # rounding, and a relative error means nothing.
            continue
        error = ((got - reference).norm() / reference.norm()).item()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_the_erf_gelu_of_timms_default_is_told_apart():
    """That the comparison above would notice the wrong GELU."""
    import_timm()
    from timm.models.mlp_mixer import MlpMixer as TimmMixer

    ours = create_model("mixer_s16", num_classes=10, image_size=32, patch_size=4, hidden_dim=64)
    torch.nn.init.normal_(ours.head.weight, generator=torch.Generator().manual_seed(0))
    erf = TimmMixer(num_classes=10, img_size=32, patch_size=4, embed_dim=64)
    erf.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert (ours(images) - erf(images)).abs().max().item() > 1e-4


def test_timm_imports_beside_this_torch():
    assert import_timm().list_models("mixer_b16*")
