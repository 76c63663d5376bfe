"""Where samples come from. `open_sources` tells the kind of each source by what lies there.

Listing only: nothing here opens an image, and nothing read from a corpus is ever executed or unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_tools.errors import UserError
from data_tools.manifest import MANIFEST_NAME, TARS_NAME, tars_url
from data_tools.sources import places
from data_tools.sources.archives import ArchiveSource
from data_tools.sources.folder import FolderSource
from data_tools.sources.manifests import Columns, TextManifest
from data_tools.sources.members import is_archive
from data_tools.sources.parquet import ParquetSource
from data_tools.sources.rows import IMAGE_SUFFIXES, Codec, Row, Source, has_image_suffix

__all__ = ["IMAGE_SUFFIXES", "Codec", "Columns", "Row", "Source", "open_source", "open_sources"]

_TEXT = (".csv", ".tsv", ".jsonl", ".ndjson")
_TEXT_SUFFIXES = _TEXT + tuple(s + ".gz" for s in _TEXT)


def open_sources(
    paths: Sequence[str | Path], columns: Columns | None = None, options: places.StorageOptions | None = None
) -> list[Source]:
    """Raises UserError for anything that is no corpus."""
    if not paths:
        raise UserError("no source given")
    return [open_source(path, columns, options) for path in paths]


def open_source(
    path: str | Path, columns: Columns | None = None, options: places.StorageOptions | None = None
) -> Source:
    """The source at `path`: a folder of images, of archives or of Parquet files; a manifest; an archive."""
    where, columns = places.resolve(path), columns or Columns()
    name = where.lower()
    seen = places.info(where, options)
    if seen is None and not where.startswith(("http://", "https://")):
        raise UserError(f"{where}: no such file or folder")
    if seen is not None and seen.is_dir:
        return _open_folder(where, columns, options)
    root, file = places.parent(where), places.base(where)
    if name.endswith(_TEXT_SUFFIXES):
        return TextManifest(where, columns, options)
    if name.endswith(".parquet"):
        return ParquetSource(root, [file], columns, options)
    if is_archive(name):
        return ArchiveSource(root, [file], columns, options)
    raise UserError(
        f"{where}: not a corpus I can read; give a folder of images, a .csv/.tsv/.jsonl/.parquet manifest, "
        "a tar or zip archive, or a folder of archives or Parquet files"
    )


def _open_folder(where: str, columns: Columns, options: places.StorageOptions | None) -> Source:
    try:
        entries = [(n, i) for n, i in places.list_folder(where, options) if not n.startswith(".")]
    except OSError as e:
        raise UserError(f"cannot list {where}: {e.strerror or e}") from e
    files = [n for n, i in entries if not i.is_dir]
    if TARS_NAME in files:
        raise UserError(
            f"{where} is the index of the tars at {tars_url(where)}: give those, or use `mixer data reshard`"
        )
    if MANIFEST_NAME in files or not any(has_image_suffix(n) for n in files):
        archives = [n for n in files if is_archive(n)]
        if archives:  # before Parquet: img2dataset lays one beside each tar
            return ArchiveSource(where, archives, columns, options, folder=True)
        tables = [n for n in files if n.endswith(".parquet")]
        if not tables and ("data", True) in [(n, i.is_dir) for n, i in entries]:  # as on the Hugging Face Hub
            inside = places.list_folder(places.join(where, "data"), options)
            tables = [f"data/{n}" for n, _ in inside if n.endswith(".parquet")]
        if tables:
            return ParquetSource(where, tables, columns, options)
    return FolderSource(where, options)
