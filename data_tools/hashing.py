"""Content hashes of all listed samples, as tasks that every engine runs: processes here, Ray, a SLURM array.

A task is a block of the listing in, one file of hashes out that appears whole or not at all: a killed run goes on with
the files that are missing. A content hash is xxh3_128 of the encoded bytes, as they lie in the source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.images import BadImage
from data_tools.parallel import map_processes
from data_tools.plan import PlannedSample
from data_tools.reading import Inputs, SampleReader
from data_tools.scan import Listing
from data_tools.storage import atomic_file, write_all, write_atomic
from data_tools.tables import read_rows

BLOCK_ROWS = 2048  # of a task
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])  # both 0: could not be read, so it cannot be compared
HASH_FOLDER = "hashes"  # below the plan's work folder
_JOB = "job.json"


@dataclass(frozen=True)
class HashTask:
    """One block of samples whose content is hashed: rows [start, stop) of one part of the listing, into `out`."""

    part: Path
    start: int
    stop: int
    out: Path
    inputs: Inputs


Spread = Callable[[list[HashTask]], Iterable[object]]  # runs tasks somewhere; yields once for each that has ended


def hash_listing(
    listing: Listing,
    inputs: Inputs,
    folder: Path,
    spread: Spread,
    report: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Hashes what an earlier, killed run has not; returns the files of DIGEST rows, in listing order.

    Raises what reading raises: UserError where a source changed since it was listed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(str(listing.part_path(n)), part.rows) for n, part in enumerate(listing.parts)]
    job = {"parts": parts, "roots": inputs.roots, "prefixes": inputs.prefixes, "rows": BLOCK_ROWS}  # and no secrets
    write_atomic(folder / _JOB, json.dumps(job).encode())
    tasks = _tasks(parts, inputs, folder, BLOCK_ROWS)
    missing = [t for t in tasks if not t.out.exists()]
    for done, _ in enumerate(spread(missing) if missing else [], 1):
        if report is not None:
            report("hashing", len(tasks) - len(missing) + done, len(tasks))
    return [t.out for t in tasks]


def waiting_tasks(folder: Path, storage_options: dict[str, Any]) -> list[HashTask] | None:
    """All tasks of the hashing that is going on in `folder`, done or not; None where there is none."""
    try:
        job = json.loads((folder / _JOB).read_bytes())
    except FileNotFoundError:
        return None
    inputs = Inputs(tuple(job["roots"]), tuple(job["prefixes"]), storage_options)
    return _tasks(job["parts"], inputs, folder, job["rows"])


def _tasks(parts: list[tuple[str, int]], inputs: Inputs, folder: Path, block: int) -> list[HashTask]:
    return [
        HashTask(Path(part), at, min(at + block, rows), folder / f"hash-{n:05d}-{at:07d}", inputs)
        for n, (part, rows) in enumerate(parts)
        for at in range(0, rows, block)
    ]


def on_processes(workers: int) -> Spread:
    """Processes of this machine, 0 for one a core."""
    return lambda tasks: map_processes(hash_block, tasks, workers)


def hash_block(task: HashTask) -> None:
    """One task, from start to end: a pure function of its block of the listing."""
    rows = read_rows(task.part, task.start, task.stop - task.start).to_pylist()
    digests = np.zeros(len(rows), DIGEST)
    with SampleReader(task.inputs) as reader:
        samples = [_listed_sample(row, task.inputs) for row in rows]
        for i, (_, data) in enumerate(reader.read_all(samples)):
            if not isinstance(data, BadImage):  # packing will say why
                digests[i] = content_digest(data)
    with atomic_file(task.out) as file:
        write_all(file, digests.tobytes())


def content_digest(data: bytes) -> tuple[int, int]:
    """A row of DIGEST."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & 0xFFFFFFFFFFFFFFFF


def read_digests(path: Path) -> np.ndarray:
    """What `hash_block` wrote, DIGEST [rows of the block]."""
    return np.fromfile(path, DIGEST)


def _listed_sample(row: dict[str, Any], inputs: Inputs) -> PlannedSample:
    """A row of the listing as a sample that can be read."""
    place = row["container"] or row["path"][inputs.prefixes[row["source"]] :]
    return PlannedSample(
        "", os.fsdecode(row["path"]), row["size"], row["mtime_ns"], -1, row["extra"] or "", row["source"],
        os.fsdecode(place), row["offset"], row["stored"], row["codec"],
    )  # fmt: skip
