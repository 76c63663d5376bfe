"""Parquet files: a manifest of paths, or images embedded as Hugging Face `datasets` stores them.

An image column holds bytes, or a struct {bytes, path}. Class names are taken from the `huggingface` entry of the
schema's metadata (ClassLabel), splits from file names as the Hub lays them out (`train-00000-of-00004.parquet`).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.errors import UserError
from data_tools.sources import places
from data_tools.sources.manifests import Columns, Roles, RowMaker, assign_roles, label_text, measured
from data_tools.sources.rows import BATCH_ROWS, SPLIT_ALIASES, Codec, Row, batch_of, batches_of
from data_tools.tables import pc

_IMAGE_COLUMNS = ("image", "img", "bytes", "jpg", "image_bytes")
_SHARD_NAME = re.compile(r"(?:^|/)([A-Za-z0-9_]+?)[-.](?:[0-9]{5}-of-[0-9]{5}|[0-9]+)[^/]*\.parquet$")


class ParquetSource:
    """One or many Parquet files of one schema. Raises UserError where no column holds paths or images."""

    names = False
    many_units = False
    forward_only = False

    def __init__(
        self, root: str, files: list[str], columns: Columns, options: places.StorageOptions | None = None
    ) -> None:
        self.root, self._files, self._columns, self._options = root, files, columns, options
        with self._open(files[0]) as file:
            schema = file.schema_arrow
        self._image = _image_column(schema, columns, files[0])
        self._roles = assign_roles(schema.names, columns, files[0])
        inventory = self._roles.key is not None
        if columns.path is not None or inventory or (self._image is None and self._roles.path is not None):
            self._image = None
        elif self._image is None:
            raise UserError(
                f"{files[0]}: no column with paths or images; it has: {', '.join(schema.names)}; "
                "name one with --path-column or --image-column"
            )
        self.kind = "parquet" if self._image is None else "parquet-images"
        self.classes = _class_names(schema, self._roles.label)
        self.sequential = self._image is not None
        self.own_stamp = "\n".join(places.stamp(places.join(root, f), options) for f in files)
        self.stamp = self.own_stamp if self._image is not None or self._roles.size is not None else None

    def _open(self, name: str) -> pq.ParquetFile:
        path = places.join(self.root, name)
        try:
            return pq.ParquetFile(places.open_binary(path, self._options))
        except (pa.ArrowInvalid, OSError) as e:
            raise UserError(f"{path} is not a readable Parquet file: {e}") from e

    def units(self) -> list[str]:
        return self._files

    def batches(self, unit: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        if self._image is not None:
            yield from self._image_batches(unit, self._image, ignored)
            return
        plain = _is_plain(self._roles, self._columns)
        with self._open(unit) as file:
            base = 0
            for batch in file.iter_batches(BATCH_ROWS):
                if plain and (fast := _plain_batch(batch, self._roles)) is not None:
                    yield fast
                else:
                    rows = self._rows(batch, base, unit, ignored)
                    yield from measured(rows, self.root, self._options)
                base += batch.num_rows

    def _rows(self, batch: pa.RecordBatch, base: int, unit: str, ignored: Counter[str]) -> Iterator[Row]:
        make = RowMaker(self._roles, self._columns, lambda n: f"{unit}, row {n}", ignored)
        for number, record in enumerate(batch.to_pylist(), base):
            row = make(number, record)
            if row is not None:
                yield row

    # --- embedded images ------------------------------------------------------------------------------------

    def _image_batches(self, unit: str, image: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        """Everything but the image bytes is read; a sample's size is the average of its row group."""
        where = places.join(self.root, unit)
        seen = places.info(where, self._options)
        mtime = seen.mtime_ns if seen is not None else 0
        by_name = _SHARD_NAME.search(unit)
        split = SPLIT_ALIASES.get(by_name[1]) if by_name is not None else None
        with self._open(unit) as file:
            names = [n for n in file.schema_arrow.names if n != image]
            stem = unit.removesuffix(".parquet")
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                size = _column_bytes(file.metadata.row_group(group), image) // max(count, 1)
                table = file.read_row_group(group, columns=names)
                rows = (
                    self._image_row(record, number, unit, image, split, ignored)._replace(
                        path=os.fsencode(f"{stem}/{group:04d}-{number:06d}"),
                        size=size, mtime_ns=mtime, container=os.fsencode(unit), offset=(group << 32) + number,
                        stored=file.schema_arrow.names.index(image), codec=Codec.PARQUET,
                    )
                    for number, record in enumerate(table.to_pylist())
                )  # fmt: skip
                yield from batches_of(rows)

    def _image_row(
        self, record: dict[str, Any], number: int, unit: str, image: str, split: str | None, ignored: Counter[str]
    ) -> Row:
        record = {k: v for k, v in record.items() if k != image} | {"_path": "x"}
        roles = Roles("_path", self._roles.label, self._roles.split, None, self._roles.group)
        if roles.label is not None and isinstance(record.get(roles.label), int) and record[roles.label] < 0:
            record[roles.label] = []  # ClassLabel: -1 says "not labelled" (a test split)
        row = RowMaker(roles, self._columns, lambda n: f"{unit}, row {n}", ignored)(number, record)
        assert row is not None
        if row.labels == []:
            row = row._replace(labels=None)
        return row if row.split is not None else row._replace(split=split)


