"""What a finished data set holds: counts and sizes from its indexes, colour from a few of its images."""

from __future__ import annotations

import heapq
import io
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from data_tools.errors import UserError
from data_tools.manifest import ShardInfo, read_rows
from data_tools.storage import join
from data_tools.stores import Store
from data_tools.transform import eight_bits

COLOUR_SAMPLES = 300  # images decoded for mean and std: the mean's error is then below 0.01
_COLOUR_SIDE = 224  # JPEGs are decoded no larger than they need be for this: about what training sees
_MAX_PIXELS = 100_000_000
_LOADERS = 8


class SampleRef(NamedTuple):
    """Where one image lies. Ordered by the hash of its key: the smallest ones are a random, repeatable choice."""

    key: int
    shard: str
    offset: int
    size: int
    label: int


def read_index(store: Store, shard: ShardInfo) -> np.ndarray:
    """The index rows of one shard, dtype INDEX_DTYPE. Raises UserError where they are missing or damaged."""
    name = shard.index_name
    return read_rows(lambda: np.load(io.BytesIO(store.read(name)), allow_pickle=False), join(store.place, name))


def read_indexes(store: Store, shards: Iterable[ShardInfo]) -> Iterable[tuple[ShardInfo, np.ndarray]]:
    """Each shard with its index rows, in order; a few at a time, so that memory does not grow with the set."""
    waiting = list(shards)
    with ThreadPoolExecutor(_LOADERS) as pool:
        for begin in range(0, len(waiting), 4 * _LOADERS):
            some = waiting[begin : begin + 4 * _LOADERS]
            yield from zip(some, pool.map(lambda s: read_index(store, s), some))


class SplitTally:
    """Counts of one split, shard after shard; memory depends on the number of classes and of distinct sizes."""

    def __init__(self, choose: int = COLOUR_SAMPLES) -> None:
        self._choose = choose
        self._samples = self._bytes = 0
        self._labels = np.zeros(0, np.int64)
        self._widths: Counter[int] = Counter()
        self._heights: Counter[int] = Counter()
        self.chosen: list[SampleRef] = []  # those with the smallest key hashes

    def add(self, shard: ShardInfo, rows: np.ndarray) -> None:
        self._samples += len(rows)
        self._bytes += int(rows["size"].sum(dtype=np.uint64))
        counts = np.bincount(rows["label"][rows["label"] >= 0], minlength=len(self._labels))
        counts[: len(self._labels)] += self._labels
        self._labels = counts
        for column, counter in (("width", self._widths), ("height", self._heights)):
            values, n = np.unique(rows[column], return_counts=True)
            counter.update(dict(zip(values.tolist(), n.tolist())))
        few = rows[np.argsort(rows["key"], kind="stable")[: self._choose]]
        refs = (SampleRef(int(r["key"]), shard.name, int(r["offset"]), int(r["size"]), int(r["label"])) for r in few)
        self.chosen = heapq.nsmallest(self._choose, [*self.chosen, *refs])

    def result(self) -> dict[str, Any]:
        """Samples, image bytes, class counts (by class index, without -1), and smallest, median and largest width
        and height in pixels."""
        return {
            "samples": self._samples,
            "image_bytes": self._bytes,
            "class_counts": self._labels.tolist(),
            "width": _spread(self._widths),
            "height": _spread(self._heights),
        }


def split_stats(store: Store, shards: list[ShardInfo]) -> tuple[dict[str, Any], list[SampleRef]]:
    """What `SplitTally` counts, plus mean and std per colour channel in [0, 1] (over `COLOUR_SAMPLES` images,
    chosen by the hash of their key), and those images."""
    tally = SplitTally()
    for shard, rows in read_indexes(store, shards):
        tally.add(shard, rows)
    return {**tally.result(), **_colour(store, tally.chosen)}, tally.chosen


def _spread(counts: Counter[int]) -> list[int]:
    values = sorted(counts)
    if not values:
        return [0, 0, 0]
    middle, seen = (sum(counts.values()) - 1) // 2, 0
    for value in values:
        seen += counts[value]
        if seen > middle:
            break
    return [values[0], value, values[-1]]


def _colour(store: Store, refs: list[SampleRef]) -> dict[str, Any]:
    with ThreadPoolExecutor(_LOADERS) as pool:
        sums = [s for s in pool.map(lambda ref: _sums(store, ref), refs) if s is not None]
    if not sums:
        return {}
    # Every image counts the same, whatever its size: that is how training sees them.
    first, second = (np.mean([s[i] for s in sums], axis=0) for i in (0, 1))
    std = np.sqrt(np.maximum(second - first**2, 0))
    return {
        "mean": [round(float(v), 4) for v in first],
        "std": [round(float(v), 4) for v in std],
        "colour_samples": len(sums),
    }


def _sums(store: Store, ref: SampleRef) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and mean square per channel of one image, in [0, 1]; None for one that cannot be decoded."""
    pixels = load_pixels(store, ref)
    if pixels is None:
        return None
    counts = [np.bincount(pixels[..., c].ravel(), minlength=256) / pixels[..., c].size for c in range(3)]
    levels = np.arange(256) / 255
    return np.array([c @ levels for c in counts]), np.array([c @ levels**2 for c in counts])


def load_pixels(store: Store, ref: SampleRef) -> np.ndarray | None:
    """The image, scaled down by up to 8, as uint8 [H, W, 3].

    None where it cannot be read or decoded: a set that was not verified may hold such.
    """
    from PIL import Image

    try:
        data = store.read_range(ref.shard, ref.offset, ref.offset + ref.size)
        if data[:3] == b"\xff\xd8\xff":
            import simplejpeg

            try:
                return simplejpeg.decode_jpeg(
                    data, "RGB", min_height=_COLOUR_SIDE, min_width=_COLOUR_SIDE, min_factor=8
                )
            except ValueError:
                pass  # Pillow may do better (CMYK)
        formats = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > _MAX_PIXELS:
                return None
            return np.asarray((eight_bits(image) if image.mode.startswith("I") else image).convert("RGB"))
    except UserError:
        raise
    except Exception:  # decoders raise anything
        return None
