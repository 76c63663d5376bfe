"""Arrow tables as files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data_tools.storage import atomic_file, write_all

pc: Any = pyarrow.compute  # made at import time: type checkers see none of its functions


def save_table(path: Path, groups: Iterable[pa.Table], group_rows: int = 1 << 20) -> list[int]:
    """Writes each table as a row group of its own (several where it has more than `group_rows` rows).

    Returns the number of the first row group of each. The tables need one schema; at least one must be given.
    """
    sink = pa.BufferOutputStream()
    writer: pq.ParquetWriter | None = None
    starts: list[int] = []
    at = 0
    for table in groups:
        if writer is None:
            writer = pq.ParquetWriter(
                sink, table.schema, compression="zstd", compression_level=1, write_statistics=False
            )
        starts.append(at)
        at += max(1, -(-table.num_rows // group_rows))
        writer.write_table(table, row_group_size=group_rows)
    assert writer is not None
    writer.close()
    with atomic_file(path) as file:
        write_all(file, memoryview(sink.getvalue()))  # type: ignore[arg-type]
    return starts


def read_rows(path: Path, start: int, length: int, columns: list[str] | None = None) -> pa.Table:
    """Rows [start, start + length) of a table, fewer at its end; reads only the row groups that hold them."""
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ends = np.cumsum(groups)
        first = int(np.searchsorted(ends, start, side="right"))
        last = min(int(np.searchsorted(ends, start + length)), len(groups) - 1)
        if first >= len(groups):
            return file.schema_arrow.empty_table()
        table = file.read_row_groups(list(range(first, last + 1)), columns=columns, use_threads=False)
        return table.slice(start - (int(ends[first - 1]) if first else 0), length)
