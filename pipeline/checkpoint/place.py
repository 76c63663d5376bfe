"""Where checkpoints lie: a local or shared folder, or an object store; the few operations that differ between them.

A place is a `Path`, or for a URL (`s3://`, `gs://`, `memory://`, ...) universal_pathlib's `UPath`, which has the same
methods over fsspec. On a store a PUT is atomic and durable by itself: no temporary names, nothing to sync. Whatever
error a store's client has for an outage, from here it comes as an OSError.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from pipeline.config import Config

MANIFEST = "MANIFEST.json"  # its presence makes a folder a checkpoint
STEP_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 8 << 20
_P = ParamSpec("_P")
_T = TypeVar("_T")


def is_local(path: Path) -> bool:
    return "://" not in str(path)


@contextlib.contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    """A store's client has errors of its own (botocore's for an outage is no OSError): raised as OSError here."""
    try:
        yield
    except Exception as e:
        if is_local(path) or isinstance(e, OSError):
            raise
        raise OSError(f"{path}: {type(e).__name__}: {e}") from e


def _on_store(operation: Callable[Concatenate[Path, _P], _T]) -> Callable[Concatenate[Path, _P], _T]:
    """`_store_errors` around an operation on a path."""

    @functools.wraps(operation)
    def run(path: Path, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with _store_errors(path):
            return operation(path, *args, **kwargs)

    return run


def place(location: str | Path, storage_options: dict[str, Any] | None = None) -> Path:
    """A folder by path or URL."""
    if "://" not in str(location):
        return Path(location)
    from upath import UPath

    return UPath(str(location), **(storage_options or {}))  # type: ignore[return-value]


def checkpoint_root(config: Config) -> Path:
    """Where the checkpoints of a run lie: `checkpoint.dir`, else its own folder."""
    c = config.checkpoint
    return place(c.dir, c.storage_options) if c.dir else Path(config.run.dir) / "checkpoints"


def checkpoint_places(config: Config) -> list[Path]:
    """`checkpoint_root`, and the mirror where there is one."""
    c = config.checkpoint
    return [checkpoint_root(config), *([place(c.mirror, c.storage_options)] if c.mirror else [])]


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def committed_steps(root: Path) -> list[int]:
    """Steps of the checkpoints that exist, ascending. Raises OSError."""
    found = [int(m[1]) for name in names(root) if (m := STEP_NAME.fullmatch(name))]
    return sorted(s for s in found if is_committed(step_folder(root, s)))


@_on_store
def is_committed(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


@_on_store
def withdraw(folder: Path) -> None:
    """Removes the manifest, if there is one: from now on the folder is no checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    if is_local(path):  # a store has no folders, only names
        path.mkdir(parents=True, exist_ok=True)


@_on_store
def write_durably(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Writes a new file; when this returns its content survives a power cut (its name only after `sync_folder`)."""
    with path.open("wb") as f:
        if not is_local(path):
            f.writelines(content)
            return
        sent = written = 0
        for block in content:
            f.write(block)
            written += len(block)
            if written - sent >= _BLOCK:
                f.flush()
                _send_to_disk(f.fileno(), sent, written - sent)
                sent = written
        f.flush()
        os.fsync(f.fileno())


def _send_to_disk(fd: int, start: int, length: int) -> None:
    """Has the kernel begin to write a range now, not at the fsync, and forget it then (measured: 1.7 times as fast).

    A checkpoint is not read soon; the page cache is better used for samples.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def copy_file(source: Path, target: Path) -> None:
    write_durably(target, blocks(source))


@_on_store
def publish(path: Path, data: bytes) -> None:
    """Writes a small file so that readers see all of it or nothing."""
    if not is_local(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, [data])
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes names in a folder durable: renames and new files survive a power cut only after this."""
    if not is_local(path):
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@_on_store
def remove_tree(path: Path) -> None:
    """Removes a folder and what is in it; one that is gone already is no error."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]


@_on_store
def move(path: Path, name: str) -> Path:
    """Renames a folder inside its parent and returns its new place."""
    target = path.parent / name
    if is_local(path):
        return path.rename(target)
    path.fs.mv(path.path, target.path, recursive=True)  # type: ignore[attr-defined]
    return target


@_on_store
def names(folder: Path) -> list[str]:
    """Names in a folder; none where it does not exist."""
    if not is_local(folder):
        folder.fs.invalidate_cache()  # type: ignore[attr-defined] - other ranks and runs write there too
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


@_on_store
def size(path: Path) -> int:
    """Bytes. Raises OSError where it is missing."""
    return path.stat().st_size


@_on_store
def read(path: Path) -> bytes:
    """All of a small file. Raises OSError."""
    return path.read_bytes()


def blocks(path: Path) -> Iterator[bytes | memoryview]:
    """The content, in large blocks; each is valid until the next is asked for."""
    if not is_local(path):
        with _store_errors(path), path.open("rb") as f:
            while block := f.read(_BLOCK):
                yield block
        return
    space = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as f:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := f.readinto(space):
            yield space[:count]


def read_range(path: Path, start: int, length: int) -> bytearray:
    """`length` bytes from `start` on. Raises OSError where there are fewer."""
    data = bytearray(length)
    read_range_into(path, start, memoryview(data))
    return data


@_on_store
def read_range_into(path: Path, start: int, space: memoryview) -> None:
    """Fills `space` with the bytes from `start` on. Raises OSError where there are fewer."""
    length, at = len(space), 0
    if is_local(path):
        with path.open("rb", buffering=0) as f:
            f.seek(start)
            while at < length and (count := f.readinto(space[at:])):
                at += count
    else:
        data = path.fs.cat_file(path.path, start=start, end=start + length)  # type: ignore[attr-defined]
        at = len(data)
        space[:at] = data
    if at != length:
        raise OSError(f"{path}: {at:,} of {length:,} bytes at {start:,}")
