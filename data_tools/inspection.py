"""What a data set or a shard holds, in lines for people."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UserError
from data_tools.manifest import DatasetManifest


def describe_dataset(folder: Path) -> Iterator[str]:
    """Splits, classes, sizes. Raises UserError where `folder` is no finished data set."""
    manifest = DatasetManifest.load(folder)
    for split, shards in manifest.splits.items():
        stats = manifest.stats.get(split, {})
        size = sum(s.bytes for s in shards)
        yield f"{split}: {manifest.samples(split):,} images, shards: {len(shards):,}, {size:,} bytes"
        for name in ("width", "height"):
            if name in stats:
                low, middle, high = stats[name]
                yield f"  {name}: {low} to {high} pixels, median {middle}"
        counts = stats.get("class_counts")
        if counts:
            yield f"  images a class: {min(counts):,} to {max(counts):,}"
    if manifest.classes is not None:
        more = ", ..." if len(manifest.classes) > 10 else ""
        yield f"{len(manifest.classes):,} classes: {', '.join(manifest.classes[:10])}{more}"
    yield f"source: {manifest.source.get('kind')}, digest {manifest.source.get('digest')}"


def describe_shard(tar: Path, key: str | None = None, limit: int = 20) -> Iterator[str]:
    """One line a sample: key, format, bytes, pixels, label. Raises UserError where `tar` or `key` is not
    there."""
    from data_tools.images import BadImage, check_image

    try:
        classes = DatasetManifest.load(tar.parent).classes
    except UserError:  # a tar alone can be looked at as well
        classes = None
    shown, line = 0, ""
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name, _, suffix = member.name.partition(".")
                if key is not None and name != key:
                    continue
                file = archive.extractfile(member)
                data = file.read() if file is not None else b""
                if suffix == "cls":
                    line += f"  label {data.decode()}{_class_name(classes, data)}"
                    continue
                if line:
                    yield line
                    line = ""
                if shown == limit:
                    break
                shown += 1
                try:
                    info = check_image(data, 2**62, decode=False)
                    pixels = f"{info.width} x {info.height}"
                except BadImage as e:
                    pixels = str(e)
                line = f"{name}  {suffix}  {member.size:,} bytes  {pixels}"
    except FileNotFoundError:
        raise UserError(f"{tar}: no such file") from None
    except tarfile.TarError as e:
        raise UserError(f"{tar} is not a readable tar: {e}") from e
    if line:
        yield line
    if not shown:
        raise UserError(f"{tar} holds no sample {key!r}" if key else f"{tar} holds no samples")


def _class_name(classes: list[str] | None, label: bytes) -> str:
    if classes is None or not label.isdigit() or int(label) >= len(classes):
        return ""
    return f" ({classes[int(label)]})"
