"""RandAugment's 16 operations, each against Pillow or a loop over pixels; and what is drawn."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image, ImageEnhance, ImageOps

from pipeline.data.augment import TrainTransform, uniforms
from pipeline.data.randaugment import OPERATIONS, RandAugment, apply

SIZE = 56  # a quarter of 224: lengths of the operations scale to a quarter
MAGNITUDES = [0, 1, 4.5, 10, 15, 20, 30]


def photo(seed: int = 1, size: int = SIZE, low: int = 0, high: int = 255) -> np.ndarray:
    """Smooth colours with some noise, uint8 [H, W, 3], in [low, high]."""
    coarse = Image.fromarray(picture(seed, 5, 5)).resize((size, size), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, dtype=float) * 0.8 + picture(seed + 1, size, size) * 0.2
    return np.round(low + noisy / 255 * (high - low)).astype(np.uint8)


def run(name: str, pixels: np.ndarray, magnitude: float, sign: float = 1.0, centre=(0.5, 0.5)) -> np.ndarray:
    """The operation on [H, W, C], as the references have it; the input must stay as it was."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    before = planes.copy()
    result = apply(name, planes, magnitude, sign, centre)
    assert result.dtype == np.uint8 and result.shape == planes.shape
    assert np.array_equal(planes, before)
    return result.transpose(1, 2, 0)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.fixture(params=[(1, 0, 255), (2, 40, 200), (3, 90, 91)], ids=["full", "dull", "flat"])
def pixels(request) -> np.ndarray:
    seed, low, high = request.param
    return photo(seed, low=low, high=high)


# ------------------------------------------------------------------------------------------------- tones


def test_autocontrast_is_pillows(pixels):
    expected = np.asarray(ImageOps.autocontrast(Image.fromarray(pixels)))
    assert difference(run("AutoContrast", pixels, 10), expected) <= 1


def test_equalize_is_pillows(pixels):
    assert np.array_equal(run("Equalize", pixels, 10), np.asarray(ImageOps.equalize(Image.fromarray(pixels))))


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_a_channel_of_one_level_stays(name):
    grey = np.full((8, 8, 3), 77, dtype=np.uint8)
    assert np.array_equal(run(name, grey, 10), grey)


def test_invert(pixels):
    assert np.array_equal(run("Invert", pixels, 10), np.asarray(ImageOps.invert(Image.fromarray(pixels))))


@pytest.mark.parametrize("magnitude, bits", [(2.5, 1), (5, 2), (10, 4), (15, 6), (20, 8), (30, 8)])
def test_posterize_keeps_so_many_bits(pixels, magnitude, bits):
    expected = np.asarray(ImageOps.posterize(Image.fromarray(pixels), bits))
    assert np.array_equal(run("Posterize", pixels, magnitude), expected)


def test_posterize_of_no_bits_is_black(pixels):
    assert (run("Posterize", pixels, 1) == 0).all()


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_solarize_inverts_from_a_level_on(pixels, magnitude):
    expected = np.asarray(ImageOps.solarize(Image.fromarray(pixels), int(magnitude / 10 * 256)))
    assert np.array_equal(run("Solarize", pixels, magnitude), expected)
    assert magnitude < 10 or np.array_equal(expected, pixels)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_solarize_add(pixels, magnitude):
    added = np.minimum(pixels.astype(int) + int(magnitude / 10 * 110), 255)
    assert np.array_equal(run("SolarizeAdd", pixels, magnitude), np.where(pixels < 128, added, pixels))


# ------------------------------------------------------------------------------------------------ blends


