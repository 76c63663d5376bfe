"""A folder of images: class folders, splits of class folders, or images alone."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from data_tools.errors import Unfinished, UserError
from data_tools.sources import places
from data_tools.sources.rows import SPLIT_ALIASES, Row, batches_of, has_image_suffix

_STAT_THREADS = 16  # listing a network file system is all waiting
_MANY_ENTRIES, _STAT_ENTRIES = 2048, 64  # a large folder; what one thread looks at before the next


class FolderSource:
    """`root/<class>/...`, `root/<split>/<class>/...`, or images directly in `root`, which have no labels.

    Raises UserError where images lie both beside and inside subfolders, or some splits have class folders and others
    none; Unfinished where a folder cannot be listed.
    """

    kind = "folder"
    names = True
    classes: list[str] | None = None
    sequential = forward_only = False
    stamp = None
    many_units = True

    def __init__(self, root: str, options: places.StorageOptions | None = None) -> None:
        self.root = root
        self._options = options
        self._list = _remote_lister(root, options) if places.is_remote(root) else _local_lister(root)
        self._depth = 0  # of the class folder
        self._flat = False

    def units(self) -> list[str]:
        """Class folders, in sorted order; the root itself where images lie there."""
        direct, folders = self._list("", Counter())
        if direct:
            inside = next((f for folder in folders if (f := self.first_image(folder))), None)
            if inside is not None:
                raise UserError(
                    f"{self.root} holds images ({os.fsdecode(direct[0].path)!r}) beside folders of images "
                    f"({inside!r}): are there labels or not? Move either away, or list the images in a CSV with "
                    "columns path,label"
                )
            self._flat = True
            return [""]
        self._depth = 1 if _are_splits(self, folders) else 0
        if not self._depth:
            return folders
        return [sub for split in folders if split in SPLIT_ALIASES for sub in self._list(split + "/", Counter())[1]]

    def batches(self, unit: str, ignored: Counter[str]) -> Iterator[pa.RecordBatch]:
        if self._flat:
            return batches_of(self._list("", ignored)[0])
        parts = unit.split("/")
        split = SPLIT_ALIASES[parts[0]] if self._depth else None
        label = parts[self._depth]
        _check_class_name(label)
        return batches_of(row._replace(label=label, split=split) for row in self._walk(unit, ignored))

    def _walk(self, top: str, ignored: Counter[str]) -> Iterator[Row]:
        """All images below `top`, links followed; a folder that contains itself through a link is entered once."""
        pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]
        while pending:
            folder, ancestors = pending.pop()
            identity = self._identity(folder)
            if identity is not None and identity in ancestors:
                ignored["links to a folder above"] += 1
                continue
            images, folders = self._list(folder + "/", ignored)
            yield from images
            line = ancestors if identity is None else (*ancestors, identity)
            pending += [(sub, line) for sub in reversed(folders)]

    def _identity(self, folder: str) -> tuple[int, int] | None:
        if places.is_remote(self.root):
            return None
        found = os.stat(os.path.join(places.local_path(self.root), folder))
        return found.st_dev, found.st_ino

    def first_image(self, top: str) -> str | None:
        """The path of some image below `top`, None where there is none."""
        row = next(self._walk(top, Counter()), None)
        return None if row is None else os.fsdecode(row.path)


def _are_splits(source: FolderSource, tops: list[str]) -> bool:
    """True for `train/<class>/...` alone or beside `val/<class>/...`: splits, not classes called train and val.

    Raises UserError where only some of them have class folders.
    """
    inside = {top: source._list(top + "/", Counter()) for top in tops if top in SPLIT_ALIASES}
    flat = [top for top, (images, _) in inside.items() if images]
    nested = [top for top, (_, folders) in inside.items() if any(map(source.first_image, folders))]
    holding = {*flat, *nested}
    if "train" not in holding and len(holding) != 1:
        return False
    if any(source.first_image(top) for top in tops if top not in SPLIT_ALIASES):
        return False
    if flat and nested:
        alone = places.join(source.root, "train" if "train" in nested else nested[0])
        raise UserError(
            f"{source.root} looks like splits, of which {flat[0]} holds images in no class folder: give {alone} alone, "
            "or with it a list of the others, a CSV with columns path,label,split"
        )
    return not flat


def _check_class_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"class name {name!r} is not valid UTF-8; rename its folder") from None


# --- listing one folder -------------------------------------------------------------------------------------


def _local_lister(root: str):
    """Lists one folder below root: (images, subfolders), both sorted, as paths relative to root."""
    root = places.local_path(root)
    pool = ThreadPoolExecutor(_STAT_THREADS)  # starts no thread before the first large folder

    def listed(prefix: str, ignored: Counter[str]) -> tuple[list[Row], list[str]]:
        try:
            entries = sorted(os.scandir(os.path.join(root, prefix)), key=lambda e: e.name)
        except OSError as e:
            raise _not_listed(os.path.join(root, prefix), e.strerror) from e
        many = len(entries) >= _MANY_ENTRIES
        chunks = [entries[at : at + _STAT_ENTRIES] for at in range(0, len(entries), _STAT_ENTRIES)]
        stats = pool.map(_stat_all, chunks) if many else map(_stat_all, chunks)
        infos = (seen for chunk in stats for seen in chunk)
        rows: list[Row] = []
        folders: list[str] = []
        for entry, seen in zip(entries, infos):
            path = prefix + entry.name
            if seen is not None and stat.S_ISDIR(seen.st_mode):
                _note_folder(path, entry.name, folders, ignored)
            elif _is_wanted(entry.name, ignored):
                ordinary = seen is not None and stat.S_ISREG(seen.st_mode)
                size, mtime = (seen.st_size, seen.st_mtime_ns) if seen is not None and ordinary else (0, 0)
                rows.append(Row(os.fsencode(path), size, mtime))
        return rows, folders

    return listed


def _remote_lister(root: str, options: places.StorageOptions | None):
    def listed(prefix: str, ignored: Counter[str]) -> tuple[list[Row], list[str]]:
        try:
            entries = places.list_folder(places.join(root, prefix) if prefix else root, options)
        except OSError as e:
            raise _not_listed(places.join(root, prefix), e) from e
        rows: list[Row] = []
        folders: list[str] = []
        for name, seen in entries:
            if seen.is_dir:
                _note_folder(prefix + name, name, folders, ignored)
            elif _is_wanted(name, ignored):
                rows.append(Row(os.fsencode(prefix + name), seen.size, 0))
        return rows, folders

    return listed


def _not_listed(folder: str, why: object) -> Unfinished:
    return Unfinished(f"cannot list {folder}: {why}; mend that and run the same command again: what is done stays")


def _note_folder(path: str, name: str, folders: list[str], ignored: Counter[str]) -> None:
    # .git, .ipynb_checkpoints (which holds stale copies), __MACOSX: never part of a corpus
    if name.startswith(".") or name == "__MACOSX":
        ignored["hidden folders"] += 1
    else:
        folders.append(path)


def _is_wanted(name: str, ignored: Counter[str]) -> bool:
    if name.startswith("._"):
        ignored["macOS ._ files"] += 1
    elif has_image_suffix(name):
        return True
    else:
        ignored["files without an image suffix"] += 1
    return False


def _stat_all(entries: list[os.DirEntry[str]]) -> list[os.stat_result | None]:
    return list(map(_stat, entries))


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:  # a dangling link, a link that loops, no permission
        return None
