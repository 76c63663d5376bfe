"""Where samples come from: `read(sample_id)` gives pixels and a label, whatever stores them.

`TarSource` reads a local, indexed WebDataset by `pread`; `SyntheticSource` makes images up. A new kind of store is
one more class with these five members.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.manifest import DatasetManifest, ShardInfo, index_name, load_index
from pipeline.data.augment import philox
from pipeline.data.decode import decode_image
from pipeline.data.order import key

EVAL_SPLITS = ("val", "validation", "test")  # the first that a data set has


class RawSample(NamedTuple):
    """Pixels uint8 [H, W, C], class index, crc32 of the bytes they were decoded from."""

    pixels: np.ndarray
    label: int
    crc32: int


class BadSample(Exception):
    """This one sample cannot be used; the message says where it is and why."""


class SampleSource(Protocol):
    name: str
    digest: str
    shard_sizes: list[int]
    splits: list[str]
    classes: list[str] | None

    def read(self, sample_id: int, channels: int) -> RawSample:
        """Raises BadSample."""
        ...

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        """What the bytes of these samples should have, int64: from the index, without reading them."""
        ...


def open_source(path: str, *splits: str, image_size: int, num_classes: int | None) -> SampleSource:
    """The first of `splits` that the data set at `path` has; `synthetic` needs no data. Raises UserError."""
    if path == "synthetic":
        return SyntheticSource(splits[0], image_size=image_size, num_classes=num_classes or 10)
    return TarSource(path, *splits)


class TarSource:
    """Indexed tars in a local folder, one positioned read a sample: descriptors may be shared with forked workers.

    Raises:
        UserError: no such data set or split; a shard that is missing or whose size is not the manifest's.
    """

    def __init__(self, folder: str | Path, *splits: str, max_open: int = 128):
        self.folder = Path(folder)
        manifest = DatasetManifest.load(self.folder)
        # A folder that holds one split only is taken, whatever its name
        split = next((s for s in splits if s in manifest.splits), None)
        if split is None and len(manifest.splits) == 1:
            split = next(iter(manifest.splits))
        if split is None:
            raise UserError(
                f"{folder} has no split {' or '.join(splits)} (it has: {', '.join(manifest.splits) or 'none'})"
            )
        self.splits = list(manifest.splits)
        self.name = f"{folder} ({split})"
        self.shards: list[ShardInfo] = manifest.splits[split]
        self.shard_sizes = [s.samples for s in self.shards]
        self.digest = manifest.split_digest(split)
        self.classes = manifest.classes
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._max_open = max_open
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        self._verified: set[int] = set()
        self._check_shards()

    def _check_shards(self) -> None:
        for shard in self.shards:
            path = self.folder / shard.name
            try:
                size = path.stat().st_size
            except OSError as e:
                raise UserError(f"{path}: {e.strerror}; the manifest lists it. Restore it, or shard again") from e
            if size != shard.bytes:
                raise UserError(
                    f"{path} has {size:,} bytes, the manifest says {shard.bytes:,}: it was replaced or cut short. "
                    f"See `mixer data verify {self.folder}`"
                )

    def read(self, sample_id: int, channels: int) -> RawSample:
        shard = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        row_number = sample_id - int(self._starts[shard])
        fd, rows = self._shard(shard)
        row = rows[row_number]
        where = f"{self.shards[shard].name} row {row_number}"
        try:
            data = os.pread(fd, int(row["size"]), int(row["offset"]))
        except OSError as e:
            raise BadSample(f"{where}: {e.strerror}") from e
        crc = zlib.crc32(data)
        if crc != int(row["crc32"]):
            raise BadSample(f"{where}: crc32 is not the index' ({len(data):,} of {int(row['size']):,} bytes read)")
        try:
            pixels = decode_image(data, channels)
        except Exception as e:
            raise BadSample(f"{where}: {e}") from e
        return RawSample(pixels, int(row["label"]), crc)

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self._starts, sample_ids, side="right") - 1
        crcs = np.empty(len(sample_ids), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            crcs[here] = self._shard(int(shard))[1]["crc32"][sample_ids[here] - self._starts[shard]]
        return crcs

    def _shard(self, shard: int) -> tuple[int, np.ndarray]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        info = self.shards[shard]
        path = self.folder / info.name
        index = self.folder / index_name(info.name)
        rows = load_index(index)
        if shard not in self._verified:  # a wrong offset would show as a bad crc32, a wrong label would not show
            if xxhash.xxh3_128_hexdigest(index.read_bytes()) != info.index_hash:
                raise UserError(
                    f"{index} is not the one that the manifest names: damaged, or of another tar. "
                    "Run `mixer data index`"
                )
            self._verified.add(shard)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from e
        self._open[shard] = fd, rows
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[shard]


class SyntheticSource:
    """Images made from the sample id: a faint class pattern under noise, so that a loss can fall. No files."""

    def __init__(self, split: str, *, image_size: int, num_classes: int, samples: int | None = None):
        self.samples = samples or (10_000 if split == "train" else 1_000)
        self.name = f"synthetic ({split}, {self.samples:,} samples)"
        self.shard_sizes = [min(1_000, self.samples - i) for i in range(0, self.samples, 1_000)]
        self.splits = ["train", "val"]
        self.classes: list[str] | None = None
        self.num_classes = num_classes
        self._size = image_size
        self._split = split
        self.digest = f"synthetic-{split}-{self.samples}-{image_size}-{num_classes}"

    def read(self, sample_id: int, channels: int) -> RawSample:
        label = int(key("label", self._split, sample_id) % np.uint64(self.num_classes))
        shape = (self._size, self._size, channels)
        noise = philox(int(key(self._split, "noise")), sample_id)
        pattern = philox(int(key("pattern")), label)
        count = -(-int(np.prod(shape)) // 8)

        def pixels(bits: np.random.Philox) -> np.ndarray:
            return bits.random_raw(count).view(np.uint8)[: int(np.prod(shape))].reshape(shape)

        image = (pixels(noise) >> 1) + (pixels(pattern) >> 1)
        return RawSample(image, label, int(self.crc32(np.array([sample_id]))[0]))

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        # Nothing is stored and nothing is read: the id stands for the bytes
        return np.array([zlib.crc32(int(i).to_bytes(8, "little")) for i in sample_ids], dtype=np.int64)
