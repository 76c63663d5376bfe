"""Where samples come from: `read(sample_id)` gives pixels and a label, whatever stores them.

`TarSource` reads an indexed WebDataset from wherever `pipeline.data.store` reads; `pipeline.data.synthetic` makes
images up. A new kind of source is one more class with these members. Imports no torch: the prefetcher needs none.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import xxhash

from data_tools.checksum import crc32
from data_tools.errors import UserError
from data_tools.manifest import INDEX_DTYPE, MANIFEST_NAME, DatasetManifest, load_index
from pipeline.data.cache import CacheReader, chunk_name
from pipeline.data.decode import Choose, decode_image
from pipeline.data.shards import ShardTable
from pipeline.data.store import READ_SECONDS, DamagedShard, StoreUnreachable, is_url, open_folder
from pipeline.duration import Duration

if TYPE_CHECKING:
    from pipeline.config import Config

EVAL_SPLITS = ("val", "validation", "test")  # the first that a data set has
_INDEX_BYTES = 64 << 20  # of index rows kept in memory by one process, where they cannot be mapped
_READ_AHEAD = 64  # samples that one request fetches where they are read one after the other


class Encoded(NamedTuple):
    """The stored bytes of an image, their class index, and their crc32 (verified)."""

    data: bytes
    label: int
    crc32: int


class RawSample(NamedTuple):
    """Pixels uint8 [H, W, C] (of a crop: until the next sample is read), class index, crc32 of the encoded bytes."""

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

    def read(self, sample_id: int, channels: int, choose: Choose | None = None) -> RawSample:
        """`choose`: of which part of the image the pixels are wanted, as `decode_image` has it.

        Raises BadSample; StoreUnreachable or DamagedShard where it is not this one sample's fault."""
        ...

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        """What the bytes of these samples should have, int64: from the index, without reading them."""
        ...

    def keys(self, shard: int) -> np.ndarray:
        """64-bit hashes of the keys of one shard's samples, uint64: from the index."""
        ...

    def labels(self) -> np.ndarray:
        """The class index of every sample, int64, without reading images."""
        ...

    def sample_name(self, sample_id: int) -> str:
        """The file name that a sample had, for label files that go by it. Raises as `read` does."""
        ...


@dataclass(frozen=True)
class Access:
    """How files are read: the `data.*` settings of the same names."""

    read: str = "auto"
    storage_options: dict[str, Any] = field(default_factory=dict)
    read_timeout: float = READ_SECONDS
    corrupt_shards: str = "fail"
    check: bool = True  # look at every shard's size when the set is opened

    @staticmethod
    def of(config: Config, check: bool = True) -> Access:
        d = config.data
        timeout = Duration.parse(d.read_timeout).seconds()
        return Access(d.read, dict(d.storage_options), timeout, d.corrupt_shards, check)


def open_source(
    path: str, *splits: str, image_size: int, num_classes: int | None, access: Access | None = None
) -> SampleSource:
    """The first of `splits` that the data set at `path` has; `synthetic` needs no data. Raises UserError."""
    if path == "synthetic":
        from pipeline.data.synthetic import SyntheticSource

        return SyntheticSource(splits[0], image_size=image_size, num_classes=num_classes or 10)
    from pipeline.data.folder import FolderSource, is_image_folder

    if not is_url(path) and not (Path(path) / MANIFEST_NAME).exists() and is_image_folder(path):
        return FolderSource(path, *splits)
    return TarSource(path, *splits, access=access)


