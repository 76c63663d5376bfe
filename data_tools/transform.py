"""Optional: smaller images and another encoding, while packing. What is done to a picture, explicitly:

- resized so that its shorter side is `resize` pixels, never enlarged, by area averaging (Pillow's BOX filter; large
  JPEGs are first reduced by 2, 4 or 8 in their own transform, to no less than twice the wanted size);
- EXIF orientation is applied to the pixels; all metadata is left out;
- an embedded ICC profile is converted to sRGB (perceptual); a profile that cannot be used is ignored;
- CMYK becomes RGB, through its profile where it has one;
- transparency (alpha, or a palette's) is laid over white;
- 16 bits a channel become 8, scaled over the full range; floating-point pixels are refused;
- grey stays grey, everything else becomes RGB; of an animation the first frame is kept.

Without these options the bytes of an image are never touched. The result is a function of the input and of the
versions of Pillow, libjpeg-turbo and libwebp.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from data_tools.errors import UserError
from data_tools.images import FLOATING, BadImage, ImageInfo, pillow_errors, sniff_format
from data_tools.plan import PlanOptions

if TYPE_CHECKING:
    from PIL import Image

_ENCODE = re.compile(r"keep|(jpeg|webp)(?::([0-9]{1,3}))?")
_DEFAULT_QUALITY = {"jpeg": 90, "webp": 85}
_LONGEST = {"jpeg": 65500, "webp": 16383}  # pixels a side that libjpeg and libwebp take
_RESIZED = ("jpeg", 95)  # where an image is made smaller and no encoding is asked for
# EXIF orientation -> what turns the pixels upright
_UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
            7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip


def check_encode(text: str) -> str:
    """`keep`, `jpeg:QUALITY` or `webp:QUALITY`, with the quality filled in. Raises UserError for anything else."""
    match = _ENCODE.fullmatch(text)
    if match is None or not 1 <= int(match[2] or 50) <= 100:
        raise UserError(f"--encode {text!r}: keep, jpeg:90 or webp:85 (quality 1 to 100)")
    return text if match[1] is None else f"{match[1]}:{match[2] or _DEFAULT_QUALITY[match[1]]}"


def converts(options: PlanOptions) -> bool:
    """Do these options touch the bytes of images at all?"""
    return options.resize > 0 or options.encode != "keep"


def convert(data: bytes, info: ImageInfo, options: PlanOptions) -> tuple[bytes, ImageInfo]:
    """(new bytes, their format and size). `info` is what `check_image` said of `data`.

    Raises BadImage where the image does not decode, or is too long for the format.
    """
    small = not options.resize or min(info.width, info.height) <= options.resize
    if options.encode == "keep" and small:
        from data_tools.images import check_image

        return data, check_image(data, options.max_pixels, options.verify)
    kind, quality = _RESIZED if options.encode == "keep" else _parse(options.encode)
    with pillow_errors(info.suffix):
        image = _load(data, info, 0 if small else options.resize)
        if not small:
            image = _shrink(image, options.resize)
        if max(image.size) > _LONGEST[kind]:
            raise BadImage(f"{image.width} x {image.height} pixels, {kind} takes {_LONGEST[kind]} a side at most")
        encoded = _encode(image, kind, quality)
    return encoded, ImageInfo("jpg" if kind == "jpeg" else kind, image.width, image.height)


def _parse(encode: str) -> tuple[str, int]:
    kind, _, quality = encode.partition(":")
    return kind, int(quality)


def _load(data: bytes, info: ImageInfo, target: int) -> Image.Image:
    """Pixels as L or RGB, upright, in sRGB; JPEGs perhaps reduced, to at least twice `target` (0: not)."""
    from PIL import Image

    _, name = sniff_format(data)
    with Image.open(io.BytesIO(data), formats=(name,)) as opened:
        orientation, profile = _orientation(opened), opened.info.get("icc_profile")
        image = _decode_jpeg(data, info, target) if name == "JPEG" else None
        if image is None:
            opened.load()
            image = opened.copy()
        image = _plain_mode(image, profile)
    how = _UPRIGHT.get(orientation)
    return image if how is None else image.transpose(Image.Transpose[how])


def _orientation(image: Image.Image) -> int:
    """As EXIF counts it; 1 where there is none, or where EXIF is damaged, which costs no image its place."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises anything over it: SyntaxError, struct.error
        return 1
    return value if isinstance(value, int) else 1


def _decode_jpeg(data: bytes, info: ImageInfo, target: int) -> Image.Image | None:
    """None for what simplejpeg does not decode (CMYK, unusual subsampling). Raises BadImage for damage."""
    import simplejpeg
    from PIL import Image

    try:
        _, _, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):
        return None
    if space not in ("YCbCr", "RGB", "Gray", "GRAY"):
        return None
    grey = space.upper() == "GRAY"
    least = {}
    if target and min(info.height, info.width) >= 4 * target:
        factor = 2 * target / min(info.height, info.width)
        least = {"min_height": int(info.height * factor), "min_width": int(info.width * factor), "min_factor": 1}
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "RGB", strict=True, **least)
    except ValueError as e:
        raise BadImage(f"damaged JPEG: {e}") from e
    return Image.fromarray(pixels[:, :, 0] if grey else pixels)


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (mode I or I;16) as L, scaled over the full range, as the trainer reads it."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image).astype(np.int64)
    scale = 257 if image.mode != "I" or pixels.max(initial=0) > 255 else 1
    return Image.fromarray(np.clip(pixels // scale, 0, 255).astype(np.uint8))


def _plain_mode(image: Image.Image, profile: bytes | None) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise BadImage(FLOATING)
    if image.mode.startswith("I"):
        return eight_bits(image)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        image = _to_srgb(image, profile)
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        mode = "L" if image.mode == "L" else "RGB"
        if mode == "L":
            return image  # a grey profile is a tone curve close to sRGB's; there is no grey sRGB to convert to
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
        return image if converted is None else converted
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _shrink(image: Image.Image, target: int) -> Image.Image:
    from PIL import Image

    short = min(image.size)
    if short <= target:
        return image
    size = tuple(max(1, round(side * target / short)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


def _encode(image: Image.Image, kind: str, quality: int) -> bytes:
    if kind == "webp":
        out = io.BytesIO()
        image.save(out, "WEBP", quality=quality, method=4)
        return out.getvalue()
    import numpy as np
    import simplejpeg

    pixels = np.ascontiguousarray(np.asarray(image))
    if image.mode == "L":
        return simplejpeg.encode_jpeg(pixels[:, :, None], quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420" if quality < 95 else "444", fastdct=False)
