"""The flat-piece file format: how tensors lie in files, who must have written what, and reading any range back.

A checkpoint folder holds one safetensors file a writer; each entry is a run of elements of one flattened tensor,
named `{kind}/{name}@{offset}`. All layouts (replicated, FSDP, ZeRO) are runs in that space, so no rank gathers
anything to write, and any rank of any layout reads just the ranges it needs. Files are ordinary safetensors, but
written here: hash and bytes go out in one pass, and no second copy of the state is made in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from data_tools.errors import UserError
from pipeline.checkpoint.place import MANIFEST, blocks, read, read_range, read_range_into, size, write_durably
from pipeline.parallel.engine import BUFFER, EMA, MOMENTS, WEIGHT, Piece

FORMAT_VERSION = 1
STATE = "state.json"
_MOMENTS = {kind for kinds in MOMENTS.values() for kind in kinds}
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

Key = tuple[str, str]  # (name, kind)


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete or of another model."""


class CheckpointUnreadable(CheckpointError):
    """It cannot be read now (an outage, a sick disk); that says nothing of its content."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: size, xxh3_128 hex digest, and its pieces as (name, kind, offset, length)."""

    name: str
    bytes: int
    hash: str
    pieces: list[tuple[str, str, int, int]]


def piece_key(name: str, kind: str, offset: int) -> str:
    return f"{kind}/{name}@{offset}"


