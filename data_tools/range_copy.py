"""Copying samples from tar to tar by byte ranges; headers are written anew, image bytes never looked into."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash

from data_tools import ustar
from data_tools.checksum import crc32
from data_tools.errors import UserError
from data_tools.index import IndexRow, index_bytes, key_hash
from data_tools.keys import MAX_KEY, member_key
from data_tools.manifest import ShardInfo, index_name
from data_tools.output import Output
from data_tools.pack import PackedShard, marker_path
from data_tools.parallel import map_processes
from data_tools.stats import read_index
from data_tools.storage import atomic_file, join, write_atomic
from data_tools.stores import Store, open_store
from data_tools.tar_samples import walk_tar
from data_tools.tar_writer import HashedTar

_OPEN_SHARDS = 64  # source indexes kept in memory
_READ_BYTES = 8 << 20  # neighbouring samples are read together up to this
_PLAIN_KEY = re.compile(rf"[A-Za-z0-9_-](?:[A-Za-z0-9_/-]{{0,{MAX_KEY - 2}}}[A-Za-z0-9_-])?")
_SUFFIX = re.compile(r"[a-z0-9_.]{1,9}")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A source shard: in the set at `place`, which is the `owner`-th source. `numbers`: old class index -> new one;
    None keeps them."""

    place: str
    info: ShardInfo
    owner: int
    numbers: dict[int, int] | None = None


@dataclass(frozen=True)
class CopyTask:
    """One shard to write. `rows`: key, shard (number in `pieces`), row, start, end, label, split; `twin`: 0,
    or for a key that came before, and gets a new name, the how-manieth time its own set repeats it."""

    name: str
    split: str
    digest: str
    output: Output
    pieces: dict[int, Piece]
    rows: np.ndarray
    twin: np.ndarray


