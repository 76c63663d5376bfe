"""What lies in a tar or zip: image and sidecar members, and where their bytes are in the outermost file.

Nothing is unpacked, and no member's name is ever used as a path. Inner archives are listed in place.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, cast

from data_tools.errors import UserError
from data_tools.sources import places
from data_tools.sources.rows import Codec, has_image_suffix
from data_tools.tar_reading import StrictInfo

TAR_SUFFIXES = (".tar",)
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ZIP_SUFFIXES = (".zip",)
_SIDECARS = ("cls", "json", "txt")
_MAX_DEPTH = 4  # archives inside archives
_MAX_SIDECAR = 1 << 20  # bytes


def is_archive(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES + COMPRESSED_SUFFIXES + ZIP_SUFFIXES)


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED_SUFFIXES)


def stem(name: str) -> str:
    """An archive's name without its suffix."""
    for suffix in COMPRESSED_SUFFIXES + TAR_SUFFIXES + ZIP_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def open_stream(path: str, raw: BinaryIO) -> BinaryIO:
    """What a compressed tar unpacks to."""
    name = path.lower()
    if name.endswith((".gz", ".tgz")):
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    return cast(BinaryIO, bz2.BZ2File(raw) if name.endswith(("bz2", "tbz2")) else lzma.LZMAFile(raw))


class Member(NamedTuple):
    """A file in an archive: its name within (with `/`), and where its bytes are in the outermost file."""

    name: str
    size: int
    offset: int
    stored: int
    codec: int


