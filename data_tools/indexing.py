"""`mixer data index`: any WebDataset tars, whoever made them, become a data set that training reads by position.

The tars stay as they are. The indexes and `dataset.json` are written beside them or, for folders that cannot be
written to, into another folder that gets links to the tars (of an object store: a file with its URL).
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from data_tools.checksum import crc32
from data_tools.errors import UserError
from data_tools.finalize import QUARANTINE_NAME, TooManyBad, publish_manifest
from data_tools.images import BadImage, check_image
from data_tools.index import IndexRow, index_bytes, key_hash
from data_tools.manifest import MANIFEST_NAME, TARS_NAME, DatasetManifest, ShardInfo, index_name, tars_url
from data_tools.parallel import map_processes
from data_tools.storage import is_url, join, write_atomic
from data_tools.stores import LinkedStore, LocalStore, Store, load_manifest, open_store
from data_tools.tar_samples import BadLabel, Part, read_label, walk_tar

NOTES_FOLDER = "index"  # what each tar gave, so that a second run looks only at new or changed ones
_SPLIT = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|test)(?![a-z])")
_SPLIT_NAMES = {"valid": "val", "validation": "val"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class IndexOptions:
    """How to index.

    - place: folder or URL with tars; out: where to write, None for `place` itself.
    - split: of all tars; None: by their names (train, val, test; else train).
    - label: `cls`, `json:FIELD` or `none`; classes: names by class index, None where labels are numbers alone.
    - decode: decode every image, else read headers only; max_bad: bad images to accept, a count or a fraction.
    """

    place: str
    out: Path | None = None
    split: str | None = None
    label: str = "cls"
    classes: tuple[str, ...] | None = None
    decode: bool = False
    max_bad: int | float = 0
    workers: int = 0


@dataclass(frozen=True)
class IndexedTar:
    """What one tar gave. `bad`: (key, reason); `passed_over`: samples without an image."""

    info: ShardInfo
    bad: list[tuple[str, str]]
    passed_over: int
    stamp: str


def index_dataset(
    options: IndexOptions,
    report: Callable[[IndexedTar], None] | None = None,
    storage_options: dict[str, Any] | None = None,
) -> DatasetManifest:
    """Writes the missing indexes and `dataset.json`, last; returns what it says.

    Tars that did not change since an earlier call are not read again. Raises UserError where there are no tars, a
    tar cannot be read, nothing can be written, or more than `max_bad` images are bad.
    """
    if options.label not in ("cls", "none") and not re.fullmatch(r"json:.+", options.label):
        raise UserError(f"--label {options.label}: cls, json:FIELD or none")
    if not is_url(options.place) and (elsewhere := tars_url(options.place)) is not None:
        raise UserError(f"{options.place} is the index of {elsewhere}: give that, with --out {options.place}")
    source = open_store(options.place, storage_options)
    there = source.list()
    names = sorted(n for n in there if n.endswith(".tar") and not n.startswith("."))
    if not names:
        packed = [n for n in there if re.search(r"\.(tgz|tar\.[a-z0-9]+)$", n)]
        hint = f" ({packed[0]}: unpack compressed tars first, they cannot be read at a position)" if packed else ""
        raise UserError(f"{options.place}: no .tar files{hint}")
    out = _output(source, options, names)
    earlier = _manifest_of(out) or _manifest_of(source)
    classes = list(options.classes) if options.classes is not None else earlier.classes if earlier else None
    work = partial(_index_one, options, classes, storage_options or {}, out.place)
    found: list[IndexedTar] = []
    try:
        for tar in map_processes(work, [(n, there[n]) for n in names], options.workers):
            found.append(tar)
            if report is not None:
                report(tar)
    except PermissionError as e:
        raise UserError(f"{out.place} cannot be written to ({e.strerror}); give another folder with --out") from e
    return _publish(out, options, found, classes, earlier)


def _output(source: Store, options: IndexOptions, names: list[str]) -> Store:
    if options.out is None:
        return source
    options.out.mkdir(parents=True, exist_ok=True)
    if is_url(options.place):
        url = options.place.rstrip("/")
        there = tars_url(options.out)
        if there is not None and there.rstrip("/") != url:
            raise UserError(f"{options.out} has the index of {there}; give an empty folder with --out")
        write_atomic(options.out / TARS_NAME, f"{url}\n".encode())
        return LinkedStore(options.out, source)
    for name in names:
        link, target = options.out / name, (Path(options.place) / name).resolve()
        if link.is_symlink() and link.resolve() == target:
            continue
        if link.exists() or link.is_symlink():
            raise UserError(f"{link} exists already; give an empty folder with --out")
        link.symlink_to(target)
    return LocalStore(options.out)


def _manifest_of(store: Store) -> DatasetManifest | None:
    return load_manifest(store) if MANIFEST_NAME in store.list() else None


def _publish(
    out: Store,
    options: IndexOptions,
    found: list[IndexedTar],
    classes: list[str] | None,
    earlier: DatasetManifest | None,
) -> DatasetManifest:
    bad = [{"path": k, "reason": why, "shard": t.info.name} for t in found for k, why in t.bad]
    good = sum(t.info.samples for t in found)
    if bad:
        out.write(QUARANTINE_NAME, "".join(json.dumps(b) + "\n" for b in bad).encode())
    elif QUARANTINE_NAME in out.list():
        out.delete([QUARANTINE_NAME])
    limit = options.max_bad * (good + len(bad)) if isinstance(options.max_bad, float) else options.max_bad
    if len(bad) > limit:
        raise TooManyBad(
            f"{len(bad):,} of {good + len(bad):,} images are bad (first: {bad[0]['path']!r} in {bad[0]['shard']}: "
            f"{bad[0]['reason']}).\nAll are listed in {join(out.place, QUARANTINE_NAME)}. To leave them out, run the "
            f"same command with --max-bad {len(bad)}"
        )
    known = {s.name: split for split, shards in (earlier.splits if earlier else {}).items() for s in shards}
    splits: dict[str, list[ShardInfo]] = {}
    for tar in found:
        if tar.info.samples:
            splits.setdefault(options.split or known.get(tar.info.name) or _split_of(tar.info.name), []).append(
                tar.info
            )
    if not splits:
        raise UserError(f"{options.place}: no sample with an image in {len(found)} tars")
    ordered = {s: splits[s] for s in sorted(splits, key=lambda s: (s != "train", s))}
    source = {
        "kind": "indexed",
        "label": options.label,
        "samples": good + len(bad),
        "quarantined": len(bad),
        "ignored": dict(Counter({"samples without an image": n}) if (n := sum(t.passed_over for t in found)) else {}),
    }
    return publish_manifest(out, ordered, classes, source)


def _split_of(name: str) -> str:
    match = _SPLIT.search(name.lower())
    return _SPLIT_NAMES.get(match[1], match[1]) if match else "train"


# --- one tar ------------------------------------------------------------------------------------------------


def _index_one(
    options: IndexOptions, classes: list[str] | None, storage_options: dict[str, Any], out_place: str,
    tar_and_size: tuple[str, int],
) -> IndexedTar:  # fmt: skip
    name, size = tar_and_size
    source, out = open_store(options.place, storage_options), open_store(out_place, storage_options)
    stamp = _stamp(options, classes, name, size)
    note = f"{NOTES_FOLDER}/{name}.json"
    if (earlier := _read_note(out, note, stamp)) is not None:
        return earlier
    with source.local(name) as path:
        tar, index = _read_tar(path, name, options, classes, stamp)
    out.write(index_name(name), index)
    out.write(note, (json.dumps(asdict(tar)) + "\n").encode())
    return tar


def _stamp(options: IndexOptions, classes: list[str] | None, name: str, size: int) -> str:
    """What decides the index of a tar, and whether the tar is the same as before."""
    changed = 0 if is_url(options.place) else os.stat(Path(options.place) / name).st_mtime_ns
    text = json.dumps([1, size, changed, options.label, classes, options.decode])
    return xxhash.xxh3_128_hexdigest(text.encode())


def _read_note(out: Store, note: str, stamp: str) -> IndexedTar | None:
    try:
        raw = json.loads(out.read(note))
        tar = IndexedTar(ShardInfo(**raw["info"]), [(k, w) for k, w in raw["bad"]], raw["passed_over"], raw["stamp"])
        if tar.stamp != stamp or xxhash.xxh3_128_hexdigest(out.read(tar.info.index_name)) != tar.info.index_hash:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return tar


def _read_tar(
    path: Path, name: str, options: IndexOptions, classes: list[str] | None, stamp: str
) -> tuple[IndexedTar, bytes]:
    numbers = {c: i for i, c in enumerate(classes)} if classes is not None else None
    rows: list[IndexRow] = []
    bad: list[tuple[str, str]] = []
    passed_over = 0
    with open(path, "rb", buffering=0) as raw:

        def read(part: Part) -> bytes:
            return os.pread(raw.fileno(), part.size, part.offset)

        for sample in walk_tar(path):
            if sample.image is None:
                passed_over += 1
                continue
            part = sample.parts[sample.image]
            data = read(part)
            try:
                label = read_label(sample, read, options.label, numbers)
                info = check_image(data, max_pixels=2**62, decode=options.decode)
            except (BadImage, BadLabel) as e:
                bad.append((sample.key, str(e)))
                continue
            rows.append((key_hash(sample.key), part.offset, part.size, crc32(data), label, info.width, info.height))
        digest = xxhash.xxh3_128()
        raw.seek(0)
        while chunk := raw.read(_CHUNK):
            digest.update(chunk)
        size = raw.tell()
    index = index_bytes(rows)
    shard = ShardInfo(name, len(rows), size, digest.hexdigest(), xxhash.xxh3_128_hexdigest(index))
    return IndexedTar(shard, bad, passed_over, stamp), index