def foreign_extents(store: Store, shards: list[ShardInfo], workers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Where the members of each indexed sample begin and end, from the headers: for tars that others wrote."""
    walk = partial(_walk_extents, store)
    return dict(zip([s.name for s in shards], map_processes(walk, shards, workers)))


def _walk_extents(store: Store, shard: ShardInfo) -> tuple[np.ndarray, np.ndarray]:
    rows = read_index(store, shard)
    with store.local(shard.name) as path:
        found = {s.parts[s.image].offset: (s.start, s.end) for s in walk_tar(path) if s.image is not None}
    try:
        pairs = [found[int(offset)] for offset in rows["offset"]]
    except KeyError as e:
        raise UserError(f"{join(store.place, shard.name)}: the index points at no image; run `mixer data index`") from e
    table = np.array(pairs, np.uint64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def copy_shard(task: CopyTask) -> PackedShard:
    """Writes, commits and publishes one shard. Raises UserError where a source is not what its index says."""
    folder = task.output.folder
    rows: list[IndexRow] = []
    with atomic_file(folder / task.name, sync_name=False) as file:
        tar = HashedTar(file)
        for number, data in enumerate(_read(task)):
            rows.append(_append(tar, task, number, *data))
        tar.close()
    index = index_bytes(rows)
    write_atomic(folder / index_name(task.name), index)
    packed = PackedShard(
        task.digest, task.name, task.split, len(rows), tar.offset, tar.hexdigest(), xxhash.xxh3_128_hexdigest(index), []
    )
    write_atomic(marker_path(folder, task.name), (json.dumps(asdict(packed)) + "\n").encode())
    task.output.publish(packed)
    return packed


def _read(task: CopyTask) -> Iterator[tuple[Piece, Any, bytes]]:
    """(source, its index row, the bytes of all members) for every row of the task; neighbours in one read."""
    stores: dict[str, Store] = {}
    indexes: OrderedDict[int, np.ndarray] = OrderedDict()
    rows, at = task.rows, 0
    while at < len(rows):
        shard, start = int(rows["shard"][at]), int(rows["start"][at])
        last = at
        while (
            last + 1 < len(rows)
            and rows["shard"][last + 1] == shard
            and rows["start"][last + 1] == rows["end"][last]
            and int(rows["end"][last + 1]) - start <= _READ_BYTES
        ):
            last += 1
        piece = task.pieces[shard]
        if piece.place not in stores:
            stores[piece.place] = open_store(piece.place, task.output.storage_options)
        store = stores[piece.place]
        if shard not in indexes:
            indexes[shard] = read_index(store, piece.info)
            if len(indexes) > _OPEN_SHARDS:
                indexes.popitem(last=False)
        data = memoryview(store.read_range(piece.info.name, start, int(rows["end"][last])))
        for i in range(at, last + 1):
            begin, end = int(rows["start"][i]) - start, int(rows["end"][i]) - start
            yield piece, indexes[shard][rows["row"][i]], bytes(data[begin:end])
        at = last + 1


def _append(tar: HashedTar, task: CopyTask, number: int, piece: Piece, row: Any, data: bytes) -> IndexRow:
    start, label = int(task.rows["start"][number]), int(task.rows["label"][number])
    image_at, size = int(row["offset"]) - start, int(row["size"])
    image = data[image_at : image_at + size]
    where = f"{join(piece.place, piece.info.name)} row {int(task.rows['row'][number])}"
    if len(image) != size or crc32(image) != row["crc32"]:
        raise UserError(f"{where}: crc32 is not the index'; see `mixer data verify {piece.place}`")
    name, others = "", []
    for member, offset, length in _members(data, where):
        if offset == image_at:
            name = member
        else:
            others.append((member, data[offset : offset + length]))
    match = _NAME.match(name)
    if match is None or key_hash(match[1]) != row["key"]:
        raise UserError(f"{where}: key is not the index'; see `mixer data verify {piece.place}`")
    key = _new_key(match[1], piece.owner, int(task.twin[number]))
    offset = tar.add(f"{key}.{match[2].lower()}", image)
    if label >= 0:
        tar.add(f"{key}.cls", b"%d" % label)
    for member, content in others:
        found = _NAME.match(member)
        suffix = found[2].lower() if found else ""
        if suffix == "json" and label < 0 and piece.numbers is not None:
            content = _renumber(content, piece.numbers)
        if suffix != "cls" and _SUFFIX.fullmatch(suffix):
            tar.add(f"{key}.{suffix}", content)
    return key_hash(key), offset, size, int(row["crc32"]), label, int(row["width"]), int(row["height"])


def _new_key(key: str, owner: int, repeated: int) -> str:
    """The key itself where it is plain, else a clean one; with the number of its set where it came before."""
    clean = key if _PLAIN_KEY.fullmatch(key) else member_key(key)
    if not repeated:
        return clean
    mark = f"_set{owner}" + (f"-{repeated}" if repeated > 1 else "")
    if len(clean) + len(mark) > MAX_KEY:  # its end may be all that tells it from the next one
        mark = f"-{key_hash(key):016x}{mark}"
    return clean[: MAX_KEY - len(mark)] + mark


def _renumber(content: bytes, numbers: dict[int, int]) -> bytes:
    """A `.json` member in which the class indices of a sample with several labels are those of the new set."""
    try:
        record = json.loads(content)
        labels = record["labels"]
        if not all(type(label) is int for label in labels):
            return content
    except (ValueError, KeyError, TypeError, RecursionError):
        return content  # no list of ours
    record["labels"] = [numbers[label] for label in labels if label in numbers]
    return json.dumps(record, separators=(",", ":")).encode()


def _members(data: bytes, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its data, size) of every regular file in a piece of a tar."""
    at = 0
    while at + ustar.BLOCK <= len(data):
        if data[at + 156 : at + 157] not in (b"0", b"\0") or data[at + 345] or data[at + 124] & 0x80:
            yield from _members_by_tarfile(data, where)  # PAX, GNU long names, prefixes: let tarfile read them all
            return
        at = at + ustar.BLOCK + (size := int(data[at + 124 : at + 136].strip(b" \0") or b"0", 8)) + -size % ustar.BLOCK
    at = 0
    while at + ustar.BLOCK <= len(data):
        size = int(data[at + 124 : at + 136].strip(b" \0") or b"0", 8)
        yield data[at : at + 100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), at + ustar.BLOCK, size
        at += ustar.member_bytes(size)


def _members_by_tarfile(data: bytes, where: str) -> Iterator[tuple[str, int, int]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data + ustar.END), mode="r:") as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as e:
        raise UserError(f"{where}: not a readable piece of a tar: {e}") from e
