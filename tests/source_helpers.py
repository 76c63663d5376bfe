"""Small archives, and listings of sources, for tests."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

from data_tools.sources import Columns, open_source


def tar_bytes(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def list_rows(path: str | Path, columns: Columns | None = None, **options) -> tuple[list[dict], Counter[str]]:
    """Every row of a source, as dictionaries, and what was ignored."""
    source = open_source(path, columns, options or None)
    ignored: Counter[str] = Counter()
    rows = [row for unit in source.units() for batch in source.batches(unit, ignored) for row in batch.to_pylist()]
    return rows, ignored