def blended(degenerate: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """What is blended, in exact arithmetic; the operations may be a level off where this is close to a whole one."""
    base = degenerate.astype(float)
    return np.clip(base + factor * (pixels - base), 0, 255)


def grey_of(pixels: np.ndarray) -> np.ndarray:
    light = pixels.astype(float) @ [0.2989, 0.587, 0.114]
    return np.floor(light / 255 * 255.5 + 1e-9)[:, :, None]


def smooth_of(pixels: np.ndarray) -> np.ndarray:
    out = pixels.astype(int)
    for y in range(1, len(pixels) - 1):
        for x in range(1, pixels.shape[1] - 1):
            nine = pixels[y - 1 : y + 2, x - 1 : x + 2].astype(int)
            out[y, x] = (nine.sum((0, 1)) + 4 * nine[1, 1]) // 13
    return out


DEGENERATE = {
    "Color": grey_of,
    "Contrast": lambda p: np.full((1, 1, 1), math.floor(grey_of(p).mean())),
    "Brightness": lambda p: np.zeros((1, 1, 1)),
    "Sharpness": smooth_of,
}


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_blends_lead_away_from_the_degenerate_image(name, magnitude, pixels):
    expected = blended(DEGENERATE[name](pixels), pixels, magnitude / 10 * 1.8 + 0.1)
    if name == "Sharpness":
        expected[[0, -1]], expected[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]
    result = run(name, pixels, magnitude)
    assert (result <= expected + 1e-3).all() and (result > expected - 1 - 1e-3).all()  # cut off, not rounded


@pytest.mark.parametrize("name", DEGENERATE)
def test_blends_are_pillows_but_for_its_rounding(name, pixels):
    for magnitude in MAGNITUDES:
        factor = magnitude / 10 * 1.8 + 0.1
        expected = np.asarray(getattr(ImageEnhance, name)(Image.fromarray(pixels)).enhance(factor))
        # One level in the degenerate image becomes |1 - factor| levels, and the result is cut off instead of rounded
        inner = np.s_[1:-1, 1:-1]
        assert difference(run(name, pixels, magnitude)[inner], expected[inner]) <= abs(1 - factor) + 1


def test_grey_images_have_no_colour_to_lose():
    grey = picture(3, 20, 20, 1)
    assert np.array_equal(run("Color", grey, 15), grey)
    assert all(run(name, grey, 15).shape == grey.shape for name in OPERATIONS)


# ---------------------------------------------------------------------------------------------- geometry


def warped(pixels: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    """Pixel by pixel: the nearest to matrix (x, y, 1), 128 outside."""
    out = np.full_like(pixels, 128)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            from_x, from_y = (a * x + b * y + c for a, b, c in matrix)
            column, row = (math.floor(abs(v) + 0.5) * (1 if v >= 0 else -1) for v in (from_x, from_y))
            if 0 <= row < pixels.shape[0] and 0 <= column < pixels.shape[1]:
                out[y, x] = pixels[row, column]
    return out


def rotation(degrees: float) -> list[list[float]]:
    c, s, middle = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), (SIZE - 1) / 2
    return [[c, -s, middle - c * middle + s * middle], [s, c, middle - s * middle - c * middle]]


MATRICES = {
    "Rotate": lambda level: rotation(30 * level),
    "ShearX": lambda level: [[1, 0.3 * level, 0], [0, 1, 0]],
    "ShearY": lambda level: [[1, 0, 0], [0.3 * level, 1, 0]],
    "TranslateX": lambda level: [[1, 0, 100 * level * SIZE / 224], [0, 1, 0]],
    "TranslateY": lambda level: [[1, 0, 0], [0, 1, 100 * level * SIZE / 224]],
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0, 4, 10, 15])
@pytest.mark.parametrize("name", MATRICES)
def test_geometry_takes_the_nearest_pixel_or_grey(name, magnitude, sign):
    expected = warped(photo(), MATRICES[name](sign * magnitude / 10))
    wrong = (run(name, photo(), magnitude, sign) != expected).any(axis=2).mean()
    assert wrong == 0 if name != "Rotate" else wrong < 0.02  # where the cosine's last bits decide on a half


@pytest.mark.parametrize("name", MATRICES)
def test_geometry_is_pillows(name):
    (a, b, c), (d, e, f) = MATRICES[name](0.7)
    # Pillow's coordinates are those of corners: pixel 0 is at 0.5
    corners = (a, b, c + 0.5 - a / 2 - b / 2, d, e, f + 0.5 - d / 2 - e / 2)
    image = Image.fromarray(photo())
    expected = np.asarray(
        image.transform(
            (SIZE, SIZE), Image.Transform.AFFINE, corners, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)
        )
    )
    assert (run(name, photo(), 7) != expected).any(axis=2).mean() < 0.01  # halves may go the other way


