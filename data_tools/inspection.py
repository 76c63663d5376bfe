"""What a data set or a shard holds, in lines for people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.images import BadImage, check_image
from data_tools.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.storage import join, write_atomic
from data_tools.stores import Store, load_manifest
from data_tools.tar_samples import Part, TarSample, walk_tar

_SHOWN_TEXT = 200  # characters of a .json or .txt member


def describe_dataset(store: Store) -> Iterator[str]:
    """Splits, classes, sizes. Raises UserError where `store` is no finished data set."""
    manifest = load_manifest(store)
    for split, shards in manifest.splits.items():
        size = sum(s.bytes for s in shards)
        yield f"{split}: {manifest.samples(split):,} images, shards: {len(shards):,}, {size:,} bytes"
        yield from _describe_split(manifest.stats.get(split, {}))
    if manifest.classes is not None:
        more = ", ..." if len(manifest.classes) > 10 else ""
        yield f"{len(manifest.classes):,} classes: {', '.join(manifest.classes[:10])}{more}"
    yield f"source: {manifest.source.get('kind')}, digest {manifest.source.get('digest')}"


def describe_stats(stats: dict[str, Any], classes: list[str] | None, top: int) -> Iterator[str]:
    """The numbers of `split_stats` for every split, and its largest classes."""
    for split, found in stats.items():
        yield f"{split}: {found['samples']:,} images, {found['image_bytes']:,} bytes of images"
        yield from _describe_split(found)
        counts = found.get("class_counts") or []
        largest = sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:top]
        for i in largest:
            name = classes[i] if classes is not None and i < len(classes) else str(i)
            yield f"  {counts[i]:>12,}  {name}"


def _describe_split(stats: dict[str, Any]) -> Iterator[str]:
    for name in ("width", "height"):
        if name in stats:
            low, middle, high = stats[name]
            yield f"  {name}: {low} to {high} pixels, median {middle}"
    if counts := stats.get("class_counts"):
        yield f"  images a class: {min(counts):,} to {max(counts):,}"
    if "mean" in stats:
        numbers = [" ".join(f"{v:.3f}" for v in stats[name]) for name in ("mean", "std")]
        yield f"  colour (R G B in 0..1, of {stats['colour_samples']:,} images): mean {numbers[0]}, std {numbers[1]}"


def describe_shard(
    store: Store, name: str, key: str | None = None, limit: int = 20, save: Path | None = None
) -> Iterator[str]:
    """One line a sample: key, format, bytes, pixels, label; for one `key` all its members, which `save` gets as
    files. Raises UserError where the tar or the key is not there."""
    classes = _classes(store)
    shown = 0
    try:
        with store.local(name) as tar, open(tar, "rb", buffering=0) as raw:
            for sample in walk_tar(tar):
                if key is not None and sample.key != key:
                    continue

                def read(part: Part) -> bytes:
                    return os.pread(raw.fileno(), part.size, part.offset)

                yield _line(sample, read, classes)
                if key is not None:
                    yield from _members(sample, read, save)
                shown += 1
                if shown == limit or key is not None:
                    break
    except FileNotFoundError:
        raise UserError(f"{join(store.place, name)}: no such file") from None
    if not shown:
        raise UserError(f"{join(store.place, name)} holds no sample{f' {key!r}' if key else 's'}")


def _classes(store: Store) -> list[str] | None:
    if MANIFEST_NAME not in store.list():
        return None  # a tar alone can be looked at as well
    manifest: DatasetManifest = load_manifest(store)
    return manifest.classes


def _line(sample: TarSample, read: Any, classes: list[str] | None) -> str:
    line = sample.key
    if sample.image is not None:
        part = sample.parts[sample.image]
        try:
            info = check_image(read(part), 2**62, decode=False)
            pixels = f"{info.width} x {info.height}"
        except BadImage as e:
            pixels = str(e)
        line += f"  {sample.image}  {part.size:,} bytes  {pixels}"
    if "cls" in sample.parts:
        label = read(sample.parts["cls"]).decode("utf-8", "replace").strip()
        line += f"  label {label}{_class_name(classes, label)}"
    others = [s for s in sample.parts if s not in (sample.image, "cls")]
    return line + (f"  and {', '.join(others)}" if others else "")


def _members(sample: TarSample, read: Any, save: Path | None) -> Iterator[str]:
    for suffix, part in sample.parts.items():
        if suffix.rpartition(".")[2] in ("json", "txt"):
            text = read(part).decode("utf-8", "replace")
            yield f"  {suffix}: {text[:_SHOWN_TEXT]}{'...' if len(text) > _SHOWN_TEXT else ''}"
        if save is not None:  # the base name alone: a tar does not choose where files go
            save.mkdir(parents=True, exist_ok=True)
            path = save / f"{sample.key.rpartition('/')[2]}.{suffix.replace('/', '_')}"
            write_atomic(path, read(part))
            yield f"  saved {path}"


def _class_name(classes: list[str] | None, label: str) -> str:
    if classes is None or not label.isdecimal() or int(label) >= len(classes):
        return ""
    return f" ({classes[int(label)]})"