def write_pieces(path: Path, pieces: Iterable[Piece]) -> FileRecord:
    """Writes one safetensors file and syncs it. Empty pieces are left out. Raises OSError."""
    kept = [p for p in pieces if p.data.numel()]
    header: dict[str, Any] = {"__metadata__": {"format": f"mixer-pieces-{FORMAT_VERSION}"}}
    at = 0
    for p in kept:
        size = p.data.numel() * p.data.element_size()
        header[piece_key(p.name, p.kind, p.offset)] = {
            "dtype": _DTYPES[p.data.dtype],
            "shape": [p.data.numel()],
            "data_offsets": [at, at + size],
        }
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the format wants its data aligned
    digest = xxhash.xxh3_128()

    def content() -> Iterator[bytes | memoryview]:
        for block in (len(head).to_bytes(8, "little"), head, *(tensor_bytes(p.data) for p in kept)):
            digest.update(block)
            yield block

    write_durably(path, content())
    return FileRecord(
        path.name, 8 + len(head) + at, digest.hexdigest(), [(p.name, p.kind, p.offset, p.data.numel()) for p in kept]
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements' bytes, without a copy where the tensor is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def check_coverage(tensors: dict[Key, tuple[int, ...]], files: Iterable[FileRecord]) -> None:
    """The union of all pieces must hold every element of every tensor exactly once, and nothing else.

    Raises:
        CheckpointError: naming the first tensor with a gap, an overlap, or that nobody asked for.
    """
    runs: dict[Key, list[tuple[int, int]]] = {key: [] for key in tensors}
    for record in files:
        for name, kind, offset, length in record.pieces:
            if (name, kind) not in runs:
                raise CheckpointError(f"{record.name} holds {kind} of {name}, which is not part of the state")
            runs[name, kind].append((offset, length))
    for (name, kind), found in runs.items():
        at = 0
        for offset, length in sorted(found):
            if offset != at:
                word = "written twice" if offset < at else "missing"
                raise CheckpointError(f"{kind} of {name}: elements from {min(offset, at):,} on are {word}")
            at += length
        if at != prod(tensors[name, kind]):
            raise CheckpointError(f"{kind} of {name}: {at:,} of {prod(tensors[name, kind]):,} elements were written")


class StateSource(Protocol):
    """Where a training state comes from: a checkpoint, or the initial values of a fresh run."""

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        """Elements [offset, offset + length) of a flattened tensor."""
        ...


@dataclass(frozen=True)
class CheckpointManifest:
    """MANIFEST.json: its presence is what makes a folder a checkpoint."""

    step: int
    tensors: dict[Key, tuple[int, ...]]
    files: list[FileRecord]
    state_hash: str
    metrics: dict[str, float]
    written_by: dict[str, Any]
    version: int = FORMAT_VERSION

    def to_json(self) -> str:
        raw = asdict(self)
        raw["tensors"] = [[name, kind, list(shape)] for (name, kind), shape in self.tensors.items()]
        return _dumps({**raw, "hash": _manifest_hash(raw)}) + "\n"

    @staticmethod
    def load(folder: Path) -> CheckpointManifest:
        """Raises CheckpointError where it is missing, damaged or of a newer version; CheckpointUnreadable."""
        try:
            raw = json.loads(read(folder / MANIFEST))
            if raw["version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{folder}: checkpoint format {raw['version']}, this release reads "
                    f"{FORMAT_VERSION}; upgrade the package"
                )
            if raw.pop("hash") != _manifest_hash(raw):
                raise ValueError("its hash does not fit its content")
            raw["tensors"] = {(n, k): tuple(s) for n, k, s in raw["tensors"]}
            raw["files"] = [FileRecord(**{**f, "pieces": [tuple(p) for p in f["pieces"]]}) for f in raw["files"]]
            return CheckpointManifest(**raw)
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
        except OSError as e:
            raise CheckpointUnreadable(f"{folder}/{MANIFEST} cannot be read now: {e}") from e
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{folder}/{MANIFEST} is damaged ({type(e).__name__}: {e})") from e


def _dumps(raw: dict[str, Any]) -> str:
    return json.dumps(raw, separators=(",", ":"))


def _manifest_hash(raw: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_dumps(raw).encode())


class CheckpointReader:
    """Reads ranges of tensors out of a committed checkpoint; opens only the files it needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = CheckpointManifest.load(folder)
        self._where: dict[Key, list[tuple[int, int, str]]] = {}
        for record in self.manifest.files:
            for name, kind, offset, length in record.pieces:
                self._where.setdefault((name, kind), []).append((offset, length, record.name))
        for runs in self._where.values():
            runs.sort()
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def state(self) -> dict[str, Any]:
        """state.json: step, order, optimizer step and the like. Raises CheckpointError, CheckpointUnreadable."""
        try:
            text = read(self.folder / STATE)
            if xxhash.xxh3_128_hexdigest(text) != self.manifest.state_hash:
                raise ValueError("its hash is not the manifest's")
            return json.loads(text)
        except (FileNotFoundError, ValueError) as e:
            raise CheckpointError(f"{self.folder / STATE} is damaged: {e}") from e
        except OSError as e:
            raise CheckpointUnreadable(f"{self.folder / STATE} cannot be read now: {e}") from e

    def has(self, name: str, kind: str) -> bool:
        return (name, kind) in self.manifest.tensors

    def shape(self, name: str, kind: str = WEIGHT) -> tuple[int, ...]:
        return self.manifest.tensors[name, kind]

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        first = next(self._runs(name, kind, offset, length), None)
        if first is None:
            return torch.empty(0)
        out = torch.empty(length, dtype=self._entry(*first[:2])[1])
        self.read_into(out, name, kind, offset)
        return out

    def read_into(self, out: Tensor, name: str, kind: str, offset: int) -> None:
        """`read`, into memory that is there already: 1-D, contiguous, on the CPU."""
        for file, key, at, first, count in self._runs(name, kind, offset, out.numel()):
            try:
                start, dtype = self._entry(file, key)
                place = out[at : at + count]
                space = place if dtype == out.dtype else torch.empty(count, dtype=dtype)
                read_range_into(self.folder / file, start + first * dtype.itemsize, tensor_bytes(space))
                if space is not place:
                    place.copy_(space)
            except (OSError, ValueError, KeyError) as e:
                raise CheckpointError(f"{self.folder / file} cannot be read: {e}") from e

    def _runs(self, name: str, kind: str, offset: int, length: int) -> Iterator[tuple[str, str, int, int, int]]:
        """Where a range lies: (file, entry, index in the range, index in the entry, count)."""
        if not self.has(name, kind):
            raise CheckpointError(f"{self.folder} holds no {kind} of {name}: it is of another model")
        for at, count, file in self._where.get((name, kind), []):
            first, last = max(offset, at), min(offset + length, at + count)
            if first < last:
                yield file, piece_key(name, kind, at), first - offset, first - at, last - first

    def tensor(self, name: str, kind: str = WEIGHT) -> Tensor:
        """The whole tensor in its own shape."""
        shape = self.shape(name, kind)
        return self.read(name, kind, 0, prod(shape)).view(shape)

    def _entry(self, file: str, key: str) -> tuple[int, torch.dtype]:
        """(where an entry's elements begin in the file, their type)."""
        try:
            base, entries = self._header(file)
            entry = entries[key]
            return base + entry["data_offsets"][0], _TORCH_DTYPES[entry["dtype"]]
        except (OSError, ValueError, KeyError) as e:
            raise CheckpointError(f"{self.folder / file} cannot be read: {e}") from e

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        """(where the data begins, the entries) of a safetensors file."""
        if file not in self._headers:
            length = int.from_bytes(read_range(self.folder / file, 0, 8), "little")
            self._headers[file] = 8 + length, json.loads(read_range(self.folder / file, 8, length))
        return self._headers[file]

    def damage(self, files: Iterable[FileRecord], content: bool = True) -> str | None:
        """What is wrong with `files` (sizes and, with `content`, hashes), or None.

        Raises:
            OSError: a file cannot be read now; that says nothing of its content.
        """
        for record in files:
            path = self.folder / record.name
            try:
                found = size(path)
                if found != record.bytes:
                    return f"{path} has {found:,} bytes, not {record.bytes:,}"
                if content and hash_file(path) != record.hash:
                    return f"{path}: its hash is not the manifest's"
            except FileNotFoundError:
                return f"{path} is missing"
        return None

    def digest(self) -> str:
        """Hex digest of every weight, moment and EMA value, independent of who wrote which piece of it."""
        digest = xxhash.xxh3_128()
        for (name, kind), shape in sorted(self.manifest.tensors.items()):
            digest.update(f"{kind}/{name}{list(shape)}".encode())
            digest.update(tensor_bytes(self.read(name, kind, 0, prod(shape))))
        return digest.hexdigest()


class InitialState:
    """The state of a run that has not begun: keyed initial weights, zero moments.

    `initial_value(name)` makes one whole tensor; the latest is kept, because its pieces are asked for in a row.
    """

    def __init__(self, initial_value: Callable[[str], Tensor]):
        self._initial_value = initial_value
        self._cached: tuple[str, Tensor] | None = None

    def read(self, name: str, kind: str, offset: int, length: int) -> Tensor:
        if kind in _MOMENTS:
            return torch.zeros(length)
        if kind not in (WEIGHT, BUFFER, EMA):
            raise CheckpointError(f"no initial value for {kind} of {name}")
        if self._cached is None or self._cached[0] != name:
            self._cached = name, self._initial_value(name).reshape(-1)
        return self._cached[1][offset : offset + length]


@torch.no_grad()
def load_pieces(pieces: Iterable[Piece], source: StateSource) -> None:
    """Overwrites every piece in place with the source's values."""
    for piece in pieces:
        if not piece.data.numel():
            continue
        if isinstance(source, CheckpointReader) and piece.data.device.type == "cpu" and piece.data.is_contiguous():
            source.read_into(piece.data, piece.name, piece.kind, piece.offset)
        else:
            piece.data.copy_(source.read(piece.name, piece.kind, piece.offset, piece.data.numel()))
