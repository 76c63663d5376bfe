"""Images inside tar and zip archives, read where they lie: nothing is unpacked, no member's name is ever a path here.

Plain archives of images, archives of class archives (ImageNet's `train.tar`), and WebDataset tars whose images have
`.cls`, `.json` or `.txt` neighbours (img2dataset's output). An uncompressed tar, at any depth, is addressed by byte
ranges; a compressed one (`.tar.gz`, `.bz2`, `.xz`) can only be read forward.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from data_tools.errors import UserError
from data_tools.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.sources import places
from data_tools.sources.manifests import Columns, RowMaker, assign_roles
from data_tools.sources.rows import SPLIT_ALIASES, Codec, Row, batches_of, has_image_suffix

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


class ArchiveSource:
    """One archive, or a folder of them. Raises UserError where one cannot be opened at all.

    Labels: the folder (or the archive) an image lies in where that is asked for; a `.cls` or `.json`
    neighbour; else the folder inside the archive, or the inner archive's name; else none.
    Splits: what `dataset.json` says of a finished set's shards, or names such as `val-000012.tar`.
    """

    sequential = True
    many_units = True

    def __init__(
        self, root: str, files: list[str], columns: Columns, options: places.StorageOptions | None = None,
        folder: bool = False,
    ) -> None:  # fmt: skip
        self.kind = "archive"
        self.root, self._files, self._columns, self._options = root, files, columns, options
        self.forward_only = any(map(is_compressed, files))
        self.stamp = "\n".join(places.stamp(places.join(root, f), options) for f in files)
        self.names = False
        self.classes = None
        self._folder = folder
        self._split_of = {name: _split_by_name(name) for name in files}
        if (manifest := _finished_set(root, options)) is not None:
            owners = {shard.name: split for split, shards in manifest.splits.items() for shard in shards}
            if owners.keys() >= set(files):
                self.classes, self._split_of = manifest.classes, owners

    def units(self) -> list[str]:
        return self._files

    def batches(self, unit: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        where = places.join(self.root, unit)
        seen = places.info(where, self._options)
        listing = _Listing(where, self._options, ignored)
        groups = list(_grouped(listing.members()))
        images = [m.name for group in groups for m in group if has_image_suffix(m.name)]
        folder_of = _labeller(images)
        prefix = stem(unit) + "/" if self._folder else ""
        split = self._split_of[unit]
        fill = _Filler(self, where, listing.read, ignored, folder_of)
        mtime = seen.mtime_ns if seen is not None else 0

        def rows() -> Iterator[Row]:
            for group in groups:
                for row in fill(group):
                    if self._columns.label_from_folder:
                        folder = places.base(places.parent(prefix + os.fsdecode(row.path)))
                        row = row._replace(label=folder, labels=None)
                    yield row._replace(
                        path=os.fsencode(prefix) + row.path, mtime_ns=mtime, container=os.fsencode(unit),
                        split=row.split or split,
                    )  # fmt: skip
            if listing.broken:
                yield Row(
                    os.fsencode(prefix + "(end of archive)"), 0, mtime, extra=json.dumps(listing.broken),
                    container=os.fsencode(unit), codec=Codec.BROKEN,
                )  # fmt: skip

        yield from batches_of(rows())
        listing.close()

    @property
    def columns(self) -> Columns:
        return self._columns


_SPLIT_IN_NAME = re.compile(r"(?:^|[-_/])(train|val|valid|validation|test)[-_][0-9][^/]*$")


def _split_by_name(name: str) -> str | None:
    """The split of `imagenet-validation-00012.tar` and the like."""
    match = _SPLIT_IN_NAME.search(name)
    return SPLIT_ALIASES[match[1]] if match is not None else None


def _finished_set(root: str, options: places.StorageOptions | None) -> DatasetManifest | None:
    path = places.join(root, MANIFEST_NAME)
    if places.info(path, options) is None:
        return None
    try:
        with places.open_binary(path, options) as file:
            return DatasetManifest.from_json(file.read().decode(), path)
    except (UserError, UnicodeDecodeError):
        return None


# --- what lies in an archive --------------------------------------------------------------------------------


class _Listing:
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
            with tarfile.open(fileobj=file, mode="r:") as archive:
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
        except (zipfile.BadZipFile, EOFError, ValueError, struct.error) as e:
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
            with tarfile.open(fileobj=open_stream(self._path, self._raw), mode="r|") as archive:
                for info in archive:
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not info.isreg() or info.issparse():
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


# --- labels and neighbours ----------------------------------------------------------------------------------


def _wds_key(name: str) -> str:
    """WebDataset's key: up to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _grouped(members: Iterator[Member]) -> Iterator[list[Member]]:
    """Neighbours with the same WebDataset key."""
    group: list[Member] = []
    for member in members:
        if group and _wds_key(member.name) != _wds_key(group[0].name):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _labeller(names: list[str]) -> Callable[[str], tuple[str | None, str | None]]:
    """name -> (class folder or None, split or None), as a folder of the same layout would be understood.

    A single wrapping folder (`photos-2020/cat/1.jpg`) is looked through.
    """
    paths = [n.removeprefix("./").split("/")[:-1] for n in names]
    skip = 0
    while paths and all(len(p) > skip + 1 for p in paths) and len({p[skip] for p in paths}) == 1:
        skip += 1
    tops = {p[skip] for p in paths if len(p) > skip}
    splits = (
        "train" in tops and len(tops) > 1 and tops <= SPLIT_ALIASES.keys() and all(len(p) > skip + 1 for p in paths)
    )
    flat = any(len(p) <= skip for p in paths)  # images beside folders: the folders are no classes

    def of(name: str) -> tuple[str | None, str | None]:
        if flat:
            return None, None
        parts = name.removeprefix("./").split("/")[skip:]
        return (parts[1], SPLIT_ALIASES[parts[0]]) if splits else (parts[0], None)

    return of


