"""Lists of images as text: CSV and TSV (with a header, or with `--header` as an S3 Inventory needs), JSON Lines.

Every column that is not recognised is kept and travels with its image as JSON. Files ending in `.gz` are unpacked
while they are read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import posixpath
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from data_tools.errors import UserError
from data_tools.sources import places
from data_tools.sources.rows import BATCH_ROWS, Row, batches_of, has_image_suffix, split_name

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image_path", "filepath", "url", "uri")
LABEL_COLUMNS = ("label", "labels", "class", "cls")
_SIZE_COLUMNS = ("size", "bytes", "file_size")
_STAT_THREADS = 32
_STAT_ROWS = 64  # a task of a thread


@dataclass(frozen=True)
class Columns:
    """Which columns mean what; None where the source has no such column.

    - header: column names of a CSV that has no header line.
    - label_from_folder: the class is the name of the folder that holds the image.
    """

    path: str | None = None
    image: str | None = None
    label: str | None = None
    group: str | None = None
    header: tuple[str, ...] = ()
    label_from_folder: bool = False


@dataclass(frozen=True)
class Roles:
    """The columns of one file, by what they are for; bucket and key are those of an S3 Inventory."""

    path: str | None
    label: str | None
    split: str | None
    size: str | None
    group: str | None
    bucket: str | None = None
    key: str | None = None

    def used(self) -> set[str]:
        return {c for c in (self.path, self.label, self.split, self.size, self.bucket, self.key) if c}


def assign_roles(names: list[str], wanted: Columns, where: str) -> Roles:
    """Raises UserError where no column holds paths, or one that was asked for is missing."""
    lower = {name.lower(): name for name in reversed(names)}

    def pick(asked: str | None, known: tuple[str, ...], option: str) -> str | None:
        if asked is not None:
            if asked not in names:
                raise UserError(f"{where} has no column {asked!r} ({option}); it has: {', '.join(names) or 'none'}")
            return asked
        return next((lower[n] for n in known if n in lower), None)

    bucket, key = lower.get("bucket"), lower.get("key")
    inventory = wanted.path is None and bucket is not None and key is not None
    path = None if inventory else pick(wanted.path, PATH_COLUMNS, "--path-column")
    return Roles(
        path=path,
        label=None if wanted.label_from_folder else pick(wanted.label, LABEL_COLUMNS, "--label-column"),
        split=lower.get("split"),
        size=pick(None, _SIZE_COLUMNS, ""),
        group=pick(wanted.group, (), "--group-by"),
        bucket=bucket if inventory else None,
        key=key if inventory else None,
    )


class RowMaker:
    """Turns one record (a dict of cells) into a Row. `where(n)` names record n in a message.

    quoted_keys: an inventory's keys are URL-encoded, as they are in CSV and not in Parquet.
    """

    def __init__(
        self, roles: Roles, wanted: Columns, where: Callable[[int], str], ignored: Counter[str],
        quoted_keys: bool = False,
    ) -> None:  # fmt: skip
        self._roles, self._wanted, self._where, self._ignored = roles, wanted, where, ignored
        self._used, self._quoted_keys = roles.used(), quoted_keys

    def __call__(self, number: int, record: dict[str, Any]) -> Row | None:
        """None for a record that is no image (an inventory lists every object)."""
        roles = self._roles
        path = self._path(number, record)
        if path is None:
            return None
        label, labels = self._labels(number, path, record)
        split = record.get(roles.split) if roles.split else None
        if split is not None or roles.split in record:
            split = split_name(self._cell(number, record, roles.split or ""), self._where(number))
        extra = {k: v for k, v in record.items() if k not in self._used and v not in (None, "")}
        try:
            size = int(record.get(roles.size) or 0) if roles.size else 0
        except (TypeError, ValueError):
            raise UserError(f"{self._where(number)}: size {record.get(roles.size or '')!r} is not a number") from None
        group = None if roles.group is None else self._cell(number, record, roles.group)
        return Row(
            os.fsencode(path), size, 0, label, labels, split, group,
            json.dumps(extra, separators=(",", ":"), default=str) if extra else None,
        )  # fmt: skip

    def _cell(self, number: int, record: dict[str, Any], column: str) -> str:
        value = record.get(column)
        if value is None or value == "":
            raise UserError(f"{self._where(number)}: empty {column}")
        return str(value)

    def _path(self, number: int, record: dict[str, Any]) -> str | None:
        roles = self._roles
        if roles.path is not None:
            path = self._cell(number, record, roles.path)
        else:
            key = self._cell(number, record, roles.key or "")
            if self._quoted_keys:
                key = urllib.parse.unquote_plus(key)
            if _is_past(record):
                self._ignored["old versions and delete markers"] += 1
                return None
            if not has_image_suffix(key):
                self._ignored["objects without an image suffix"] += 1
                return None
            path = f"s3://{self._cell(number, record, roles.bucket or '')}/{key}"
        if "\0" in path:
            raise UserError(f"{self._where(number)}: a path cannot hold a zero byte")
        return path if places.is_url(path) else posixpath.normpath(path)

    def _labels(self, number: int, path: str, record: dict[str, Any]) -> tuple[str | None, list[str] | None]:
        if self._wanted.label_from_folder:
            return places.base(places.parent(path)), None
        column = self._roles.label
        if column is None:
            return None, None
        value = record.get(column)
        if isinstance(value, str) and column.lower() == "labels":
            value = parse_labels(value, self._where(number))
        if isinstance(value, list):
            return None, [label_text(v, self._where(number)) for v in value]
        return label_text(self._cell(number, record, column), self._where(number)), None


def _is_past(record: dict[str, Any]) -> bool:
    """Does this record of an inventory of all versions say that the object is not there (any more)?"""
    said = {name.lower().replace("_", ""): str(value).lower() for name, value in record.items()}
    return said.get("islatest") == "false" or said.get("isdeletemarker") == "true"


def label_text(value: object, where: str) -> str:
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: label {text!r} is not valid UTF-8") from None
    return text


def parse_labels(text: str, where: str) -> list[str]:
    """Several labels in one cell: a JSON list, or names with `;` between them. Empty: none."""
    if text.lstrip().startswith("["):
        try:
            return [str(v) for v in json.loads(text)]
        except ValueError as e:
            raise UserError(f"{where}: labels {text!r}: {e}") from None
    return [part.strip() for part in text.split(";") if part.strip()]


# --- the sources --------------------------------------------------------------------------------------------


class TextManifest:
    """A CSV, TSV or JSON Lines file. Relative paths are relative to its folder.

    Labels that are all plain integers are class indices, otherwise class names. Raises UserError, with the place,
    for a missing column, an empty path, label or split.
    """

    names = False
    classes: list[str] | None = None
    sequential = forward_only = False
    many_units = False

    def __init__(self, file: str, columns: Columns, options: places.StorageOptions | None = None) -> None:
        self.root, self._file, self._columns, self._options = places.parent(file), file, columns, options
        name = file.lower().removesuffix(".gz")
        self.kind = "jsonl" if name.endswith((".jsonl", ".ndjson")) else "csv"
        self._delimiter = "\t" if name.endswith(".tsv") else ","
        self.stamp = None  # the files it lists may change while it does not
        self.own_stamp = places.stamp(file, options)

    def units(self) -> list[str]:
        return [self._file]

    def batches(self, unit: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        rows = self._json_rows(ignored) if self.kind == "jsonl" else self._csv_rows(ignored)
        return measured(rows, self.root, self._options)

    def _text(self) -> io.TextIOBase:
        raw = places.open_binary(self._file, self._options)
        stream = gzip.GzipFile(fileobj=raw) if self._file.lower().endswith(".gz") else raw
        return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]

    def _csv_rows(self, ignored: Counter[str]) -> Iterator[Row]:
        line = 1
        try:
            with self._text() as text:
                reader = csv.reader(text, delimiter=self._delimiter, strict=True)
                names = list(self._columns.header) or next(reader, [])
                roles = assign_roles(names, self._columns, self._file)
                if roles.path is None and roles.key is None:
                    raise UserError(
                        f"{self._file} needs a header with the columns path,label[,split], or --header; it has: "
                        f"{', '.join(names) or 'none'}"
                    )
                make = RowMaker(roles, self._columns, lambda n: f"{self._file}, line {n}", ignored, quoted_keys=True)
                for cells in reader:
                    line = reader.line_num
                    if not cells:
                        continue
                    if len(cells) > len(names):
                        raise UserError(f"{self._file}, line {line}: {len(cells)} cells, the header has {len(names)}")
                    cells += [""] * (len(names) - len(cells))
                    row = make(line, dict(zip(names, cells)))
                    if row is not None:
                        yield row
        except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as e:
            raise UserError(f"{self._file}, near line {line}: {e}; it must be UTF-8 text in CSV form") from e

    def _json_rows(self, ignored: Counter[str]) -> Iterator[Row]:
        makers: dict[tuple[str, ...], RowMaker] = {}
        line = 0
        try:
            with self._text() as text:
                for line, record_text in enumerate(text, 1):
                    if not record_text.strip():
                        continue
                    record = json.loads(record_text)
                    if not isinstance(record, dict):
                        raise UserError(f"{self._file}, line {line}: not a JSON object")
                    names = tuple(record)
                    make = makers.get(names)
                    if make is None:
                        make = makers[names] = self._json_maker(names, line, ignored)
                    row = make(line, record)
                    if row is not None:
                        yield row
        except (ValueError, RecursionError, EOFError, gzip.BadGzipFile) as e:
            raise UserError(f"{self._file}, line {line}: {e}; every line must be a JSON object in UTF-8") from e

    def _json_maker(self, names: tuple[str, ...], line: int, ignored: Counter[str]) -> RowMaker:
        roles = assign_roles(list(names), self._columns, f"{self._file}, line {line}")
        if roles.path is None and roles.key is None:
            raise UserError(f"{self._file}, line {line}: no path; it has: {', '.join(names) or 'nothing'}")
        return RowMaker(roles, self._columns, lambda n: f"{self._file}, line {n}", ignored)


def measured(rows: Iterator[Row], root: str, options: places.StorageOptions | None) -> Iterator[pa.RecordBatch]:
    """Batches of `rows`, with sizes and change times filled in where the list itself does not say the size."""
    rest = iter(rows)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:

        def look(row: Row) -> Row:
            if row.size or row.codec:
                return row
            seen = places.info(places.join(root, os.fsdecode(row.path)), options)
            return row if seen is None or seen.is_dir else row._replace(size=seen.size, mtime_ns=seen.mtime_ns)

        while block := list(islice(rest, BATCH_ROWS)):
            if any(not row.size and not row.codec for row in block):
                chunks = [block[at : at + _STAT_ROWS] for at in range(0, len(block), _STAT_ROWS)]
                block = [row for chunk in pool.map(lambda rows: list(map(look, rows)), chunks) for row in chunk]
            yield from batches_of(block)
