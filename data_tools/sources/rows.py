"""What a source says of each sample: one row of a fixed Arrow schema. No image is opened here.

`path` is a sample's identity within its corpus: order, split and tar key are derived from it, so that they stay the
same when the corpus is mounted elsewhere or grows. Where the bytes lie is said beside it: a file, or a range of a
container (an archive, a Parquet file).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum
from itertools import islice
from typing import NamedTuple, Protocol

import pyarrow as pa

from data_tools.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
SPLIT_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
BATCH_ROWS = 1 << 14
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,32}")


class Codec(IntEnum):
    """How the bytes of a sample are had. The numbers are stored in plans."""

    FILE = 0  # a file (or object) of its own
    RANGE = 1  # `size` bytes at `offset` of an uncompressed archive, nested ones included
    ZIP = 2  # the zip member whose local header is at `offset`, `stored` bytes long there
    STREAM = 3  # `size` bytes at `offset` of what a compressed tar unpacks to: only forward
    PARQUET = 4  # `offset` = row group * 2^32 + row in it; `size` is an estimate
    BROKEN = 5  # an archive that ends in the middle: `extra` says how; goes to quarantine


class Row(NamedTuple):
    """One image as found. `size` and `mtime_ns` are 0 where unknown or the file could not be examined.

    `label` is a class name, or a class index in digits; `labels` the same for several; `extra` a JSON object that
    travels with the image; `container` the archive's path, empty for a file of its own.
    """

    path: bytes
    size: int
    mtime_ns: int
    label: str | None = None
    labels: list[str] | None = None
    split: str | None = None
    group: str | None = None
    extra: str | None = None
    container: bytes = b""
    offset: int = 0
    stored: int = 0
    codec: int = Codec.FILE


SCHEMA = pa.schema(
    [
        ("path", pa.large_binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
        ("group", pa.string()),
        ("extra", pa.large_string()),
        ("container", pa.binary()),
        ("offset", pa.int64()),
        ("stored", pa.int64()),
        ("codec", pa.int8()),
    ]
)


class Source(Protocol):
    """A corpus, or a part of one, that can be listed.

    - kind, root: for the plan; `root` is what a relative `path` of a file is relative to.
    - names: labels are class names even where they look like numbers (folders); classes: names by index where the
      source brings them.
    - sequential: reading in listing order is much cheaper; forward_only: nothing else is possible.
    - stamp: what identifies the state of its files without listing them; None where only a listing can tell.
    - many_units: units are small, so that several are listed at once.
    """

    @property
    def kind(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def names(self) -> bool: ...
    @property
    def classes(self) -> list[str] | None: ...
    @property
    def sequential(self) -> bool: ...
    @property
    def forward_only(self) -> bool: ...
    @property
    def stamp(self) -> str | None: ...
    @property
    def many_units(self) -> bool: ...

    def units(self) -> list[str]:
        """The parts to list, in order: the same for the same corpus."""
        ...

    def batches(self, unit: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        """The rows of one unit, in order; counts in `ignored` what was passed over, by reason."""
        ...


def batches_of(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Rows as Arrow batches."""
    rest = iter(rows)
    while block := list(islice(rest, BATCH_ROWS)):
        columns = [pa.array(values, field.type) for values, field in zip(zip(*block), SCHEMA)]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def batch_of(columns: dict[str, pa.Array], length: int) -> pa.RecordBatch:
    """A batch from some of the columns; the others take `Row`'s defaults."""
    defaults = {"mtime_ns": 0, "size": 0, "container": b"", "offset": 0, "stored": 0, "codec": int(Codec.FILE)}
    arrays = []
    for field in SCHEMA:
        array = columns.get(field.name)
        if array is None:
            array = pa.repeat(pa.scalar(defaults.get(field.name), field.type), length)
        arrays.append(array if array.type == field.type else array.cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def split_name(text: str, where: str) -> str:
    """A split's canonical name ("validation" is "val"). Raises UserError for what cannot name a shard."""
    name = SPLIT_ALIASES.get(text, text)
    if not _SPLIT_NAME.fullmatch(name):
        raise UserError(f"{where}: split {text!r}: use letters, digits and underscores")
    return name


def has_image_suffix(name: str) -> bool:
    return "." + name.rpartition(".")[2].lower() in IMAGE_SUFFIXES if "." in name else False
