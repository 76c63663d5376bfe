"""Where samples come from: a folder of images, or a CSV manifest. Listing only; no image is opened here.

A sample's `path` relative to the corpus' root is its identity: order, split and tar key are derived from it,
so that they stay the same when the corpus is mounted elsewhere or grows.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
SPLIT_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,32}")
_MAX_LABEL = 2**31 - 1
_STAT_THREADS = 16  # listing a network file system is all waiting


class Sample(NamedTuple):
    """One image as found. `path` is relative to the corpus' root (or absolute, from a CSV); sizes are bytes.

    `size` and `mtime_ns` are 0 where the file could not be examined: packing then says why. `label` is the
    class index, -1 without labels; `split` is None where the corpus does not say.
    """

    path: str
    size: int
    mtime_ns: int
    label: int = -1
    split: str | None = None


@dataclass(frozen=True)
class Corpus:
    """A listed corpus. `classes` are the names by class index, None where labels are numbers or missing;
    `ignored` counts what was passed over, by reason."""

    kind: str
    root: Path
    samples: list[Sample]
    classes: list[str] | None
    ignored: Counter[str] = field(default_factory=Counter)


def scan(source: Path) -> Corpus:
    """Lists a folder of images or a CSV/TSV manifest. Raises UserError for anything that is neither."""
    if source.is_dir():
        corpus = scan_folder(source)
    elif source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        corpus = scan_csv(source)
    elif source.is_file():
        raise UserError(f"{source}: not a corpus I can read; give a folder of images or a .csv/.tsv manifest")
    else:
        raise UserError(f"{source}: no such file or folder")
    for name in corpus.classes or ():
        if not _is_text(name):
            raise UserError(f"class name {name!r} is not valid UTF-8; rename its folder")
    return corpus


# --- folders ------------------------------------------------------------------------------------------------


def scan_folder(root: Path) -> Corpus:
    """Lists `root`: its subfolders are classes (sorted by name), or splits of classes (`train/cat/1.jpg`), or
    it holds images directly and there are no labels.

    Raises UserError where images lie both beside and inside subfolders, or where there are none.
    """
    ignored: Counter[str] = Counter()
    direct, folders = _list_folder(root, "", ignored)
    found = _walk_all(root, folders, ignored)
    if direct and found:
        raise UserError(
            f"{root} holds images ({direct[0].path!r}) beside folders of images ({found[0].path!r}): "
            "are there labels or not? Move either away, or list the images in a CSV with columns path,label"
        )
    if not direct and not found:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if direct:
        return Corpus("folder", root, sorted(direct), None, ignored)
    labelled = list(_label_by_folder(found, depth=1 if _are_splits(found) else 0))
    classes = sorted({name for _, _, name in labelled})
    number = {name: i for i, name in enumerate(classes)}
    samples = sorted(s._replace(label=number[name], split=split) for s, split, name in labelled)
    return Corpus("folder", root, samples, classes, ignored)


def _label_by_folder(found: list[Sample], depth: int) -> Iterator[tuple[Sample, str | None, str]]:
    """Yields (sample, split or None, class name): the class is the folder at `depth`, the split the one
    above."""
    for sample in found:
        parts = sample.path.split("/")
        yield sample, SPLIT_ALIASES[parts[0]] if depth else None, parts[depth]


def _are_splits(found: list[Sample]) -> bool:
    """True for `train/<class>/...` beside `val/<class>/...`: two splits, not two classes called train and
    val."""
    tops = {s.path.split("/", 1)[0] for s in found}
    return (
        "train" in tops and len(tops) > 1 and tops <= SPLIT_ALIASES.keys()
        and all(s.path.count("/") >= 2 for s in found)
    )  # fmt: skip


def _walk_all(root: Path, folders: list[str], ignored: Counter[str]) -> list[Sample]:
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        parts = list(pool.map(lambda folder: _walk(root, folder), folders))
    for _, skipped in parts:
        ignored.update(skipped)
    return [sample for samples, _ in parts for sample in samples]


def _walk(root: Path, top: str) -> tuple[list[Sample], Counter[str]]:
    """All images below `top`, links followed; a folder that contains itself through a link is entered
    once."""
    samples: list[Sample] = []
    ignored: Counter[str] = Counter()
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(top, ())]
    while pending:
        folder, ancestors = pending.pop()
        info = os.stat(root / folder)
        identity = (info.st_dev, info.st_ino)
        if identity in ancestors:
            ignored["links to a folder above"] += 1
            continue
        images, folders = _list_folder(root, folder + "/", ignored)
        samples += images
        pending += [(sub, (*ancestors, identity)) for sub in folders]
    return samples, ignored


def _list_folder(root: Path, prefix: str, ignored: Counter[str]) -> tuple[list[Sample], list[str]]:
    """(images, subfolders) directly in `root/prefix`, as paths relative to root."""
    samples: list[Sample] = []
    folders: list[str] = []
    try:
        entries = list(os.scandir(root / prefix))
    except OSError as e:
        raise UserError(f"cannot list {root / prefix}: {e.strerror}") from e
    for entry in entries:
        path = prefix + entry.name
        info = _stat(entry)
        if info is not None and stat.S_ISDIR(info.st_mode):
            # .git, .ipynb_checkpoints (which holds stale copies), __MACOSX: never part of a corpus
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                ignored["hidden folders"] += 1
            else:
                folders.append(path)
        elif entry.name.startswith("._"):
            ignored["macOS ._ files"] += 1
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            samples.append(_sample(path, info))
        else:
            ignored["files without an image suffix"] += 1
    return samples, sorted(folders)


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:  # a dangling link, a link that loops, no permission
        return None


def _sample(path: str, info: os.stat_result | None) -> Sample:
    if info is None or not stat.S_ISREG(info.st_mode):
        return Sample(path, 0, 0)
    return Sample(path, info.st_size, info.st_mtime_ns)


# --- CSV ----------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    line: int
    path: str
    label: str | None
    split: str | None


def scan_csv(file: Path) -> Corpus:
    """Lists a CSV (or TSV) with a header and the columns `path`, optionally `label` and `split`.

    Relative paths are relative to the CSV's folder. Labels that are all plain integers are class indices;
    otherwise they are class names, numbered in sorted order. Raises UserError, with the line, for a missing
    column, an empty or repeated path, an empty label or split, or where none of the files exists.
    """
    root = file.parent
    rows = list(_read_rows(file))
    if not rows:
        raise UserError(f"{file} lists no images")
    _refuse_duplicates(file, rows)
    number, classes = _number_labels(file, rows)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        infos = list(pool.map(lambda row: _stat_path(root / row.path), rows, chunksize=256))
    if all(info is None for info in infos):
        raise UserError(
            f"{file}: none of its {len(rows)} images exists (the first is {root / rows[0].path}); "
            "relative paths are relative to the CSV's folder"
        )
    samples = [
        _sample(row.path, info)._replace(label=number[row.label], split=row.split)
        for row, info in zip(rows, infos)
    ]
    return Corpus("csv", root, samples, classes)


def _read_rows(file: Path) -> Iterator[_Row]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    line = 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            columns = reader.fieldnames or []
            if "path" not in columns:
                found = ", ".join(columns) or "none"
                raise UserError(f"{file} needs a header with the columns path,label[,split]; it has: {found}")
            for raw in reader:
                line = reader.line_num
                yield _row(file, line, raw)
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{file}, near line {line}: {e}; it must be UTF-8 text in CSV form") from e


def _row(file: Path, line: int, raw: dict[str, str]) -> _Row:
    def cell(column: str) -> str | None:
        if column not in raw:
            return None
        text = raw[column]
        if not text:
            raise UserError(f"{file}, line {line}: empty {column}")
        return text

    path = cell("path")
    assert path is not None  # the header was checked
    if "\0" in path:
        raise UserError(f"{file}, line {line}: a path cannot hold a zero byte")
    split = cell("split")
    if split is not None:
        split = SPLIT_ALIASES.get(split, split)
        if not _SPLIT_NAME.fullmatch(split):
            raise UserError(f"{file}, line {line}: split {split!r}: use letters, digits and underscores")
    return _Row(line, posixpath.normpath(path), cell("label"), split)


def _refuse_duplicates(file: Path, rows: list[_Row]) -> None:
    first: dict[str, int] = {}
    for row in rows:
        if first.setdefault(row.path, row.line) != row.line:
            raise UserError(
                f"{file}, line {row.line}: {row.path!r} is already on line {first[row.path]}; "
                "list every image once"
            )


def _number_labels(file: Path, rows: list[_Row]) -> tuple[dict[str | None, int], list[str] | None]:
    """(class index by label text, class names or None where labels are indices already)."""
    names = {row.label for row in rows}
    if None in names:  # no label column
        return {None: -1}, None
    texts = sorted(name for name in names if name is not None)
    if all(re.fullmatch(r"0|-?[1-9][0-9]*", t) for t in texts):
        for row in rows:
            if not 0 <= int(row.label or 0) <= _MAX_LABEL:
                raise UserError(f"{file}, line {row.line}: label {row.label} is outside 0..{_MAX_LABEL}")
        return {t: int(t) for t in texts}, None
    return {t: i for i, t in enumerate(texts)}, texts


def _stat_path(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