def test_a_positive_rotation_turns_the_picture_anticlockwise_in_place():
    image = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    image[SIZE // 2 - 1 : SIZE // 2 + 1, SIZE - 10 :] = 255  # a hand that points right
    y, x = np.nonzero(run("Rotate", image, 10)[:, :, 0] == 255)
    assert x.mean() > SIZE / 2 + 15 and y.mean() < SIZE / 2 - 8


def test_lengths_are_the_originals_at_224_pixels():
    pixels = picture(1, 224, 224)
    for name, axis in [("TranslateX", 1), ("TranslateY", 0)]:
        moved = run(name, pixels, 15)
        assert np.array_equal(np.take(moved, range(74), axis), np.take(pixels, range(150, 224), axis))
        assert (np.take(moved, range(74, 224), axis) == 128).all()
    assert (run("Cutout", np.zeros_like(pixels), 15)[:, :, 0] == 128).sum() == 120 * 120


@pytest.mark.parametrize("centre", [(0.0, 0.0), (0.5, 0.5), (0.99, 0.3)])
@pytest.mark.parametrize("magnitude", [0, 5, 10, 15])
def test_cutout_greys_a_square(magnitude, centre):
    pad = int(magnitude / 10 * 40 * SIZE / 224)
    y0, x0 = int(centre[0] * SIZE), int(centre[1] * SIZE)
    expected = photo().copy()
    for y in range(SIZE):
        for x in range(SIZE):
            if y0 - pad <= y < y0 + pad and x0 - pad <= x < x0 + pad:
                expected[y, x] = 128
    assert np.array_equal(run("Cutout", photo(), magnitude, centre=centre), expected)


# -------------------------------------------------------------------------------------------- what is drawn


def test_all_sixteen_operations_are_drawn_alike_and_always_applied():
    names = Counter()
    image = torch.from_numpy(photo(4, low=30, high=220).transpose(2, 0, 1).copy())
    outcomes: dict[tuple[str, float], bytes] = {}
    for name in OPERATIONS:
        for sign in (1.0, -1.0):
            outcomes[name, sign] = apply(name, image.numpy(), 4, sign).tobytes()
    for sample in range(1600):
        u = uniforms("randaug", 3, 0, sample, 4)
        u[2:] = 0.5
        result = RandAugment(1, 4)(image, u).numpy().tobytes()
        name = OPERATIONS[int(u[0] * 16)]
        assert result == outcomes[name, 1.0 if u[1] >= 0.5 else -1.0]
        names[name] += 1
    assert len(OPERATIONS) == len(set(OPERATIONS)) == len(names) == 16
    assert sum((n - 100) ** 2 / 100 for n in names.values()) < 45  # chi2 with 15 degrees of freedom
    assert not any(np.array_equal(np.frombuffer(o, np.uint8), image.numpy().ravel()) for o in outcomes.values())


def test_layers_follow_each_other():
    image = torch.from_numpy(photo().transpose(2, 0, 1).copy())
    u = uniforms("randaug", 0, 0, 8, 8)
    once = RandAugment(1, 15)(image, u[:4])
    assert torch.equal(RandAugment(2, 15)(image, u), RandAugment(1, 15)(once, u[4:]))


def test_crop_and_flip_are_the_same_with_and_without():
    pixels = picture(9, 60, 80)
    plain = TrainTransform(SIZE, seed=1)
    augmented = TrainTransform(SIZE, seed=1, randaugment=RandAugment(2, 15))
    seen = set()
    for sample in range(50):
        u = uniforms("randaug", 1, 3, sample, 8)
        image = augmented(pixels, 3, sample)
        assert torch.equal(image, RandAugment(2, 15)(plain(pixels, 3, sample), u))
        assert image.dtype == torch.uint8 and image.is_contiguous()
        seen.add(tuple(u))
    assert len(seen) == 50
    assert torch.equal(augmented(pixels, 3, 7), augmented(pixels, 3, 7))
    assert not torch.equal(augmented(pixels, 4, 7), augmented(pixels, 3, 7))


def test_pixels_stay_the_same_from_release_to_release():
    """A resumed run must go on with the pixels it would have had: these are part of its format."""
    image = torch.from_numpy((np.arange(3 * 64 * 64) ** 2 // 97 % 211).astype(np.uint8).reshape(3, 64, 64))
    crcs = [zlib.crc32(RandAugment(2, 15)(image, uniforms("randaug", 0, 0, s, 8)).numpy().tobytes()) for s in range(40)]
    assert zlib.crc32(np.array(crcs, dtype="<u4").tobytes()) == GOLDEN


GOLDEN = 2138651988