class TarSource:
    """Indexed tars in a local folder or an object store, one positioned read a sample.

    `sequential` says that samples will be read in the order of their ids: from a remote store many come at once.

    Raises:
        UserError: no such data set or split; a shard that is missing or whose size is not the manifest's.
    """

    def __init__(self, folder: str | Path, *splits: str, access: Access | None = None, max_open: int = 128):
        self.access = access or Access()
        self.files = open_folder(
            folder,
            self.access.storage_options,
            read=self.access.read,
            timeout=self.access.read_timeout,
            max_open=max_open,
        )
        manifest = self._load_manifest()
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
        self.shards = ShardTable(manifest.splits[split])
        self.shard_sizes: list[int] = self.shards.samples.tolist()
        self.digest = manifest.split_digest(split)
        self.classes = manifest.classes
        self.sequential = False
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._max_open = max_open
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()
        # Of each shard whose index was verified: where the rows begin in it; else 0
        self._verified = np.zeros(len(self.shards), dtype=np.uint16)
        self._ahead: tuple[int, int, bytes] = (0, 0, b"")  # shard, first offset, bytes: of the last sequential read
        self._cache: CacheReader | None = None
        self._chunk = 1
        if self.access.check and self.access.corrupt_shards == "fail":
            self._check_shards()

    @property
    def remote(self) -> bool:
        return self.files.remote

    def use_cache(self, cache: CacheReader, chunk: int) -> None:
        """From now on whole chunks of `chunk` samples are looked for in a node's cache first."""
        self._cache, self._chunk = cache, chunk

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without what this one holds open."""
        return {**self.__dict__, "_rows": OrderedDict(), "_ahead": (0, 0, b""), "_cache": None}

    def place_of(self, sample_id: int) -> tuple[int, int]:
        """(shard, row) of a sample."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return shard, sample_id - int(self.starts[shard])

    def encoded(self, sample_id: int) -> Encoded:
        """The stored bytes, verified against the index. Raises as `read` does."""
        shard, row = self.place_of(sample_id)
        if self._cache is not None:
            name = chunk_name(self.digest, self._chunk, shard, row // self._chunk)
            found = self._cache.sample(name, row % self._chunk)
            if found is not None:
                data, label, crc = found
                if crc32(data) == crc:
                    return Encoded(data, label, crc)
        try:
            return self._direct(shard, row)
        except DamagedShard as e:
            if self.access.corrupt_shards == "mask":
                raise BadSample(str(e)) from e
            raise

    def read(self, sample_id: int, channels: int, choose: Choose | None = None) -> RawSample:
        data, label, crc = self.encoded(sample_id)
        try:
            pixels = decode_image(data, channels, choose)
        except Exception as e:
            raise BadSample(f"{self._where(*self.place_of(sample_id))}: {e}") from e
        return RawSample(pixels, label, crc)

    def crc32(self, sample_ids: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self.starts, sample_ids, side="right") - 1
        crcs = np.empty(len(sample_ids), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            try:
                crcs[here] = self.rows(int(shard))["crc32"][sample_ids[here] - self.starts[shard]]
            except DamagedShard:
                if self.access.corrupt_shards == "fail":
                    raise
                crcs[here] = 0  # masked: none of its samples can have been used
        return crcs

    def keys(self, shard: int) -> np.ndarray:
        return self.rows(shard)["key"]

    def labels(self) -> np.ndarray:
        return np.concatenate([self.rows(i)["label"] for i in range(len(self.shards))]).astype(np.int64)

    def sample_name(self, sample_id: int) -> str:
        shard, row = self.place_of(sample_id)
        try:
            header = self.read_range(shard, int(self.rows(shard)[row]["offset"]) - 512, 100)
        except DamagedShard as e:
            if self.access.corrupt_shards == "mask":
                raise BadSample(str(e)) from e
            raise
        return header.split(b"\0")[0].decode("utf-8", "replace").rpartition("/")[2]

    def rows(self, shard: int) -> np.ndarray:
        """The shard's index, verified against the manifest. Raises DamagedShard."""
        if shard in self._rows:
            self._rows.move_to_end(shard)
            return self._rows[shard]
        rows = self._rows[shard] = self.load_rows(shard)
        if self.remote:
            while len(self._rows) > 1 and sum(r.nbytes for r in self._rows.values()) > _INDEX_BYTES:
                self._rows.popitem(last=False)
        elif len(self._rows) > self._max_open:
            self._rows.popitem(last=False)
        return rows

    def load_rows(self, shard: int) -> np.ndarray:
        """As `rows`, but read now; from a local folder mapped, so that the pages are shared by all processes."""
        name = self.shards[shard].index_name
        where = f"{self.files.place}/{name}"
        if not self._verified[shard] or self.remote:
            try:
                raw = self.files.read(name)
            except FileNotFoundError:
                raise DamagedShard(f"{where} is missing: the shard has no index; run `mixer data index`") from None
            if xxhash.xxh3_128_hexdigest(raw) != self.shards[shard].index_hash:
                # A wrong offset would show as a bad crc32, a wrong label would not show
                raise DamagedShard(
                    f"{where} is not the one that the manifest names: damaged, or of another tar. "
                    "Run `mixer data index`"
                )
            self._verified[shard] = len(raw) - self.shards[shard].samples * INDEX_DTYPE.itemsize
            if self.remote:
                return np.load(io.BytesIO(raw), allow_pickle=False)
        return np.asarray(load_index(where))  # still mapped; a memmap's own indexing is several times as slow

    def read_range(self, shard: int, start: int, length: int) -> bytes:
        """Bytes of a tar, all of them. Raises DamagedShard where it is missing or ends earlier."""
        info = self.shards[shard]
        where = f"{self.files.place}/{info.name}"
        try:
            data = self.files.read_range(info.name, start, length)
        except FileNotFoundError:
            raise DamagedShard(f"{where} is missing; the manifest lists it. Restore it, or shard again") from None
        except OSError as e:
            if not self.remote:
                raise BadSample(f"{where} at {start:,}: {e.strerror}") from e
            data = b""
        if len(data) != length:
            raise DamagedShard(
                f"{where} ends before byte {start + length:,}, the manifest says {info.bytes:,}: it was replaced or "
                f"cut short. See `mixer data verify {self.files.place}`"
            )
        return data

    def _direct(self, shard: int, row: int) -> Encoded:
        for again in (True, False):
            entry = self._entry(shard, row)
            data = self._bytes(shard, row, int(entry["offset"]), int(entry["size"]))
            crc = crc32(data)
            if crc == int(entry["crc32"]):
                return Encoded(data, int(entry["label"]), crc)
            if not (again and self.remote):  # what came over a network is asked for once more
                break
            self._ahead = (0, 0, b"")
        raise BadSample(f"{self._where(shard, row)}: crc32 is not the index'")

    def _entry(self, shard: int, row: int) -> np.void:
        """One row of a shard's index.

        A batch of a large set draws from more shards than files may be open: once an index is verified, a read of its
        row costs a fraction of mapping it again.
        """
        at = int(self._verified[shard])
        if at and not self.remote and shard not in self._rows:
            try:
                with open(f"{self.files.place}/{self.shards[shard].index_name}", "rb", buffering=0) as file:
                    raw = os.pread(file.fileno(), INDEX_DTYPE.itemsize, at + row * INDEX_DTYPE.itemsize)
                return np.frombuffer(raw, INDEX_DTYPE)[0]
            except (OSError, ValueError, IndexError):
                pass  # gone or cut short since: said below
        return self.rows(shard)[row]

    def _bytes(self, shard: int, row: int, start: int, size: int) -> bytes:
        if not (self.sequential and self.remote):
            return self.read_range(shard, start, size)
        rows = self.rows(shard)
        held_shard, held_start, held = self._ahead
        at = start - held_start
        if held_shard != shard or at < 0 or at + size > len(held):
            last = rows[min(row + _READ_AHEAD, len(rows)) - 1]
            held = self.read_range(shard, start, int(last["offset"]) + int(last["size"]) - start)
            self._ahead, at = (shard, start, held), 0
        return held[at : at + size]

    def _where(self, shard: int, row: int) -> str:
        return f"{self.shards[shard].name} row {row}"

    def _load_manifest(self) -> DatasetManifest:
        place = self.files.place
        if not is_url(place):
            return DatasetManifest.load(place)
        try:
            text = self.files.read(MANIFEST_NAME).decode("utf-8")
        except FileNotFoundError:
            raise UserError(
                f"no {MANIFEST_NAME} in {place}: not a finished data set; make one with `mixer shard SOURCE {place}`"
            ) from None
        except StoreUnreachable as e:
            raise UserError(f"{e}; see data.storage_options") from e
        return DatasetManifest.from_json(text, f"{place}/{MANIFEST_NAME}")

    def _check_shards(self) -> None:
        sizes = self.files.sizes([shard.name for shard in self.shards])
        for shard in self.shards if sizes else []:
            where = f"{self.files.place}/{shard.name}"
            if shard.name not in sizes:
                raise DamagedShard(f"{where} is missing; the manifest lists it. Restore it, or shard again")
            if sizes[shard.name] != shard.bytes:
                raise DamagedShard(
                    f"{where} has {sizes[shard.name]:,} bytes, the manifest says {shard.bytes:,}: it was replaced or "
                    f"cut short. See `mixer data verify {self.files.place}`"
                )
