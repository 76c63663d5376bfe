"""`dataset.json` and the per-shard index: the one thing the sharding tools and the trainer share.

A data set is a folder of USTAR tars (`train-000000.tar`, ...), beside each tar a numpy index without pickle
(`train-000000.idx.npy`, one row a sample), and one `dataset.json` that lists the shards of every split.
The manifest's digest names the sample order's domain: which samples exist, in which order, and what they hold.
Imports numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
MAX_LABEL = 10**7 - 1  # class counts are kept for every index up to the largest: ids are no class indices

# One row a sample, in tar order. `offset` and `size` are the image member's data in the tar (not its header).
INDEX_DTYPE = np.dtype(
    [
        ("key", "<u8"),  # xxh3_64 of the sample key (UTF-8)
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32", "<u4"),  # of the image bytes
        ("label", "<i4"),  # class index; -1 where the sample has none or several
        ("width", "<u4"),  # 0 where the image was not looked at
        ("height", "<u4"),
    ]
)


TARS_NAME = "tars.url"  # beside dataset.json where the tars lie elsewhere: their URL, as a link would say it


def tars_url(folder: str | Path) -> str | None:
    """Where the tars of the set in a local folder lie, if not there: see `mixer data index --out`."""
    try:
        return (Path(folder) / TARS_NAME).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


@dataclass(frozen=True)
class ShardInfo:
    """One tar. `name` is relative to the data set's folder; hashes are xxh3_128 hex digests."""

    name: str
    samples: int
    bytes: int
    hash: str
    index_hash: str

    @property
    def index_name(self) -> str:
        return index_name(self.name)


def index_name(tar_name: str) -> str:
    return tar_name.removesuffix(".tar") + ".idx.npy"


@dataclass(frozen=True)
class DatasetManifest:
    """What a finished data set says of itself.

    `splits` maps a split's name to its shards, in order; `classes` gives the names by class index (None where
    labels have no names); `source` describes where the samples came from (digest, options), for people and for
    the refusal to continue into another set's folder.
    """

    splits: dict[str, list[ShardInfo]]
    classes: list[str] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    tool_version: str = ""
    version: int = FORMAT_VERSION

    def samples(self, split: str) -> int:
        return sum(s.samples for s in self.splits[split])

    def split_digest(self, split: str) -> str:
        """Hex digest of what decides the sample order of one split: its shards' names, counts and index hashes."""
        rows = [[s.name, s.samples, s.bytes, s.index_hash] for s in self.splits[split]]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = MANIFEST_NAME) -> DatasetManifest:
        """Raises UserError for a file of another kind or of a newer version."""
        try:
            raw = json.loads(text)
            version = raw["version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{where}: format version {version}, this release reads {FORMAT_VERSION}; "
                    "upgrade the package, or shard the set again"
                )
            splits = {k: [ShardInfo(**s) for s in v] for k, v in raw["splits"].items()}
            return DatasetManifest(**{**raw, "splits": splits})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{where} is not a data set manifest ({type(e).__name__}: {e}); "
                "run `mixer shard` or `mixer data index` to make one"
            ) from e

    @staticmethod
    def load(folder: str | Path) -> DatasetManifest:
        """Reads `folder/dataset.json`. Raises UserError where it is missing."""
        path = Path(folder) / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(
                f"no {MANIFEST_NAME} in {folder}: not a finished data set; make one with `mixer shard SOURCE {folder}`"
            ) from None
        return DatasetManifest.from_json(text, str(path))


def load_index(path: str | Path, mmap: bool = True) -> np.ndarray:
    """The index rows of one shard, shape [samples], dtype INDEX_DTYPE; memory-mapped by default.

    Raises UserError where they are missing or damaged.
    """
    return read_rows(lambda: np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False), str(path))


def read_rows(load: Callable[[], np.ndarray], where: str) -> np.ndarray:
    """What `load` gives, checked to be index rows; `where` names them in errors. Raises as `load_index` does."""
    try:
        rows = load()
    except FileNotFoundError:
        raise UserError(f"{where} is missing: the shard has no index; run `mixer data index`") from None
    except (ValueError, EOFError) as e:
        raise UserError(f"{where} is damaged ({e}); run `mixer data index` to write it again") from e
    if rows.dtype != INDEX_DTYPE or rows.ndim != 1:
        raise UserError(f"{where} is not a shard index of this format; run `mixer data index` to write it again")
    return rows
