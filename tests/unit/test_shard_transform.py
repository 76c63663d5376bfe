"""Resizing and encoding anew: what happens to orientation, colour, transparency and depth, exactly."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_tools.errors import UserError
from data_tools.images import BadImage, check_image
from data_tools.plan import PlanOptions
from data_tools.transform import check_encode, convert, converts


def saved(image: Image.Image, form: str, **kw) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **kw)
    return buffer.getvalue()


def smooth(width: int = 80, height: int = 60) -> Image.Image:
    """Left dark, right bright; top red, bottom blue."""
    x, y = np.meshgrid(np.linspace(40, 200, width), np.linspace(40, 200, height))
    return Image.fromarray(np.stack([x, (x + y) / 2, y], -1).astype(np.uint8))


def converted(data: bytes, **options) -> Image.Image:
    made = PlanOptions(**{"encode": "jpeg:95", **options})
    out, info = convert(data, check_image(data, 10**8), made)
    assert check_image(out, 10**8) == info
    image = Image.open(io.BytesIO(out))
    assert image.size == (info.width, info.height) and not image.getexif() and "icc_profile" not in image.info
    return image


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize(("encode", "suffix"), [("jpeg:95", "JPEG"), ("webp:95", "WEBP")])
def test_shorter_side_by_area(form, encode, suffix):
    image = converted(saved(smooth(), form), resize=30, encode=encode)
    assert image.size == (40, 30) and image.format == suffix
    assert distance(image, smooth().resize((40, 30), Image.Resampling.BOX)) < 3


def test_large_jpegs_are_reduced_first_and_look_the_same():
    big = smooth(1600, 1200)
    image = converted(saved(big, "JPEG", quality=95), resize=60)
    assert image.size == (80, 60) and distance(image, big.resize((80, 60), Image.Resampling.BOX)) < 2


def test_images_are_never_enlarged_and_left_alone_where_nothing_is_to_do():
    data = saved(smooth(), "PNG")
    assert converted(data, resize=500).size == (80, 60)
    options = PlanOptions(resize=60)
    assert converts(options) and convert(data, check_image(data, 10**6), options)[0] == data
    assert not converts(PlanOptions())
    assert converted(saved(smooth(3000, 2), "PNG"), resize=1).size == (1500, 1)
    assert converted(saved(smooth(1, 1), "JPEG"), resize=64).size == (1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied(orientation, form):
    upright = smooth()
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # what a camera would have stored
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = converted(saved(stored, form, exif=exif.tobytes(), **({"quality": 95} if form != "PNG" else {})))
    assert image.size == upright.size and distance(image, upright) < 4


def test_transparency_lies_over_white():
    rgba = smooth().convert("RGBA")
    rgba.putalpha(0)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    for data in (saved(rgba, "PNG"), saved(rgba.convert("LA"), "PNG"), saved(palette, "PNG", transparency=0),
                 saved(palette, "GIF", transparency=0), saved(rgba, "WEBP", lossless=True, exact=True),
                 saved(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3))):  # fmt: skip
        assert np.asarray(converted(data).convert("L")).min() >= 253


def test_sixteen_bits_become_eight_over_the_full_range():
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for form in ("PNG", "TIFF"):
        image = converted(saved(Image.fromarray(deep), form))
        assert image.mode == "L" and distance(image, Image.fromarray((deep // 257).astype(np.uint8))) < 2
    with pytest.raises(BadImage, match="floating-point"):
        converted(saved(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"))


def test_cmyk_and_grey_and_one_bit():
    cmyk = converted(saved(smooth().convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "RGB" and distance(cmyk, smooth()) < 6
    assert converted(saved(smooth().convert("L"), "JPEG")).mode == "L"
    assert converted(saved(smooth().convert("1"), "PNG")).mode == "L"


def test_profiles_are_converted_to_srgb():
    data = np.full((16, 16, 3), (0, 200, 0), np.uint8)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    same = converted(saved(Image.fromarray(data), "PNG", icc_profile=lab.tobytes()))
    assert distance(same, Image.fromarray(data)) < 3
    broken = converted(saved(Image.fromarray(data), "PNG", icc_profile=b"no profile"))
    assert distance(broken, Image.fromarray(data)) < 3
    swapped = bytearray(lab.tobytes())  # red and blue primaries exchanged, and another name
    count = int.from_bytes(swapped[128:132], "big")
    tags = {bytes(swapped[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    r, b = tags[b"rXYZ"], tags[b"bXYZ"]
    swapped[r + 4 : r + 8], swapped[b + 4 : b + 8] = swapped[b + 4 : b + 8], swapped[r + 4 : r + 8]
    at = swapped.find("sRGB".encode("utf-16-be"))
    if at >= 0:
        swapped[at : at + 8] = "swap".encode("utf-16-be")
    red = np.full((16, 16, 3), (200, 0, 0), np.uint8)
    image = converted(saved(Image.fromarray(red), "PNG", icc_profile=bytes(swapped)))
    assert np.asarray(image)[8, 8, 2] > 150 > 100 > np.asarray(image)[8, 8, 0]


def test_the_first_frame_of_an_animation():
    frames = [smooth(), Image.new("RGB", (80, 60))]
    for form in ("GIF", "WEBP", "PNG"):
        image = converted(saved(frames[0], form, save_all=True, append_images=frames[1:]))
        assert distance(image, smooth()) < 12


def test_damage_is_still_found():
    data = saved(smooth(200, 200), "JPEG")
    cut = data[: len(data) // 2]
    with pytest.raises(BadImage, match="damaged"):
        convert(cut, check_image(cut, 10**6, decode=False), PlanOptions(resize=20))


def test_encodings_that_exist():
    assert [check_encode(t) for t in ("keep", "jpeg", "webp", "jpeg:75")] == ["keep", "jpeg:90", "webp:85", "jpeg:75"]
    for text in ("png", "jpeg:0", "jpeg:101", "jpeg:", "webp:x"):
        with pytest.raises(UserError, match="--encode"):
            check_encode(text)


def test_an_image_too_long_for_the_format_is_said_to_be():
    wide = saved(Image.new("RGB", (20_000, 8), "red"), "PNG")
    for options in ({"encode": "webp:80"}, {"encode": "webp:80", "resize": 7}):
        with pytest.raises(BadImage, match=r"^(20000 x 8|17500 x 7) pixels, webp takes 16383 a side at most$"):
            converted(wide, **options)
    assert converted(wide, encode="webp:80", resize=6).size == (15_000, 6)
    with pytest.raises(BadImage, match=r"70000 x 1 pixels, jpeg takes 65500"):
        converted(saved(Image.new("L", (70_000, 1)), "PNG"), encode="jpeg:80")


@pytest.mark.parametrize(
    "exif",
    [
        b"garbage and more",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x03ab\0\0",  # the orientation as text
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # 99
        b"MM\0*\xff\xff\xff\x08\0\x01",  # pointing out of it
        b"",
    ],
)
def test_damaged_exif_costs_no_image_its_place(exif):
    data, segment = saved(smooth(64, 48), "JPEG"), b"Exif\0\0" + exif
    data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    assert converted(data, resize=24).size == (32, 24)
