"""Files that appear whole or not at all, a lock on a folder, and the way to object stores.

Every local file is written under a temporary name in its own folder, synced, then renamed: after a power cut
there is the old file, the new file, or a leftover that `remove_leftovers` deletes. Imports the standard library
only; fsspec inside the functions that need it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_tools.errors import Unfinished, UserError

# A leading dot and no known suffix: no glob for tars or indexes takes a leftover for a finished file.
_LEFTOVER = re.compile(r"^\.(.+)\.tmp-[0-9a-f]{8}$")
_URL = re.compile(r"^([a-z][a-z0-9+.-]*)(://|::)")

Result = TypeVar("Result")


@contextmanager
def atomic_file(path: Path, sync_name: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file for unbuffered writing; publishes it as `path` when the block ends without
    error.

    On any exception the temporary file is removed and `path` stays as it was. `sync_name` False leaves the new
    name to the next sync of the folder.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step."""
    with atomic_file(path) as file:
        write_all(file, data)


def write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    """Writes everything to an unbuffered file, whose `write` may take only a part (a nearly full disk)."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


_WRITEBACK_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2  # begin, do not wait
_sync_file_range: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class Writeback:
    """Lets the disk begin on what was just written, so that the fsync at the end finds little left to wait for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begun = 0

    def reached(self, offset: int) -> None:
        """The file is written as far as `offset` bytes. Only ever a hint: errors show at the fsync."""
        if offset - self._begun >= _WRITEBACK_BYTES and _sync_file_range is not None:
            _sync_file_range(self._file.fileno(), self._begun, offset - self._begun, _SYNC_FILE_RANGE_WRITE)
            self._begun = offset


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut, where the file system can do that."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> int:
    """Deletes what a killed run left half-written in `folder`; returns how many.

    Safe only where nobody else is writing: under the folder's exclusive lock, or for those final `names` alone
    that the caller is the only one to write.
    """
    found = [(p, _LEFTOVER.match(p.name)) for p in folder.iterdir()]
    leftovers = [p for p, match in found if match and (names is None or match[1] in names)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


@contextmanager
def lock_folder(folder: Path, path: Path, shared: bool = False) -> Iterator[None]:
    """Holds a lock on the file `path` while the block runs; the kernel drops it when the process dies.

    The lock is exclusive, or `shared` with others that ask for a shared one. Raises UserError, naming `folder`,
    where another process holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                raise UserError(
                    f"another run is writing into {folder} ({holder or 'unknown process'}); "
                    "wait for it to end, or give another output folder"
                ) from None
            if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            # A file system without locks (some Lustre mounts): go on; commits are atomic and deterministic,
            # so two runs at once waste work but damage nothing.
        if not shared:
            os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


# --- object stores ------------------------------------------------------------------------------------------

OPTIONS_VARIABLE = "MIXER_STORAGE_OPTIONS"
RETRY_SECONDS = 120.0  # how long a store may be out of reach before a run gives up
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
# Trying again does not help: the name, the permission or the request is wrong.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_PASSING_STATUS = {408, 425, 429}  # of HTTP's 4xx: too slow, too early, too many requests
_PERMANENT_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.EBADF}


def is_url(place: str | os.PathLike[str]) -> bool:
    """Is this `s3://...`, `gs://...`, `https://...` and the like, for fsspec, rather than a local path?"""
    return _URL.match(os.fspath(place)) is not None


def join(place: str, name: str) -> str:
    """`name` below the folder or URL `place`."""
    return f"{place.rstrip('/')}/{name}"


def parse_storage_options(texts: Collection[str]) -> dict[str, Any]:
    """fsspec's arguments from the command line: each text is a JSON object, `key=value` or `key.sub=value`.

    A value that is JSON is taken as such (`anon=true`), anything else as text. Without any text, the environment's
    MIXER_STORAGE_OPTIONS is one: secrets need not stand on a command line. Raises UserError otherwise.
    """
    options: dict[str, Any] = {}
    if not texts and (given := os.environ.get(OPTIONS_VARIABLE)):
        texts = [given]
    for text in texts:
        if text.lstrip().startswith("{"):
            try:
                options |= json.loads(text)
            except ValueError as e:
                raise UserError(f"--storage-options {text}: not JSON ({e})") from e
            continue
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--storage-options {text}: neither key=value nor a JSON object")
        *parents, last = key.split(".")
        target = options
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--storage-options {text}: {parent} has a value of its own already")
        try:
            target[last] = json.loads(value)
        except ValueError:
            target[last] = value
    return options


def filesystem(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path of `url` in it. Raises UserError where its package is missing."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url, **(options or {}))
    except ImportError as e:
        raise UserError(f"{url}: {e}; for s3:// install the extra `s3`, for gs:// `gs`") from e
    except (ValueError, TypeError) as e:
        raise UserError(f"{url}: {e}; see --storage-options") from e
    return fs, str(path)


def retrying(action: Callable[[], Result], what: str, seconds: float | None = None) -> Result:
    """`action()`, tried again with growing pauses for up to `seconds` while its errors may pass.

    Missing names, refused permissions, full disks and missing credentials (as UserError) are raised at once; after
    the last try Unfinished says `what` failed.
    """
    begin, pause = time.monotonic(), _FIRST_PAUSE
    limit = RETRY_SECONDS if seconds is None else seconds
    while True:
        try:
            return action()
        except (UserError, *_PERMANENT):
            raise
        except Exception as e:  # client libraries raise their own kinds: botocore's are no OSError
            if isinstance(e, (TypeError, ValueError)) or getattr(e, "errno", None) in _PERMANENT_ERRNO:
                raise
            status = getattr(e, "status", None)  # of aiohttp's kind
            if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS:
                raise PermissionError(f"HTTP status {status}") from e
            if "Credentials" in type(e).__name__:  # botocore's own kinds
                raise UserError(f"{what}: {e}; see --storage-options") from e
            if time.monotonic() - begin + pause > limit:
                tried = time.monotonic() - begin
                raise Unfinished(
                    f"{what}: {str(e) or type(e).__name__} (tried for {tried:.0f} s); what is committed stays: "
                    "run the same command to go on"
                ) from e
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
