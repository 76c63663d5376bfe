"""Pixels: crops, resizes and flips against Pillow and numpy; randomness that hangs on the sample alone."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import simplejpeg
import torch
from helpers import Member, picture, png, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.augment import EvalTransform, TrainTransform, keep_mask, normalize, resize, resize_area, uniforms
from pipeline.data.decode import Crop, decode_image
from pipeline.data.loader import Request, TrainSamples
from pipeline.data.source import TarSource


def pillow_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear filter is antialiased when it shrinks. uint8 [H, W, C]."""
    planes = [
        np.asarray(Image.fromarray(pixels[:, :, c]).resize((width, height), Image.Resampling.BILINEAR))
        for c in range(pixels.shape[2])
    ]
    return np.stack(planes, axis=2)


def distance(image: torch.Tensor, expected: np.ndarray) -> int:
    """Largest difference in levels between uint8 [C, H, W] and uint8 [H, W, C]."""
    assert image.dtype == torch.uint8 and image.is_contiguous()
    return int(np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("size", [(40, 60, 16, 16), (37, 23, 30, 50), (9, 9, 9, 9), (64, 8, 5, 31), (1, 1, 4, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows_antialiased_bilinear(size, channels):
    height, width, new_height, new_width = size
    pixels = picture(1, height, width, channels)
    assert distance(resize(pixels, new_height, new_width), pillow_resize(pixels, new_height, new_width)) <= 2


def test_normalize():
    images = torch.tensor([[[[0, 51, 127, 255]]]], dtype=torch.uint8)
    expected = np.array([0, 51, 127, 255]) / 255 * 2 - 1
    assert np.allclose(normalize(images).numpy().ravel(), expected, atol=1e-6)
    assert images.tolist() == [[[[0, 51, 127, 255]]]]


# ------------------------------------------------------------------------------------------ the train crop


@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(1, 300))
def test_crop_boxes_lie_inside_and_keep_scale_and_ratio(sample, height, width):
    t = TrainTransform(8, seed=0, scale=(0.2, 0.9), ratio=(0.75, 4 / 3))
    u = uniforms("augment", 0, 0, sample, 41)
    top, left, h, w = t.crop_box(height, width, u)
    assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w
    if min(height, width) >= 60 and 3 / 4 <= width / height <= 4 / 3:
        assert 0.75 / 1.06 <= w / h <= 4 / 3 * 1.06
        assert 0.2 * 0.95 <= h * w / (height * width) <= 0.9 * 1.05


def test_crops_fill_scale_ratio_and_place_evenly():
    t = TrainTransform(8, seed=3, scale=(0.25, 0.75), ratio=(0.75, 4 / 3))
    boxes = np.array([t.crop_box(500, 500, uniforms("augment", 3, 0, s, 41)) for s in range(3000)])
    top, left, h, w = boxes.T
    area, log_ratio = h * w / 500**2, np.log(w / h)
    assert abs(area.mean() - 0.5) < 0.01 and abs(area.std() - 0.5 / 12**0.5) < 0.01
    assert abs(log_ratio.mean()) < 0.01 and abs(log_ratio.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.01
    for place, free in [(top, 500 - h), (left, 500 - w)]:
        assert abs((place / np.maximum(free, 1)).mean() - 0.5) < 0.02


def test_no_fitting_box_falls_back_to_the_centre_of_an_allowed_ratio():
    t = TrainTransform(8, seed=0, scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    u = uniforms("augment", 0, 0, 0, 41)
    assert t.crop_box(10, 1000, u) == (0, (1000 - 13) // 2, 10, 13)
    assert t.crop_box(1000, 30, u) == ((1000 - 40) // 2, 0, 40, 30)


def test_a_training_image_is_its_crop_resized_and_perhaps_flipped():
    pixels, flips = picture(5, 50, 70), 0
    t = TrainTransform(16, seed=7, scale=(0.3, 1.0))
    for sample in range(40):
        top, left, h, w = t.crop_box(50, 70, uniforms("augment", 7, 2, sample, 41))
        expected = pillow_resize(pixels[top : top + h, left : left + w], 16, 16)
        image = t(pixels, 2, sample)
        plain, flipped = distance(image, expected), distance(image, expected[:, ::-1])
        assert min(plain, flipped) <= 2 < max(plain, flipped)
        flips += flipped < plain
    assert 10 <= flips <= 30


@pytest.mark.parametrize("hflip, expected", [(0.0, False), (1.0, True)])
def test_flip_always_or_never_of_the_whole_image(hflip, expected):
    pixels = picture(2, 16, 16)
    t = TrainTransform(16, seed=0, crop="resize", hflip=hflip)
    wanted = pixels[:, ::-1] if expected else pixels
    assert all(distance(t(pixels, 0, s), wanted) == 0 for s in range(20))


def test_pixels_hang_on_seed_epoch_and_sample_alone():
    pixels = picture(9, 40, 40)
    t = TrainTransform(8, seed=1)
    first = t(pixels, 4, 77)
    for other in range(30):  # whatever was drawn in between
        t(pixels, 4, other)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(t(pixels, 4, 77), first)
    assert torch.equal(TrainTransform(8, seed=1)(pixels.copy(), 4, 77), first)
    for changed in (t(pixels, 5, 77), t(pixels, 4, 78), TrainTransform(8, seed=2)(pixels, 4, 77)):
        assert not torch.equal(changed, first)


def test_uniforms_are_pinned():
    """Part of what a resumed run repeats: numpy's raw Philox stream, made into doubles here."""
    pinned = ["0x1.31f8d65fef31ap-2", "0x1.2060203320f08p-1", "0x1.1e53c375cd83dp-1"]
    assert [x.hex() for x in uniforms("augment", 0, 0, 0, 3).tolist()] == pinned
    assert [x.hex() for x in uniforms("depth", 5, 2, 10**9, 1).tolist()] == ["0x1.cfa85cdcb2c90p-3"]
    u = uniforms("augment", 3, 1, 12, 4000)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    assert uniforms("augment", 3, 1, 12, 5).tolist() == u[:5].tolist()
    assert uniforms("depth", 3, 1, 12, 5).tolist() != u[:5].tolist()


def test_keep_masks_follow_their_rates_and_their_sample():
    rates = np.array([0.0, 0.25, 0.5, 0.99])
    masks = torch.stack([keep_mask(rates, 0, 0, s) for s in range(4000)])
    assert masks.dtype == torch.float32 and set(masks.unique().tolist()) == {0.0, 1.0}
    assert np.allclose(1 - masks.mean(0).numpy(), rates, atol=0.03)
    assert torch.equal(keep_mask(rates, 0, 0, 7), masks[7])
    assert not torch.equal(torch.stack([keep_mask(rates, 0, 1, s) for s in range(50)]), masks[:50])


# --------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("height, width", [(40, 60), (60, 40), (33, 33), (5, 200), (16, 16)])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre(height, width, fraction):
    size = 16
    pixels = picture(3, height, width)
    short = round(size / fraction)
    scale = short / min(height, width)
    new = (short, round(width * scale)) if height < width else (round(height * scale), short)
    whole = pillow_resize(pixels, *new)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    expected = whole[top : top + size, left : left + size]
    assert distance(EvalTransform(size, fraction)(pixels), expected) <= 2


# ------------------------------------------------------------------------------------------------ decoding


def test_decoding_gives_rgb_or_grey():
    colour, grey = picture(1), picture(2, channels=1)
    assert np.array_equal(decode_image(png(colour), 3), colour)
    assert np.array_equal(decode_image(png(grey), 1), grey)
    assert np.array_equal(decode_image(png(grey), 3), grey.repeat(3, axis=2))
    assert decode_image(png(colour), 1).shape == (12, 10, 1)
    with pytest.raises(ValueError):
        decode_image(png(colour), 4)


def test_jpegs_are_decoded_as_pillow_does():
    smooth = np.asarray(Image.fromarray(picture(4, 5, 5)).resize((40, 32), Image.Resampling.BICUBIC))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(smooth), quality=95)
    for channels, mode in [(3, "RGB"), (1, "L")]:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(32, 40, channels)
        assert np.abs(decode_image(data, channels).astype(int) - expected).max() <= 3
    cmyk = io.BytesIO()
    Image.fromarray(smooth).convert("CMYK").save(cmyk, "jpeg")
    assert decode_image(cmyk.getvalue(), 3).shape == (32, 40, 3)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0 not a jpeg"])
def test_what_is_no_image_is_a_value_error(data):
    with pytest.raises(ValueError):
        decode_image(data)


def test_a_truncated_image_is_a_value_error():
    jpeg = simplejpeg.encode_jpeg(picture(1, 40, 40))
    for data in (jpeg[: len(jpeg) // 2], png(picture(1, 40, 40))[:500]):
        with pytest.raises(ValueError):
            decode_image(data)


def test_decoded_pixels_may_be_written_to():
    """torch warns of memory that may not; such a warning in every worker would be noise on a user's terminal."""
    for data in (png(picture(1)), simplejpeg.encode_jpeg(picture(1, 40, 40))):
        assert decode_image(data).flags.writeable


# --------------------------------------------------------------------------- other ways to resize and to cut


def area_mean(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Every source pixel's share of every new pixel, written out. float [height, width, C]."""
    weights = []
    for old, new in [(pixels.shape[0], height), (pixels.shape[1], width)]:
        w = np.zeros((new, old))
        for i in range(new):
            for j in range(old):
                w[i, j] = max(0.0, min((i + 1) * old / new, j + 1) - max(i * old / new, j)) * new / old
        weights.append(w)
    return np.einsum("yh,xw,hwc->yxc", *weights, pixels.astype(float))


@pytest.mark.parametrize("size", [(40, 60, 16, 16), (37, 23, 30, 50), (9, 9, 9, 9), (64, 8, 5, 31), (1, 1, 4, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_area_resize_is_the_mean_over_what_a_pixel_covers(size, channels):
    height, width, new_height, new_width = size
    pixels = picture(1, height, width, channels)
    expected = np.floor(area_mean(pixels, new_height, new_width) + 1e-7)
    assert distance(resize_area(pixels, new_height, new_width), expected) == 0


def test_area_resize_is_pillows_box_filter_when_it_shrinks_by_whole_numbers():
    pixels = picture(2, 60, 90)
    expected = np.asarray(Image.fromarray(pixels).resize((30, 20), Image.Resampling.BOX))
    assert distance(resize_area(pixels, 20, 30), expected) <= 1  # Pillow rounds


def test_area_resize_leaves_a_plain_colour_alone():
    for level in range(256):
        assert (resize_area(np.full((7, 11, 1), level, np.uint8), 5, 3) == level).all()


@pytest.mark.parametrize("height, width", [(40, 60), (60, 40), (33, 33), (5, 200)])
def test_evaluation_by_area_and_by_square(height, width):
    pixels = picture(3, height, width)
    square = pillow_resize(pixels, 18, 18)[1:17, 1:17]
    assert distance(EvalTransform(16, 16 / 18, shape="square")(pixels), square) <= 2
    scale = 18 / min(height, width)
    new = (18, round(width * scale)) if height < width else (round(height * scale), 18)
    whole = np.floor(area_mean(pixels, *new) + 1e-7)
    top, left = (new[0] - 16) // 2, (new[1] - 16) // 2
    expected = whole[top : top + 16, left : left + 16]
    assert distance(EvalTransform(16, 16 / 18, method="area")(pixels), expected) == 0


# -------------------------------------------------------------------------------------- decoding at a fraction


def jpeg_of(height: int, width: int, seed: int = 1) -> bytes:
    smooth = Image.fromarray(picture(seed, 9, 12)).resize((width, height), Image.Resampling.BICUBIC)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.asarray(smooth)), quality=92, colorsubsampling="420")


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("height, width", [(400, 600), (401, 603)])
def test_jpegs_are_decoded_at_a_fraction_of_their_size(factor, height, width):
    asked = []

    def choose(*size: int) -> Crop:
        asked.append(size)
        return Crop(0, 0, *size, factor)

    data = jpeg_of(height, width)
    pixels = decode_image(data, 3, choose).copy()
    assert asked == [(height, width)]
    assert pixels.shape == (round(height / factor), round(width / factor), 3)
    last = [(0, -n % factor) for n in (height, width)]  # the last pixels may stand for less than the others
    padded = np.pad(decode_image(data), (*last, (0, 0)), mode="edge")
    expected = pillow_resize(padded, -(-height // factor), -(-width // factor))[: pixels.shape[0], : pixels.shape[1]]
    assert np.abs(pixels.astype(int) - expected).mean() < 2
    assert decode_image(png(picture(1, height, width)), 3, choose).shape == (height, width, 3)


@given(st.integers(0, 2**40), st.integers(1, 3000), st.integers(1, 3000))
def test_a_crop_never_has_to_grow_because_of_the_fraction(sample, height, width):
    t = TrainTransform(100, seed=0, scaled=True)
    _, _, h, w, factor, *_ = t.choose(t.draw(0, sample), height, width)
    assert factor == 1 or min(h, w) >= factor * 100
    assert factor == 8 or min(h, w) < 2 * factor * 100


def test_a_scaled_crop_is_the_same_picture(tmp_path):
    """To a few levels, as its edges fall on whole pixels of the smaller image; where nothing is left out, bit-equal."""
    photos = [Member(jpeg_of(401, 603, i), 0) for i in range(6)]
    source = TarSource(write_dataset(tmp_path, {"train": [photos]}), "train")
    plain, scaled = (
        TrainSamples(source, TrainTransform(50, seed=3, scaled=s), channels=3, num_classes=3) for s in (False, True)
    )
    factors = set()
    for epoch in range(10):
        for sample in range(6):
            t = TrainTransform(50, seed=3, scaled=True)
            factor = t.choose(t.draw(epoch, sample), 401, 603).factor
            a, b = plain.row(epoch, sample).image, scaled.row(epoch, sample).image
            assert torch.equal(a, b) if factor == 1 else (a.int() - b.int()).abs().float().mean() < 5
            factors.add(factor)
    assert factors >= {1, 2, 4}


# ------------------------------------------------------------------------------------------ decoding the crop alone


@pytest.mark.parametrize("kind", ["420", "444", "422", "progressive", "grey"])
@pytest.mark.parametrize("channels", [1, 3])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_region_has_the_pixels_of_the_whole_image(kind, channels, data):
    encoded = _encoded(kind)
    height, width = data.draw(st.integers(1, 203)), data.draw(st.integers(1, 301))
    box = data.draw(st.integers(0, 203 - height)), data.draw(st.integers(0, 301 - width)), height, width
    part = decode_image(encoded, channels, lambda *_: Crop(*box, region=True))
    assert np.array_equal(part, Crop(*box).cut(decode_image(encoded, channels)))


@functools.cache
def _encoded(kind: str) -> bytes:
    file = io.BytesIO()
    image = Image.open(io.BytesIO(jpeg_of(203, 301)))
    image.convert("L" if kind == "grey" else "RGB").save(
        file, "JPEG", quality=90, progressive=kind == "progressive", subsampling={"444": 0, "422": 1}.get(kind, 2)
    )
    return file.getvalue()


def test_region_decoding_changes_no_batch(tmp_path):
    photos = [Member(jpeg_of(401, 603, i), i % 3) for i in range(5)] + [Member(png(picture(5, 40, 60)), 0)]
    source = TarSource(write_dataset(tmp_path, {"train": [photos]}), "train")
    plain, region = (
        TrainSamples(source, TrainTransform(50, seed=3, region=r), channels=3, num_classes=3) for r in (False, True)
    )
    request = Request(np.arange(12) // 6, np.arange(12) % 6)
    assert torch.equal(plain[request].images, region[request].images)


def test_a_damaged_jpeg_is_no_crash_of_the_region_decoder():
    data = bytearray(jpeg_of(203, 301))
    for cut in (30, 200, len(data) // 2):
        with pytest.raises(ValueError):
            decode_image(bytes(data[:cut]), 3, lambda *_: Crop(0, 0, 203, 301, region=True))


@given(st.integers(0, 2**40), st.integers(1, 3000), st.integers(1, 3000))
def test_small_crops_are_decoded_alone_and_large_ones_at_a_fraction(sample, height, width):
    t = TrainTransform(50, seed=0, scaled=True, region=True)
    crop = t.choose(t.draw(0, sample), height, width)
    if 2 * crop.height * crop.width < height * width:
        assert crop.factor == 1
    else:
        assert crop == TrainTransform(50, seed=0, scaled=True).choose(t.draw(0, sample), height, width)._replace(
            region=True
        )


@pytest.mark.parametrize("height, width", [(401, 603), (400, 601)])
def test_a_whole_image_decoded_at_a_fraction_loses_no_edge(height, width):
    t = TrainTransform(50, seed=0, crop="resize", scaled=True, region=True)
    pixels = decode_image(jpeg_of(height, width), 3, functools.partial(t.choose, t.draw(0, 1)))
    assert pixels.shape == (-(-height // 8), -(-width // 8), 3)
