"""Where a finished data set lies: a local folder or an object store, behind the same few calls.

Names are relative to the set, with `/`. A write appears whole or not at all in both: by rename, or because an
object store shows an object only when its upload has ended.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import UserError
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, tars_url
from data_tools.storage import filesystem, is_url, join, retrying, write_atomic

_THREADS = 16  # small objects are all waiting


class Store(Protocol):
    """A folder of files. Every call raises FileNotFoundError for a name that is not there."""

    place: str

    def read(self, name: str) -> bytes: ...

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file; fewer at its end."""
        ...

    def write(self, name: str, data: bytes) -> None: ...

    def upload(self, path: Path, name: str) -> None:
        """Copies a local file into the store."""
        ...

    def list(self, folder: str = "") -> dict[str, int]:
        """The files directly in `folder`: base name -> bytes. Empty where there is no such folder."""
        ...

    def delete(self, names: Collection[str]) -> None:
        """Missing names are no error."""
        ...

    def local(self, name: str) -> Any:
        """Context manager: a local path of the file; a temporary copy where the store is remote."""
        ...


class LocalStore:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, str(folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        with open(self.folder / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)

    def upload(self, path: Path, name: str) -> None:
        self.write(name, path.read_bytes())

    def list(self, folder: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(self.folder / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has just renamed what it wrote
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def delete(self, names: Collection[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        path.stat()
        yield path


class ObjectStore:
    """A folder of an object store, through fsspec; transient errors are retried (`storage.retrying`)."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.place = url.rstrip("/")
        self._fs, path = filesystem(url, options)
        self._root = path.rstrip("/")

    def read(self, name: str) -> bytes:
        return self._try("read", name, lambda: self._fs.cat_file(self._path(name)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return self._try("read", name, lambda: self._fs.cat_file(self._path(name), start=start, end=end))

    def write(self, name: str, data: bytes) -> None:
        self._try("write", name, lambda: self._fs.pipe_file(self._path(name), data))

    def upload(self, path: Path, name: str) -> None:
        def put() -> None:
            try:
                self._fs.put_file(str(path), self._path(name))
            except FileNotFoundError as e:
                if "NoSuchUpload" not in str(e.__cause__):
                    raise
                raise OSError("the store forgot an upload in parts") from e  # it begins anew
            self._fs.invalidate_cache()
            size = self._fs.info(self._path(name))["size"]
            if size != path.stat().st_size:
                raise OSError(f"{size} bytes arrived, {path.stat().st_size} were sent")

        self._try("write", name, put)

    def list(self, folder: str = "") -> dict[str, int]:
        def ls() -> dict[str, int]:
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            return {e["name"].rsplit("/", 1)[-1]: int(e["size"] or 0) for e in entries if e["type"] == "file"}

        return self._try("list", folder, ls)

    def delete(self, names: Collection[str]) -> None:
        def remove(name: str) -> None:
            with suppress(FileNotFoundError):
                self._try("delete", name, lambda: self._fs.rm_file(self._path(name)))

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(remove, names))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mixer-") as folder:
            path = Path(folder) / os.path.basename(name)
            self._try("read", name, lambda: self._fs.get_file(self._path(name), str(path)))
            yield path

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, verb: str, name: str, action: Any) -> Any:
        what = f"cannot {verb} {join(self.place, name)}"
        try:
            return retrying(action, what)
        except PermissionError as e:
            raise UserError(f"{what}: {e}; see --storage-options") from e
        except FileNotFoundError as e:
            if verb == "write":  # a place to write to is missing, not a file
                raise UserError(f"{what}: no such bucket; make it first") from e
            raise


class LinkedStore(LocalStore):
    """A local folder with indexes whose tars lie in another store, which is only read."""

    def __init__(self, folder: Path, tars: Store) -> None:
        super().__init__(folder)
        self._tars = tars

    def read(self, name: str) -> bytes:
        return self._tars.read(name) if name.endswith(".tar") else super().read(name)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return (
            self._tars.read_range(name, start, end) if name.endswith(".tar") else super().read_range(name, start, end)
        )

    def list(self, folder: str = "") -> dict[str, int]:
        tars = self._tars.list(folder)
        return {**super().list(folder), **{name: size for name, size in tars.items() if name.endswith(".tar")}}

    def local(self, name: str) -> Any:
        return self._tars.local(name) if name.endswith(".tar") else super().local(name)


def open_store(place: str | Path, options: dict[str, Any] | None = None) -> Store:
    """The store at a local path or a URL. Raises UserError where the URL's package is missing."""
    if is_url(place):
        return ObjectStore(str(place), options)
    tars = tars_url(place)
    return LocalStore(Path(place)) if tars is None else LinkedStore(Path(place), open_store(tars, options))


def read_many(store: Store, names: Collection[str]) -> Iterator[bytes]:
    """The files' bytes, in order, fetched by threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(store.read, names)


def load_manifest(store: Store) -> DatasetManifest:
    """`dataset.json` of a finished set. Raises UserError where it is missing."""
    try:
        text = store.read(MANIFEST_NAME).decode("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"no {MANIFEST_NAME} in {store.place}: not a finished data set; make one with `mixer shard` or "
            "`mixer data index`"
        ) from None
    return DatasetManifest.from_json(text, join(store.place, MANIFEST_NAME))
