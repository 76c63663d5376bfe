"""The ledger: what reached the model, 16 characters a rank and step. A file format.

    RUN/ledger/rank-00000.000.ledger, rank-00000.001.ledger, ...

Lines of two kinds. A *segment* holds consecutive steps of one rank:

    ATTEMPT STEP EPOCH POSITION FIRST LAST BATCH DIGESTS

numbers of its first step (that step, the position of the batch's slot 0, the rank's slots [FIRST, LAST) of BATCH),
then one digest of 16 hex digits a step, without spaces; the i-th is of step STEP+i at POSITION+i*BATCH. A line

    masked {"attempt": 0, "step": 7, "slots": [[3, 512, "why"], ...]}

says which slots of a step counted with weight 0, and stands before that step's digest. Every step is appended by one
write. What a crash cuts short is no digest of 16 digits, and a new start begins a new line, so nothing has to be
repaired. A file that has grown beyond its limit is synced and followed by the next one. Up to version 0.1 a ledger was
`rank-00000.jsonl`, one JSON object a step: it is read as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FILE_BYTES = 4 << 20
SEGMENT_STEPS = 1024
_DIGITS = 16

Masked = list[tuple[int, int, str]]  # (slot, sample id, why)


@dataclass
class Segment:
    """Consecutive steps of one rank; `digests` uint64, one a step."""

    attempt: int
    step: int
    epoch: int
    position: int
    first: int
    last: int
    batch: int
    digests: np.ndarray
    masked: dict[int, Masked] = field(default_factory=dict)  # by step

    @property
    def end(self) -> int:
        return self.step + len(self.digests)

    def part(self, start: int, end: int) -> Segment:
        """Its steps within [start, end)."""
        start, end = max(start, self.step), min(end, self.end)
        skipped = start - self.step
        return Segment(
            self.attempt, start, self.epoch, self.position + skipped * self.batch, self.first, self.last, self.batch,
            self.digests[skipped : max(skipped, end - self.step)],
            {s: m for s, m in self.masked.items() if start <= s < end},
        )  # fmt: skip


class LedgerWriter:
    """Appends what one rank did, for one attempt.

    What a full disk does not take is kept in memory (`unwritten`) and written with the next step or sync: it must not
    end a training. The writer of the next attempt begins with it.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        attempt: int,
        first: int,
        last: int,
        batch: int,
        file_bytes: int = FILE_BYTES,
        unwritten: bytes = b"",
    ):
        self.folder, self.rank, self.attempt = folder, rank, attempt
        self.first, self.last, self.batch = first, last, batch
        self._limit = file_bytes
        self._number = max((number_of(p) for p in ledger_files(folder, rank) if p.suffix == ".ledger"), default=0)
        self._next: tuple[int, int, int] | None = None  # step, epoch, position that would continue the segment
        self._count = 0
        self.unwritten = unwritten

    def add(self, step: int, epoch: int, position: int, digest: int, masked: Masked | None = None) -> None:
        text = f"{digest:016x}"
        if masked or self._next != (step, epoch, position) or self._count >= SEGMENT_STEPS:
            if masked:
                why = {"attempt": self.attempt, "step": step, "slots": masked}
                text = f"\nmasked {json.dumps(why)}{self._head(step, epoch, position)}{text}"
            else:
                text = self._head(step, epoch, position) + text
            self._count = 0
        self._count += 1
        self._next = (step + 1, epoch, position + self.batch)
        self._write(text.encode())

    def sync(self) -> None:
        """What a checkpoint includes must be provable after a power cut."""
        if self.unwritten:
            self._write(b"")
        with contextlib.suppress(OSError), open(self._path(), "rb") as f:
            os.fsync(f.fileno())

    def _head(self, step: int, epoch: int, position: int) -> str:
        return f"\n{self.attempt} {step} {epoch} {position} {self.first} {self.last} {self.batch} "

    def _path(self) -> Path:
        return self.folder / f"rank-{self.rank:05d}.{self._number:03d}.ledger"

    def _write(self, data: bytes) -> None:
        self.unwritten += data
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._path(), "ab", buffering=0) as f:
                while self.unwritten:
                    self.unwritten = self.unwritten[f.write(self.unwritten) :]
                if f.tell() >= self._limit:
                    os.fsync(f.fileno())
                    self._number, self._next = self._number + 1, None
        except OSError:
            return


def number_of(path: Path) -> int:
    return int(path.name.split(".")[1])


def ledger_files(folder: Path, rank: int) -> list[Path]:
    """In the order in which they were written."""
    name = f"rank-{rank:05d}"
    old = folder / f"{name}.jsonl"
    return [*([old] if old.exists() else []), *sorted(folder.glob(f"{name}.*.ledger"), key=number_of)]


def ledger_ranks(folder: Path) -> list[int]:
    return sorted({int(p.name[5:].split(".")[0]) for p in folder.glob("rank-*")})


_HEAD = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) ([0-9a-f]*)")


class LedgerReader:
    """One rank's segments, one after the other. No file stays open between them: a run may have hundreds of ranks."""

    def __init__(self, folder: Path, rank: int):
        self.rank = rank
        self._files = ledger_files(folder, rank)
        self._at = 0  # in the first of the files
        self._masked: dict[tuple[int, int], Masked] = {}

    def __iter__(self) -> Iterator[Segment]:
        while self._files:
            with open(self._files[0], "rb") as f:
                f.seek(self._at)
                line = f.readline()
                self._at = f.tell()
            if not line:
                self._files, self._at = self._files[1:], 0
                continue
            segment = self._old(line) if self._files[0].suffix == ".jsonl" else self._parse(line)
            if segment is not None:
                yield segment

    def _parse(self, line: bytes) -> Segment | None:
        if line.startswith(b"masked "):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line[7:])
                self._masked[row["attempt"], row["step"]] = row["slots"]
            return None
        head = _HEAD.match(line)
        if head is None:
            return None
        text = head[8][: len(head[8]) // _DIGITS * _DIGITS]
        digests = np.frombuffer(bytes.fromhex(text.decode()), dtype=">u8").astype(np.uint64)
        if not len(digests):
            return None
        attempt, step, epoch, position, first, last, batch = (int(head[i]) for i in range(1, 8))
        masked = self._masked.pop((attempt, step), None)
        return Segment(attempt, step, epoch, position, first, last, batch, digests, {step: masked} if masked else {})

    @staticmethod
    def _old(line: bytes) -> Segment | None:
        try:
            row: dict[str, Any] = json.loads(line)
            first, last = row.get("slots", (0, 0))
            digest = np.array([int(row["digest"], 16)], dtype=np.uint64)
            masked = {row["step"]: row["masked"]} if row.get("masked") else {}
            return Segment(row["attempt"], row["step"], row["epoch"], row["position"], first, last, 0, digest, masked)
        except (ValueError, KeyError, TypeError):
            return None