class _Filler:
    """Rows of one group of neighbours: the images, with what their sidecars say."""

    def __init__(
        self, source: ArchiveSource, where: str, read: Callable[[Member], bytes], ignored: Counter[str],
        folder_of: Callable[[str], tuple[str | None, str | None]],
    ) -> None:  # fmt: skip
        self._source, self._where, self._read, self._ignored = source, where, read, ignored
        self._folder_of = folder_of

    def __call__(self, group: list[Member]) -> Iterator[Row]:
        images = [m for m in group if has_image_suffix(m.name)]
        sidecars = {m.name.rpartition(".")[2].lower(): m for m in group if not has_image_suffix(m.name)}
        if not images:
            self._ignored["files without an image suffix"] += len(group)
            return
        label, labels, split, extra, chosen = self._meaning(sidecars)
        for image in images:
            if not sidecars:
                label, split = self._folder_of(image.name)
            yield Row(
                os.fsencode(image.name), image.size, 0, label, labels, split, chosen, extra, b"", image.offset,
                image.stored, image.codec,
            )  # fmt: skip

    def _meaning(
        self, sidecars: dict[str, Member]
    ) -> tuple[str | None, list[str] | None, str | None, str | None, str | None]:
        """(label, labels, split, extra, group) from the neighbours."""
        record: dict[str, Any] = {}
        if "json" in sidecars:
            record = self._json(sidecars["json"])
        if "txt" in sidecars:
            record.setdefault("txt", self._read(sidecars["txt"]).decode("utf-8", "replace"))
        label = labels = split = group = None
        if "cls" in sidecars:
            label = self._read(sidecars["cls"]).decode("utf-8", "replace").strip()
        if record:
            where = f"{self._where}, {sidecars['json' if 'json' in sidecars else 'txt'].name}"
            columns = self._source.columns
            present = columns.label is None or columns.label in record
            wanted = Columns(path="_path", label=columns.label if present else None, group=columns.group)
            roles = assign_roles([*record, "_path"], wanted, where)
            if label is not None or (roles.label is not None and record.get(roles.label) in (None, "")):
                roles = type(roles)(roles.path, None, roles.split, None, roles.group)
            roles = type(roles)(
                roles.path, roles.label, roles.split if record.get("split") else None, None, roles.group
            )
            row = RowMaker(roles, wanted, lambda _: where, self._ignored)(0, record | {"_path": "x"})
            assert row is not None
            label, labels, split, group = label or row.label, row.labels, row.split, row.group
            return label, labels, split, row.extra, group
        return label, labels, split, None, group

    def _json(self, member: Member) -> dict[str, Any]:
        try:
            record = json.loads(self._read(member))
        except ValueError:
            self._ignored["damaged .json neighbours"] += 1
            return {}
        return record if isinstance(record, dict) else {"json": record}
