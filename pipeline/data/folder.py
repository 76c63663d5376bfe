"""A folder of images as a data set, read file by file: CLASS/IMAGE, or SPLIT/CLASS/IMAGE.

For targets of fine-tuning and evaluation, which are small. Corpora belong into shards: a file a sample is slow on
most file systems.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import xxhash

from data_tools.checksum import crc32
from data_tools.errors import UserError
from pipeline.data.decode import Choose, decode_image
from pipeline.data.source import EVAL_SPLITS, BadSample, RawSample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPLITS = ("train", *EVAL_SPLITS)
_PER_SHARD = 1000


def is_image_folder(path: str | Path) -> bool:
    """Whether `path` holds folders, and no data set of tars."""
    folder = Path(path)
    return folder.is_dir() and not any(folder.glob("*.tar")) and any(p.is_dir() for p in folder.iterdir())


class FolderSource:
    """One split of a folder of images. Classes are its folders in alphabetical order, samples sorted by path.

    Raises:
        UserError: no such split, or no images.
    """

    def __init__(self, folder: str | Path, *splits: str):
        self.folder = Path(folder)
        self.splits = [s for s in _SPLITS if (self.folder / s).is_dir()]
        root = self.folder
        if self.splits:
            split = next((s for s in splits if s in self.splits), None)
            if split is None and len(self.splits) == 1:
                split = self.splits[0]
            if split is None:
                raise UserError(f"{folder} has no split {' or '.join(splits)} (it has: {', '.join(self.splits)})")
            root /= split
            # Classes of all splits, so that a class that one of them lacks moves no other's number
            homes = [self.folder / s for s in self.splits]
        else:
            split, homes = "all images", [root]
        classes = sorted({c.name for home in homes for c in home.iterdir() if c.is_dir()})
        self.classes: list[str] | None = classes
        self.name = f"{folder} ({split})"
        self._files: list[Path] = []
        labels: list[int] = []
        digest = hashlib.sha256()
        for number, name in enumerate(classes):
            for path in sorted(_images(root / name)):
                self._files.append(path)
                labels.append(number)
                digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        if not self._files:
            raise UserError(f"{root} holds no images: they are looked for in {root}/CLASS/, as {', '.join(SUFFIXES)}")
        self._labels = np.array(labels, dtype=np.int64)
        self.shard_sizes = [min(_PER_SHARD, len(labels) - i) for i in range(0, len(labels), _PER_SHARD)]
        self.digest = f"folder-{digest.hexdigest()[:32]}"

    def read(self, sample_id: int, channels: int, choose: Choose | None = None) -> RawSample:
        path = self._files[sample_id]
        try:
            data = path.read_bytes()
            return RawSample(decode_image(data, channels, choose), int(self._labels[sample_id]), crc32(data))
        except Exception as e:
            raise BadSample(f"{path}: {e}") from e

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        """Reads the files: a folder has no index."""
        return np.array([crc32(self._files[int(i)].read_bytes()) for i in sample_ids], dtype=np.int64)

    def keys(self, shard: int) -> np.ndarray:
        first = shard * _PER_SHARD
        names = (p.relative_to(self.folder).with_suffix("") for p in self._files[first : first + _PER_SHARD])
        return np.array([xxhash.xxh3_64_intdigest(os.fsencode(n)) for n in names], dtype=np.uint64)

    def labels(self) -> np.ndarray:
        return self._labels

    def sample_name(self, sample_id: int) -> str:
        return self._files[sample_id].name


def _images(folder: Path) -> list[Path]:
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return [p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
