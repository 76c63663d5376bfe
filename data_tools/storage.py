"""Files that appear whole or not at all, and a lock on a folder.

Every file is written under a temporary name in its own folder, synced, then renamed: after a power cut there
is the old file, the new file, or a leftover that `remove_leftovers` deletes. Imports the standard library
only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_tools.errors import UserError

# A leading dot and no known suffix: no glob for tars or indexes takes a leftover for a finished file.
_LEFTOVER = re.compile(r"^\..+\.tmp-[0-9a-f]{8}$")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for unbuffered writing; publishes it as `path` when the block ends without
    error.

    On any exception the temporary file is removed and `path` stays as it was.
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
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step."""
    with atomic_file(path) as file:
        write_all(file, data)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Writes everything to an unbuffered file, whose `write` may take only a part (a nearly full disk)."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


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


def remove_leftovers(folder: Path) -> int:
    """Deletes what a killed run left half-written in `folder`; only safe under its lock. Returns how many."""
    leftovers = [p for p in folder.iterdir() if _LEFTOVER.match(p.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


@contextmanager
def lock_folder(folder: Path, path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path` while the block runs; the kernel drops it when the process
    dies.

    Raises UserError, naming `folder`, where another process holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
