"""Images made up from the sample id, so that everything can run without data."""

from __future__ import annotations

import numpy as np

from data_tools.checksum import crc32
from pipeline.data.augment import philox
from pipeline.data.decode import Choose
from pipeline.data.order import key
from pipeline.data.source import RawSample


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

    def labels(self) -> np.ndarray:
        return np.array([self._label(i) for i in range(self.samples)], dtype=np.int64)

    def sample_name(self, sample_id: int) -> str:
        return f"{sample_id:08d}.png"

    def _label(self, sample_id: int) -> int:
        return int(key("label", self._split, sample_id) % np.uint64(self.num_classes))

    def read(self, sample_id: int, channels: int, choose: Choose | None = None) -> RawSample:
        label = self._label(sample_id)
        shape = (self._size, self._size, channels)
        noise = philox(int(key(self._split, "noise")), sample_id)
        pattern = philox(int(key("pattern")), label)
        count = -(-int(np.prod(shape)) // 8)

        def pixels(bits: np.random.Philox) -> np.ndarray:
            return bits.random_raw(count).view(np.uint8)[: int(np.prod(shape))].reshape(shape)

        image = (pixels(noise) >> 1) + (pixels(pattern) >> 1)
        if choose:
            image = choose(*image.shape[:2]).cut(image)
        return RawSample(image, label, int(self.crc32(np.array([sample_id]))[0]))

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        # Nothing is stored and nothing is read: the id stands for the bytes
        return np.array([crc32(int(i).to_bytes(8, "little")) for i in sample_ids], dtype=np.int64)

    def keys(self, shard: int) -> np.ndarray:
        return key("sample", shard * 1_000 + np.arange(self.shard_sizes[shard]))
