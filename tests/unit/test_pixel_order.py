"""The permutations of figure 4: what they move, and that a Mixer cannot tell the first kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import TINY, picture, train

from data_tools.errors import UserError
from pipeline.config import load_config
from pipeline.data.augment import EvalTransform, TrainTransform
from pipeline.data.pixel_order import pixel_order
from pipeline.data.randaugment import RandAugment
from pipeline.data.synthetic import SyntheticSource
from pipeline.inputs import eval_samples, train_transform
from pipeline.model import create_model
from pipeline.run import read_metrics

SIZE, PATCH = 12, 4


def patches_of(image: np.ndarray) -> list[list[tuple]]:
    """[H, W, C] -> for each patch, row by row, its pixels, row by row."""
    return [
        [tuple(image[y + i, x + j]) for i in range(PATCH) for j in range(PATCH)]
        for y in range(0, SIZE, PATCH)
        for x in range(0, SIZE, PATCH)
    ]


def permuted(image: np.ndarray, kind: str, seed: int) -> np.ndarray:
    order = pixel_order(kind, SIZE, PATCH, seed)
    result = EvalTransform(SIZE, 1.0, order=order)(image)
    return result.permute(1, 2, 0).numpy()


def test_patches_change_places_and_pixels_inside_of_all_patches_alike():
    image = picture(1, SIZE, SIZE)
    before, after = patches_of(image), patches_of(permuted(image, "patches", 5))
    sets = [frozenset(p) for p in before]
    places = [sets.index(frozenset(p)) for p in after]
    assert sorted(places) == list(range(9)) and places != sorted(places)
    inside = [before[places[0]].index(pixel) for pixel in after[0]]
    assert sorted(inside) == list(range(PATCH * PATCH)) and inside != sorted(inside)
    for place, patch in zip(places, after):
        assert patch == [before[place][i] for i in inside]


def test_pixels_change_places_all_over_the_image():
    image = picture(1, SIZE, SIZE)
    after = permuted(image, "pixels", 5)
    assert sorted(map(tuple, after.reshape(-1, 3))) == sorted(map(tuple, image.reshape(-1, 3)))
    sets = [frozenset(p) for p in patches_of(image)]
    assert not any(frozenset(p) in sets for p in patches_of(after))


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_the_permutation_hangs_on_the_seed_alone_and_is_the_last_thing_that_happens(kind):
    order = pixel_order(kind, SIZE, PATCH, 5)
    assert order is not None and sorted(order) == list(range(SIZE * SIZE))
    assert np.array_equal(order, pixel_order(kind, SIZE, PATCH, 5))
    assert not np.array_equal(order, pixel_order(kind, SIZE, PATCH, 6))
    pixels = picture(2, 30, 40)
    augment = RandAugment(2, 10)
    for transform, other in [
        (TrainTransform(SIZE, 1, randaugment=augment, order=order), TrainTransform(SIZE, 1, randaugment=augment)),
        (TrainTransform(SIZE, 1, order=order), TrainTransform(SIZE, 1)),
    ]:
        image, plain = transform(pixels, 3, 4), other(pixels, 3, 4)
        assert torch.equal(image.flatten(1), plain.flatten(1)[:, torch.from_numpy(order)])


def test_training_and_evaluation_share_it():
    base = [o for o in TINY if not o.startswith("data.val")]
    config = load_config(None, [*base, "augment.permute=patches", "augment.crop=resize", "augment.hflip=0"]).config
    source = SyntheticSource("train", image_size=8, num_classes=4)
    evaluation = eval_samples(config, source, 4)
    pixels = source.read(3, 3).pixels
    config.eval.crop_fraction = 1.0
    assert torch.equal(train_transform(config)(pixels, 0, 3), eval_samples(config, source, 4).row(0, 3).image)
    assert not torch.equal(evaluation.row(0, 3).image, EvalTransform(8)(pixels))


def test_a_mixer_with_permuted_weights_sees_the_original():
    """Figure 4: permuting patches and the pixels in them is permuting stem inputs, token W1 columns, W2 rows and b2."""
    torch.manual_seed(0)
    shape = {"patch_size": PATCH, "hidden_dim": 20, "num_blocks": 2, "tokens_mlp_dim": 6, "channels_mlp_dim": 24}
    model, twin = (create_model("mixer_s16", 5, SIZE, **shape).double() for _ in range(2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    order = pixel_order("patches", SIZE, PATCH, 3)
    assert order is not None
    grid = torch.arange(SIZE * SIZE).reshape(3, PATCH, 3, PATCH).transpose(1, 2).reshape(9, -1)
    moved = torch.from_numpy(order).reshape(3, PATCH, 3, PATCH).transpose(1, 2).reshape(9, -1)
    patch = torch.tensor([next(i for i in range(9) if set(m.tolist()) == set(grid[i].tolist())) for m in moved])
    inside = torch.tensor([grid[patch[0]].tolist().index(v) for v in moved[0].tolist()])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, value in state.items():
        if name.startswith("stem") and name.endswith("weight"):
            state[name] = value.reshape(-1, 3, PATCH * PATCH)[:, :, inside].reshape(value.shape)
        elif name.endswith("mlp_tokens.fc1.weight"):
            state[name] = value[:, patch]
        elif name.endswith(("mlp_tokens.fc2.weight", "mlp_tokens.fc2.bias")):
            state[name] = value[patch]
    twin.load_state_dict(state)
    images = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    shuffled = images.flatten(2)[:, :, torch.from_numpy(order)].reshape(images.shape)
    assert torch.allclose(twin(shuffled), model(images), atol=1e-12)
    assert not torch.allclose(model(shuffled), model(images), atol=1e-3)


def test_a_training_with_permuted_pixels(tmp_path):
    losses = {}
    for kind in ("none", "patches", "pixels"):
        assert train(tmp_path / kind, f"augment.permute={kind}", "train.duration=3 steps") == 0
        losses[kind] = [row["loss"] for row in read_metrics(tmp_path / kind)]
    assert losses["none"] != losses["patches"] != losses["pixels"]
    with pytest.raises(UserError, match=r"augment.permute: 'patch' is not one of its choices. did you mean patches"):
        train(tmp_path / "typo", "augment.permute=patch")


def test_patches_must_fit():
    with pytest.raises(UserError, match=r"augment.permute=patches: images of 30 px"):
        pixel_order("patches", 30, 16, 0)