def _column_bytes(group: pq.RowGroupMetaData, name: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == name)


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_image_type(kind.field(at).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: pa.Schema, columns: Columns, where: str) -> str | None:
    if columns.image is not None:
        if columns.image not in schema.names or not _is_image_type(schema.field(columns.image).type):
            raise UserError(f"{where}: --image-column {columns.image}: no such column of bytes or struct{{bytes,path}}")
        return columns.image
    candidates = [f.name for f in schema if _is_image_type(f.type)]
    return next((n for n in _IMAGE_COLUMNS if n in candidates), candidates[0] if candidates else None)


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """The names of a Hugging Face ClassLabel feature (or of a list of them)."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None or label is None:
        return None
    try:
        feature = json.loads(raw)["info"]["features"][label]
        while isinstance(feature, list):
            feature = feature[0]
        while "names" not in feature and "feature" in feature:
            feature = feature["feature"]
        names = feature["names"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return [label_text(n, "huggingface metadata") for n in names] if isinstance(names, list) else None


# --- the quick way for large manifests ----------------------------------------------------------------------


def _is_plain(roles: Roles, columns: Columns) -> bool:
    return roles.path is not None and roles.size is not None and not columns.label_from_folder


def _plain_batch(batch: pa.RecordBatch, roles: Roles) -> pa.RecordBatch | None:
    """Column by column, where nothing needs a second look; None where something does (then rows tell what)."""
    assert roles.path is not None and roles.size is not None
    path, size = batch.column(roles.path), batch.column(roles.size)
    if (
        set(batch.schema.names) - roles.used()
        or not pa.types.is_integer(size.type)
        or path.null_count
        or size.null_count
    ):
        return None
    if not (pa.types.is_string(path.type) or pa.types.is_large_string(path.type)):
        return None
    odd = pc.match_substring_regex(path, r"(^$|^\.|//|/\.|/$|\x00|://)")
    if pc.any(odd).as_py() or not pc.all(pc.greater(size, 0)).as_py():
        return None
    columns = {"path": path.cast(pa.large_string()).cast(pa.large_binary()), "size": size}
    for field, name in (("label", roles.label), ("group", roles.group)):
        if name is not None:
            column = batch.column(name)
            if column.null_count or pa.types.is_nested(column.type) or name.lower() == "labels":
                return None
            columns[field] = column.cast(pa.string())
            if pc.any(pc.equal(columns[field], "")).as_py():
                return None
    if roles.split is not None:
        column = pc.cast(batch.column(roles.split), pa.string())
        if not set(pc.unique(column).to_pylist()) <= set(SPLIT_ALIASES.values()):
            return None
        columns["split"] = column
    return batch_of(columns, batch.num_rows)
