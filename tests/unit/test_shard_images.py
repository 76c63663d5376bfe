"""What counts as a good image: by content, with a limit by header before anything is decoded."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.images import BadImage, check_image, check_images
from data_tools.jpeg_headers import jpeg_sizes
from data_tools.plan import PlanOptions
from data_tools.transform import convert
from pipeline.data.decode import decode_image

LIMIT = 10**6


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **kw) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **kw)
    return buffer.getvalue()


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("form", "mode", "suffix", "kw"),
    [
        ("JPEG", "RGB", "jpg", {}),
        ("JPEG", "L", "jpg", {}),
        ("JPEG", "CMYK", "jpg", {}),
        ("JPEG", "RGB", "jpg", {"progressive": True}),
        ("PNG", "RGBA", "png", {}),
        ("PNG", "I;16", "png", {}),
        ("WEBP", "RGB", "webp", {}),
        ("GIF", "P", "gif", {}),
        ("BMP", "RGB", "bmp", {}),
        ("TIFF", "RGB", "tif", {}),
    ],
)
def test_good_images(form, mode, suffix, kw, decode):
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((30, 40), np.uint16)).save(buffer, form)
        data = buffer.getvalue()
    else:
        data = encoded(form, mode, **kw)
    assert check_image(data, LIMIT, decode) == (suffix, 40, 30)


SOME = [
    encoded("JPEG"), encoded("JPEG", "L", size=(1, 1)), encoded("JPEG", "CMYK"), encoded("PNG"), b"", b"\xff\xd8\xff",
    encoded("JPEG", size=(300, 7), progressive=True, comment=b"\xff\xc0" * 9, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_many_headers_at_once_say_what_the_decoder_says(data):
    images = [draw_damaged(data, image) for image in data.draw(st.lists(st.sampled_from(SOME), min_size=16))]
    for image, size in zip(images, jpeg_sizes(images)):
        if size != (0, 0):  # else the decoder is asked
            with suppress(BadImage):  # damaged tables, which only decoding finds
                assert size == check_image(image, LIMIT, decode=False)[1:]
    assert all(size != (0, 0) for size in jpeg_sizes([SOME[0], SOME[6]] * 10))


def draw_damaged(data: st.DataObject, image: bytes) -> bytes:
    """The image, or what is left of it after a cut or some other byte in its header."""
    if image and data.draw(st.booleans()):
        at = data.draw(st.integers(0, min(len(image) - 1, 400)))
        image = image[:at] if data.draw(st.booleans()) else image[:at] + b"\x7e" + image[at + 1 :]
    return image


def test_many_at_once_are_judged_as_one_by_one():
    images = [*SOME * 4, encoded("JPEG", size=(2000, 600)), BadImage("unreadable")]
    assert [i for i in check_images(images, LIMIT) if not isinstance(i, BadImage)] == [
        check_image(i, LIMIT) for i in SOME[:4] + SOME[6:]
    ] * 4
    reasons = [str(i) for i in check_images(images, LIMIT) if isinstance(i, BadImage)]
    assert reasons[-2:] == ["2000 x 600 pixels, more than the limit of 1000000", "unreadable"] and len(reasons) == 10


def test_smallest_and_widest():
    assert check_image(encoded("JPEG", size=(1, 1)), LIMIT) == ("jpg", 1, 1)
    assert check_image(encoded("JPEG", size=(20_000, 2)), LIMIT) == ("jpg", 20_000, 2)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(form):
    data = encoded(form, "P" if form == "GIF" else "RGB", size=(200, 200))
    with pytest.raises(BadImage, match="damaged"):
        check_image(data[: len(data) // 2], LIMIT)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_jpeg_damaged_in_the_middle(at):
    data = bytearray(encoded("JPEG", size=(200, 200)))
    data[int(len(data) * at) : int(len(data) * at) + 4] = b"\xff\xd9\xff\xd9"
    with pytest.raises(BadImage, match="damaged"):
        check_image(bytes(data), LIMIT)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"hello", b"<svg/>", b"%!PS-Adobe-3.0 EPSF", b"\xff\xd8\xff"])
@pytest.mark.parametrize("decode", [True, False])
def test_no_image_at_all(data, decode):
    with pytest.raises(BadImage):
        check_image(data, LIMIT, decode)


def png_that_says(width: int, height: int) -> bytes:
    png = bytearray(encoded("PNG"))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize("decode", [True, False])
def test_decompression_bombs_are_refused_by_their_header(decode):
    for side, message in [(1_001, "more than the limit of 1000000"), (60_000, "decompression bomb")]:
        with pytest.raises(BadImage, match=message):
            check_image(png_that_says(side, side), LIMIT, decode)
    jpeg = bytearray(encoded("JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(BadImage, match="65000 x 65000 pixels"):
        check_image(bytes(jpeg), LIMIT, decode)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated(form):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    assert check_image(buffer.getvalue(), LIMIT)[1:] == (40, 30)
    assert decode_image(buffer.getvalue()).shape == (30, 40, 3)


def sixteen_bits(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((30, 40), value, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def floating() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize("value", [0, 255, 256, 20000, 65535])
def test_sixteen_bits_are_scaled_alike_by_sharding_and_training(value):
    """Pillow's own conversion makes everything above 255 white."""
    data = sixteen_bits(value)
    converted, _ = convert(data, check_image(data, LIMIT), PlanOptions(encode="webp:100"))
    for channels in (1, 3):
        assert (decode_image(data, channels) == value // 257).all()
        assert np.abs(decode_image(converted, channels).astype(int) - value // 257).max() <= 2


def every_kind() -> dict[str, bytes]:
    """Encoded images and wrecks of many kinds, JPEGs of every subsampling among them."""
    kinds = {f"{form} {mode}": encoded(form, mode) for form, mode in [
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"),
        ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"),
    ]}  # fmt: skip
    kinds |= {"PNG I;16": sixteen_bits(20000), "TIFF F": floating()}
    base = bytearray(encoded("JPEG", subsampling=0))
    at = base.index(b"\xff\xc0") + 11
    for factors in (0x11, 0x12, 0x13, 0x14, 0x21, 0x22, 0x31, 0x33, 0x41, 0x44, 0x00, 0xFF):
        base[at] = factors
        kinds[f"JPEG {factors:#x}"] = bytes(base)
    for name, data in list(kinds.items()):
        kinds[f"{name} cut"] = data[: len(data) // 2]
    return kinds | {"nothing": b"", "text": b"hello", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}


@pytest.mark.parametrize(("name", "data"), every_kind().items())
def test_sharding_and_training_accept_the_same_images(name, data):
    try:
        info = check_image(data, 10**8)
    except BadImage:
        with pytest.raises(ValueError):
            decode_image(data)
    else:
        assert decode_image(data).shape == (info.height, info.width, 3)
        assert decode_image(data, 1).shape == (info.height, info.width, 1)