class ArchiveListing:
    """The image and sidecar members of one archive, inner archives included, in the order they lie.

    After `members`, `broken` says how the archive ended where it did not end well.
    """

    def __init__(self, path: str, options: places.StorageOptions | None, ignored: Counter[str]) -> None:
        self.broken = ""
        self._path, self._ignored = path, ignored
        self._raw = places.open_binary(path, options)
        self._sidecars: dict[int, bytes] = {}  # of a compressed tar, by offset: they pass by only once

    def close(self) -> None:
        self._raw.close()

    def members(self) -> Iterator[Member]:
        if is_compressed(self._path):
            yield from self._compressed()
        elif self._path.lower().endswith(ZIP_SUFFIXES):
            yield from self._zip(self._raw, "", 0, 0)
        else:
            yield from self._tar(self._raw, "", 0, 0)

    def read(self, member: Member) -> bytes:
        """The bytes of a sidecar."""
        if member.codec == Codec.STREAM:
            return self._sidecars[member.offset]
        self._raw.seek(member.offset)
        if member.codec == Codec.ZIP:
            return inflate_member(self._raw.read, member.size, member.stored)
        return self._raw.read(member.size)

    def _wanted(self, name: str, size: int) -> bool:
        base = name.rpartition("/")[2]
        if base.startswith("._") or name.startswith("__MACOSX/"):
            self._ignored["macOS ._ files"] += 1
        elif has_image_suffix(name) or (base.rpartition(".")[2].lower() in _SIDECARS and size <= _MAX_SIDECAR):
            return True
        else:
            self._ignored["files without an image suffix"] += 1
        return False

    def _tar(self, file: BinaryIO, prefix: str, base: int, depth: int) -> Iterator[Member]:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictInfo) as archive:
                for info in archive:
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all it saw
                    if not info.isreg() or info.issparse():
                        if not info.isdir():
                            self._ignored["links and devices in archives"] += 1
                        continue
                    yield from self._tar_member(file, prefix, base, depth, info)
        except (tarfile.TarError, EOFError, ValueError, struct.error) as e:
            self._fail(prefix, e, base)

    def _tar_member(
        self, file: BinaryIO, prefix: str, base: int, depth: int, info: tarfile.TarInfo
    ) -> Iterator[Member]:
        name, at = info.name, base + info.offset_data
        if is_archive(name):
            if is_compressed(name) or depth + 1 >= _MAX_DEPTH:
                self._ignored["compressed archives inside archives"] += 1
                return
            window = cast(BinaryIO, _Window(self._raw, at, info.size))
            inner = self._zip if name.lower().endswith(ZIP_SUFFIXES) else self._tar
            yield from inner(window, f"{prefix}{stem(name)}/", at, depth + 1)
        elif self._wanted(name, info.size):
            yield Member(prefix + name, info.size, at, 0, Codec.RANGE)

    def _zip(self, file: BinaryIO, prefix: str, base: int, depth: int) -> Iterator[Member]:
        try:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if info.is_dir():
                        continue
                    if info.flag_bits & 1:
                        self._ignored["encrypted members"] += 1
                        continue
                    yield from self._zip_member(prefix, base, depth, info)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as e:
            self._fail(prefix, e, base)

    def _zip_member(self, prefix: str, base: int, depth: int, info: zipfile.ZipInfo) -> Iterator[Member]:
        name, at = info.filename, base + info.header_offset
        if is_archive(name):
            if info.compress_type != zipfile.ZIP_STORED or is_compressed(name) or depth + 1 >= _MAX_DEPTH:
                self._ignored["compressed archives inside archives"] += 1
                return
            self._raw.seek(at)
            at += local_header_bytes(self._raw.read(30))
            window = cast(BinaryIO, _Window(self._raw, at, info.file_size))
            inner = self._zip if name.lower().endswith(ZIP_SUFFIXES) else self._tar
            yield from inner(window, f"{prefix}{stem(name)}/", at, depth + 1)
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self._ignored["members in an unusual compression"] += 1
        elif self._wanted(name, info.file_size):
            yield Member(prefix + name, info.file_size, at, info.compress_size, Codec.ZIP)

    def _compressed(self) -> Iterator[Member]:
        try:
            with tarfile.open(fileobj=open_stream(self._path, self._raw), mode="r|", tarinfo=StrictInfo) as archive:
                for info in archive:
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not info.isreg() or info.issparse():
                        if not info.isdir():
                            self._ignored["links and devices in archives"] += 1
                        continue
                    if is_archive(info.name):
                        self._ignored["archives inside compressed archives"] += 1
                    elif self._wanted(info.name, info.size):
                        if not has_image_suffix(info.name):
                            file = archive.extractfile(info)
                            self._sidecars[info.offset_data] = file.read() if file is not None else b""
                        yield Member(info.name, info.size, info.offset_data, 0, Codec.STREAM)
        except (tarfile.TarError, EOFError, ValueError, OSError, zlib.error, lzma.LZMAError) as e:
            self._fail("", e, 0)

    def _fail(self, prefix: str, error: Exception, base: int) -> None:
        inner = f" (inside it, at {prefix.rstrip('/')!r})" if prefix else ""
        text = f"archive cannot be read to its end{inner}: {error or type(error).__name__}"
        if not base and isinstance(error, tarfile.ReadError) and "file could not be opened" in str(error):
            raise UserError(f"{self._path} is not a tar archive: {error}") from error
        self.broken = self.broken or text


class _Window:
    """A part of a seekable file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0
        self.name = ""

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


def local_header_bytes(header: bytes) -> int:
    """How long a zip member's local header is. Raises ValueError where there is none."""
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ValueError("no zip member here")
    names, extra = struct.unpack("<HH", header[26:30])
    return 30 + names + extra


def inflate_member(read: Callable[[int], bytes], size: int, stored: int) -> bytes:
    """A zip member's bytes, `read` standing at its local header; never more than `size`. Raises ValueError."""
    header = read(30)
    read(local_header_bytes(header) - 30)
    (method,) = struct.unpack("<H", header[8:10])
    data = read(stored)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as e:
            raise ValueError(f"zip member: {e}") from e
    if len(data) != size:
        raise ValueError("zip member of another size than its directory says")
    return data
