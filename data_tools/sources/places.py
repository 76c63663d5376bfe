"""Local paths and fsspec URLs behind one small face: stat, open, list, join.

Local paths take the short way through `os`; everything with a scheme (`s3://`, `gs://`, `http(s)://`, `memory://`)
goes through fsspec with the storage options of the command.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from data_tools import storage
from data_tools.errors import Unfinished, UserError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_READ_AHEAD = 8 << 20
# S3's codes, which s3fs leaves in the cause, and its messages: all requests are refused alike, not one image.
_CREDENTIALS = re.compile(
    "ExpiredToken|InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch|TokenRefreshRequired|"
    "token has expired|token is malformed|Access Key Id you provided does not exist|signature we calculated does not",
    re.IGNORECASE,
)
_WEB_SECONDS = 10.0  # how long a web server, one among many, may be out of reach

StorageOptions = dict[str, Any]
Result = TypeVar("Result")


class Info(NamedTuple):
    """`mtime_ns` is 0 where the store has none that can be relied on."""

    size: int
    mtime_ns: int
    is_dir: bool


def is_url(path: str) -> bool:
    return _SCHEME.match(path) is not None


def local_path(path: str) -> str:
    return path.removeprefix("file://")


def is_remote(path: str) -> bool:
    return is_url(path) and not path.startswith("file://")


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def join(root: str, path: str) -> str:
    """`path` below `root`, unless it is absolute or a URL itself."""
    if is_url(path):
        return path
    if is_url(root):
        return path if not root else root.rstrip("/") + "/" + path.lstrip("/")
    return os.path.join(root, path)


def parent(path: str) -> str:
    return path.rpartition("/")[0] if is_url(path) else (os.path.dirname(path) or ".")


def base(path: str) -> str:
    return posixpath.basename(path.rstrip("/")) or path


def filesystem(url: str, options: StorageOptions | None) -> Any:
    """The fsspec file system of a URL. Raises UserError where its driver is not installed or refuses the options."""
    return storage.filesystem(url, options)[0]


def patiently(action: Callable[[], Result], url: str) -> Result:
    """What a store answers. Raises what `storage.retrying` does: Unfinished where it stays out of reach, and also
    where the credentials are at fault."""
    try:
        return storage.retrying(action, f"cannot read {url}", _WEB_SECONDS if is_web(url) else None)
    except OSError as e:
        if not (_is_refusal(e) and _CREDENTIALS.search(f"{e} {e.__cause__}")):
            raise
        raise Unfinished(
            f"cannot read {url}: {e}\nRenew the credentials (see --storage-options) and run the same command again: "
            "what is done stays"
        ) from e


def _is_refusal(error: OSError) -> bool:
    """As s3fs says it; other kinds have a path in their message, which may hold any word."""
    return isinstance(error, PermissionError) or error.errno == errno.EINVAL


def read_file(url: str, options: StorageOptions | None) -> bytes:
    """All bytes of a remote file. Raises what `patiently` does."""
    fs = filesystem(url, options)
    try:
        return patiently(lambda: fs.cat_file(url), url)
    except OSError as e:
        _find_reason(fs, url, e)
        raise


def _find_reason(fs: Any, url: str, error: OSError) -> None:
    """Raises Unfinished where credentials are the reason of a refusal. s3fs asks for the size first, by a HEAD request,
    which is refused without a reason; so this asks for a byte."""
    if _is_refusal(error) and not is_web(url):
        with suppress(OSError):
            patiently(lambda: fs.cat_file(url, start=0, end=1), url)


def info(path: str, options: StorageOptions | None = None) -> Info | None:
    """What lies at `path`; None for nothing, or nothing that may be looked at."""
    if not is_remote(path):
        try:
            found = os.stat(local_path(path))
        except (OSError, ValueError):
            return None
        return Info(found.st_size, found.st_mtime_ns, os.path.isdir(local_path(path)))
    fs = filesystem(path, options)
    try:
        raw = patiently(lambda: fs.info(path), path)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as e:
        _find_reason(fs, path, e)
        if not isinstance(e, PermissionError):
            raise
        return None
    return Info(int(raw.get("size") or 0), 0, raw.get("type") == "directory")


def stamp(path: str, options: StorageOptions | None = None) -> str:
    """Size and state of one file, without reading it."""
    found = info(path, options)
    if found is None:
        return f"{path} missing"
    mark = str(found.mtime_ns)
    if is_remote(path):
        raw = patiently(lambda: filesystem(path, options).info(path), path)
        mark = str(raw.get("ETag") or raw.get("etag") or raw.get("LastModified") or raw.get("created") or "")
    return f"{path} {found.size} {mark}"


def open_binary(path: str, options: StorageOptions | None = None) -> BinaryIO:
    """Opens for reading with seek. Raises UserError where that cannot be."""
    try:
        if is_remote(path):
            return _open_remote(filesystem(path, options), path)
        return open(local_path(path), "rb")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e


def _open_remote(fs: Any, path: str) -> BinaryIO:
    """A file whose reading outlasts an outage of its store."""
    file = patiently(lambda: fs.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead"), path)
    cache = getattr(file, "cache", None)  # through which fsspec's remote files read
    if cache is not None:
        fetch = cache.fetcher
        cache.fetcher = lambda start, end: patiently(lambda: fetch(start, end), path)
    return file


def list_folder(path: str, options: StorageOptions | None = None) -> list[tuple[str, Info]]:
    """(name, info) of everything directly in a remote or local folder, by name."""
    if not is_remote(path):
        found = []
        for entry in os.scandir(local_path(path)):
            seen = info(os.path.join(local_path(path), entry.name))
            if seen is not None:
                found.append((entry.name, seen))
        return sorted(found)
    fs = filesystem(path, options)
    listed = cast("list[dict[str, Any]]", patiently(lambda: fs.ls(path, detail=True), path))
    fs.invalidate_cache(path)  # fsspec would keep every listing: all the names of a large corpus
    return sorted(
        (base(str(raw["name"])), Info(int(raw.get("size") or 0), 0, raw["type"] == "directory"))
        for raw in listed
        if str(raw["name"]).strip("/") != path.partition("://")[2].strip("/")
    )


def resolve(path: str | Path) -> str:
    """A path as the person gave it, without a trailing slash; URLs stay as they are."""
    text = str(path)
    return (
        text.rstrip("/") if is_url(text) and not text.endswith("://") else str(Path(text)) if not is_url(text) else text
    )
