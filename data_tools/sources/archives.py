"""Images inside tar and zip archives, read where they lie: nothing is unpacked, no member's name is ever a path here.

Plain archives of images, archives of class archives (ImageNet's `train.tar`), and WebDataset tars whose images have
`.cls`, `.json` or `.txt` neighbours (img2dataset's output). An uncompressed tar, at any depth, is addressed by byte
ranges; a compressed one (`.tar.gz`, `.bz2`, `.xz`) can only be read forward.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from data_tools.errors import UserError
from data_tools.manifest import MANIFEST_NAME, DatasetManifest
from data_tools.sources import places
from data_tools.sources.manifests import Columns, RowMaker, assign_roles, label_text
from data_tools.sources.members import ArchiveListing, Member, is_compressed, stem
from data_tools.sources.rows import SPLIT_ALIASES, Codec, Row, batches_of, has_image_suffix


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
        listing = ArchiveListing(where, self._options, ignored)
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
                        row = row._replace(label=label_text(folder, where), labels=None)
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
                label = None if label is None else label_text(label, self._where)
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
        if text := self._text(sidecars, "txt"):
            record.setdefault("txt", text)
        labels = split = group = None
        label = self._text(sidecars, "cls").strip() or None
        if "cls" in sidecars and label is None:
            self._ignored["empty .cls neighbours"] += 1
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

    def _text(self, sidecars: dict[str, Member], suffix: str) -> str:
        """What a neighbour says; nothing where there is none, or a zip member that cannot be unpacked."""
        if suffix not in sidecars:
            return ""
        try:
            return self._read(sidecars[suffix]).decode("utf-8", "replace")
        except ValueError:
            self._ignored[f"damaged .{suffix} neighbours"] += 1
            return ""

    def _json(self, member: Member) -> dict[str, Any]:
        try:
            record = json.loads(self._read(member))
        except (ValueError, RecursionError):
            self._ignored["damaged .json neighbours"] += 1
            return {}
        return record if isinstance(record, dict) else {"json": record}
