"""Where a data set's files lie: a local folder, a network file system, or an object store; read by ranges.

Three kinds of failure are kept apart, because they end differently: a store out of reach (`StoreUnreachable`: wait,
then save and end), a shard that is missing or not the one that was indexed (`DamagedShard`: end, or mask on request),
and a single bad sample (`pipeline.data.source.BadSample`: weight 0). Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_tools.errors import UserError
from data_tools.manifest import tars_url

# gcsfs' support for zonal buckets asks by gRPC, which crashes or hangs in forked processes such as a loader's workers.
# It is read when gcsfs is first imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
READ_SECONDS = 300.0  # how long a store may be out of reach (data.read_timeout)
_REQUEST_SECONDS = 60.0  # one request of an object store; then it counts as failed and is tried again
_LONGEST_LISTING = 10_000  # files; a store lists a thousand a request, a network file system is asked for each
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_PERMANENT_ERRNO = {errno.EINVAL, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}

NETWORK_FILE_SYSTEMS = (
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "gpfs", "lustre", "mmfs", "ncpfs",
    "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "quobyte", "smb3", "smbfs", "virtiofs", "wekafs",
)  # fmt: skip
_LOCAL_FUSE = ("fuse.overlayfs", "fuse.fuse-overlayfs", "fuse.bindfs", "fuse.mergerfs", "fuse.portal", "fuse.ntfs-3g")

Result = TypeVar("Result")


class StoreUnreachable(UserError):
    """The store did not answer for `data.read_timeout`: nothing is wrong with the samples, go on later."""

    exit_code = 75  # EX_TEMPFAIL: the run is saved and can be resumed


class DamagedShard(UserError):
    """A tar or index that is missing, cut short or not the one that the manifest names."""


class Folder(Protocol):
    """Files by their names, relative to `place`. Every call raises FileNotFoundError for a name that is not there."""

    place: str
    remote: bool  # reads have latency: whole chunks pay
    timeout: float  # seconds for which a read is tried again

    def read(self, name: str) -> bytes: ...

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Fewer bytes where the file ends earlier."""
        ...

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Bytes of those files that are there; empty where asking would take long, or is not possible."""
        ...


def open_folder(
    place: str | Path,
    options: dict[str, Any] | None = None,
    *,
    read: str = "auto",
    timeout: float = READ_SECONDS,
    max_open: int = 128,
) -> Folder:
    """The folder at a path or URL. `read` is data.read: auto, pread or chunk.

    Raises:
        UserError: a URL whose package is not installed, or read=pread for a URL.
    """
    if is_url(place):
        if read == "pread":
            raise UserError(f"data.read=pread is there for local files, not for {place}; write chunk, or auto")
        return ObjectStore(str(place), options or {}, timeout)
    if (tars := tars_url(place)) is not None:
        return LinkedFolder(Path(place), open_folder(tars, options, read=read, timeout=timeout))
    if read == "auto":
        read = "chunk" if is_network_mount(Path(place)) else "pread"
    return NetworkFolder(Path(place), timeout) if read == "chunk" else LocalFolder(Path(place), max_open)


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def is_network_mount(path: Path, mounts: str = "/proc/self/mountinfo") -> bool:
    """Does the kernel say that `path` lies on a network file system? False where it cannot be told."""
    kind = _mount_type(path, mounts)
    return kind in NETWORK_FILE_SYSTEMS or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def _mount_type(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`: of the deepest mount point above it, the last mounted one."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except OSError:
        return ""
    real, best, kind = os.path.realpath(path), -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")  # a blank is written \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), rest.split()[0]
    return kind


def patiently(action: Callable[[], Result], what: str, seconds: float) -> Result:
    """`action()`, tried again with growing, jittered pauses for `seconds` while its errors may pass.

    Missing names and senseless requests are raised at once.

    Raises:
        StoreUnreachable: it still fails after `seconds`.
    """
    begin, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return action()
        except (UserError, FileNotFoundError, IsADirectoryError, NotADirectoryError, TypeError):
            raise
        except Exception as e:  # client libraries raise their own kinds: aiohttp's and botocore's are no OSError
            if getattr(e, "errno", None) in _PERMANENT_ERRNO:
                raise
            if getattr(e, "status", None) == 416:  # aiohttp: the range lies behind the file's end
                raise OSError(errno.EINVAL, "the file ends before this range") from e
            waited = time.monotonic() - begin
            if waited + pause > seconds:
                text = " ".join((str(e) or type(e).__name__).split())
                raise StoreUnreachable(f"{what}: {text} (tried for {waited:.0f} s, data.read_timeout)") from e
            # Jitter: a thousand workers must not come back in the same instant
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _stat(folder: Path, names: list[str]) -> dict[str, int]:
    sizes = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            sizes[name] = os.stat(f"{folder}/{name}").st_size  # a Path would cost more than the question
    return sizes


class LocalFolder:
    """Positioned reads; descriptors may be shared with forked workers."""

    remote = False
    timeout = 0.0

    def __init__(self, folder: Path, max_open: int = 128):
        self.folder, self.place = folder, str(folder)
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        fd = self._open.get(name)
        if fd is None:
            fd = self._open[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > self._max_open:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(name)
        return os.pread(fd, length, start)

    def sizes(self, names: list[str]) -> dict[str, int]:
        return _stat(self.folder, names)


class LinkedFolder(LocalFolder):
    """Indexes in a local folder, whose tars lie elsewhere (`mixer data index --out`)."""

    def __init__(self, folder: Path, tars: Folder):
        super().__init__(folder)
        self._tars, self.remote = tars, tars.remote

    def read_range(self, name: str, start: int, length: int) -> bytes:
        return self._tars.read_range(name, start, length)

    def sizes(self, names: list[str]) -> dict[str, int]:
        return self._tars.sizes(names)


class NetworkFolder:
    """A mounted network file system: opened anew for every range, tried again while its server is away."""

    remote = True

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.place, self.timeout = folder, str(folder), timeout

    def read(self, name: str) -> bytes:
        return self._try(name, (self.folder / name).read_bytes)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        def read() -> bytes:
            with open(self.folder / name, "rb", buffering=0) as file:
                return os.pread(file.fileno(), length, start)

        return self._try(name, read)

    def sizes(self, names: list[str]) -> dict[str, int]:
        return self._try("", lambda: _stat(self.folder, names)) if len(names) <= _LONGEST_LISTING else {}

    def _try(self, name: str, action: Callable[[], Result]) -> Result:
        return patiently(action, f"cannot read {self.folder / name}", self.timeout)


class ObjectStore:
    """`s3://`, `gs://`, `http(s)://` and whatever else fsspec knows; fork-safe (each process has its own client)."""

    remote = True

    def __init__(self, url: str, options: dict[str, Any], timeout: float):
        self.place = url.rstrip("/")
        self._options, self.timeout = options, timeout
        self._pid, self._fs, self._root = -1, None, ""
        self._connect()

    def _connect(self) -> Any:
        if self._pid != os.getpid():
            from fsspec.core import url_to_fs

            try:
                self._fs, root = url_to_fs(self.place, **self._options)
            except ImportError as e:
                raise UserError(f"{self.place}: {e}; for s3:// install the extra `s3`, for gs:// `gs`") from e
            except (ValueError, TypeError) as e:
                raise UserError(f"{self.place}: {e}; see data.storage_options") from e
            self._root, self._pid = str(root).rstrip("/"), os.getpid()
        return self._fs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fs": None, "_pid": -1}

    def read(self, name: str) -> bytes:
        return self._try(name, "_cat_file", "cat_file")

    def read_range(self, name: str, start: int, length: int) -> bytes:
        data = self._try(name, "_cat_file", "cat_file", start=start, end=start + length)
        # A server that knows no ranges sends the whole file
        return data if len(data) <= length else data[start : start + length]

    def sizes(self, names: list[str]) -> dict[str, int]:
        if len(names) > _LONGEST_LISTING:
            return {}
        folders = {name.rpartition("/")[0] for name in names}
        found: dict[str, int] = {}
        for folder in folders:
            self._connect().invalidate_cache()
            for entry in self._try(folder, "_ls", "ls", detail=True):
                name = f"{folder}/{entry['name'].rpartition('/')[2]}".lstrip("/")
                if entry.get("size") is not None:  # a plain web server tells none
                    found[name] = int(entry["size"])
        return found

    def _try(self, name: str, coroutine: str, function: str, **arguments: int) -> Any:
        fs = self._connect()
        path = f"{self._root}/{name}".rstrip("/")

        def call() -> Any:
            if not fs.async_impl:
                return getattr(fs, function)(path, **arguments)
            from fsspec.asyn import sync

            return sync(fs.loop, getattr(fs, coroutine), path, timeout=_REQUEST_SECONDS, **arguments)

        return patiently(call, f"cannot read {self.place}/{name}", self.timeout)
