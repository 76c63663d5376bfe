"""How fast sharding is, as ratios to what the machine can do, all in one run.

    python benchmarks/bench_shard.py --photos PHOTOS [--small SMALL_JPEGS] [--scratch FOLDER]

PHOTOS is a folder (or tar) with JPEG photographs, replicated with distinct content; without --small, 30,000 JPEGs
of 32 x 32 pixels are made. Prints a markdown table. Every figure is the best of several interleaved repetitions,
because other work on the machine only ever makes things slower; `cpu` is the ratio of processor times, which other
work hardly touches. Everything that writes also syncs to the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.engines import ShardOptions, plan_into, run_part, shard_corpus
from data_tools.images import check_image

SHARD_BYTES = 256_000_000  # where one process is compared with raw copying
SHARDS = 12  # of each corpus, where several processes share the work


@dataclass
class Best:
    """The shortest wall and processor seconds of one thing that was done several times."""

    wall: float = float("inf")
    cpu: float = float("inf")

    def time(self, action: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
        before()
        begin, used = time.perf_counter(), _cpu_seconds()
        action()
        self.wall = min(self.wall, time.perf_counter() - begin)
        self.cpu = min(self.cpu, _cpu_seconds() - used)


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# --- corpora ------------------------------------------------------------------------------------------------


def replicate(photos: list[bytes], count: int, folder: Path) -> Path:
    """`count` photos in ten classes; a comment with its number makes each one different."""
    for i in range(count):
        data = photos[i % len(photos)]
        comment = b"%016d" % i
        path = folder / f"class{i % 10}" / f"{i:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:])
    return folder


def read_photos(place: Path) -> list[bytes]:
    if place.is_dir():
        found = [p.read_bytes() for p in sorted(place.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    else:
        with tarfile.open(place) as tar:
            files = [tar.extractfile(m) for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))]
            found = [f.read() for f in files if f is not None]
    return [data for data in found if data[:3] == b"\xff\xd8\xff"]


def small_jpegs() -> list[bytes]:
    import simplejpeg

    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (300, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=90) for p in smooth]


# --- what is compared ---------------------------------------------------------------------------------------


def raw_copy(files: list[str], out: Path, shard_bytes: int) -> None:
    """One process: read every file, append it to another one, sync as often as shards are."""
    parts: list[bytes] = []
    pending = total = 0
    number = 0
    file = open(out / "raw-0", "wb", buffering=0)  # noqa: SIM115
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        data = os.read(fd, os.fstat(fd).st_size)
        os.close(fd)
        parts.append(data)
        pending += len(data)
        if pending >= 1 << 20:
            file.write(b"".join(parts))
            total, pending, parts = total + pending, 0, []
        if total >= shard_bytes:
            os.fsync(file.fileno())
            file.close()
            number, total = number + 1, 0
            file = open(out / f"raw-{number}", "wb", buffering=0)  # noqa: SIM115
    file.write(b"".join(parts))
    os.fsync(file.fileno())
    file.close()


def shard_writer(files: list[str], out: Path, shard_bytes: int) -> None:
    """The loop that everybody writes: webdataset.ShardWriter over the files."""
    import webdataset

    with webdataset.ShardWriter(f"{out}/w-%06d.tar", maxsize=shard_bytes, maxcount=10**9, verbose=0) as sink:
        for i, path in enumerate(files):
            with open(path, "rb") as file:
                data = file.read()
            sink.write({"__key__": f"{i:09d}", "jpg": data, "cls": int(path.split("/class")[-1].split("/")[0])})
    for path in out.glob("w-*.tar"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def decode_some(files: list[str]) -> int:
    for path in files:
        with open(path, "rb") as file:
            check_image(file.read(), 10**9)
    return len(files)


def decode_only(files: list[str], workers: int) -> None:
    context = multiprocessing.get_context("forkserver")
    step = max(1, len(files) // (workers * 20))
    with ProcessPoolExecutor(workers, context) as pool:
        list(pool.map(decode_some, [files[i : i + step] for i in range(0, len(files), step)]))


@dataclass
class Packing:
    """Packs one plan, as often as asked."""

    corpus: Path
    out: Path
    verify: bool
    workers: int
    shard_bytes: int

    def plan(self) -> Packing:
        plan_into(self._options())
        return self

    def forget(self) -> None:
        """Removes what was packed, not the plan."""
        for path in [*self.out.glob("*.tar"), *self.out.glob("*.npy"), *(self.out / "plan").glob("*.done.json")]:
            path.unlink()

    def run(self) -> None:
        run_part(self._options().output(), 0, 1, self.workers)

    def _options(self) -> ShardOptions:
        return ShardOptions(
            self.corpus, self.out, shard_size=self.shard_bytes, verify=self.verify, workers=self.workers
        )


def peak_memory(corpus: Path, out: Path) -> float:
    """Peak resident MB of a process that packs `corpus`."""
    code = (
        "import sys; from data_tools.engines import *; "
        "run_part(Output.at(sys.argv[1]), 0, 1, 1); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    plan_into(ShardOptions(corpus, out, max_samples=500, verify=True))
    run = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1]) / 1024


# --- the table ----------------------------------------------------------------------------------------------


def measure(name: str, corpus: Path, scratch: Path, repeats: int) -> list[tuple[str, str, str, str, str]]:
    files = [str(p) for p in sorted(corpus.rglob("*.jpg"))]
    size = sum(os.path.getsize(f) for f in files)
    shard_bytes = (size + 1024 * len(files)) // SHARDS
    cores = len(os.sched_getaffinity(0))
    raw, loop, one, decode, verified, single = (Best() for _ in range(6))
    fast = Packing(corpus, scratch / "fast", False, 1, SHARD_BYTES).plan()
    checked = Packing(corpus, scratch / "checked", True, cores, shard_bytes).plan()
    alone = Packing(corpus, scratch / "alone", True, 1, shard_bytes).plan()
    raw_out, loop_out = scratch / "raw", scratch / "loop"
    for _ in range(repeats):
        raw.time(lambda: raw_copy(files, raw_out, SHARD_BYTES), lambda: _emptied(raw_out))
        one.time(fast.run, fast.forget)
        loop.time(lambda: shard_writer(files, loop_out, SHARD_BYTES), lambda: _emptied(loop_out))
    for _ in range(max(2, repeats // 2)):
        decode.time(lambda: decode_only(files, cores))
        verified.time(checked.run, checked.forget)
        single.time(alone.run, alone.forget)
    everything = Best()
    options = ShardOptions(corpus, scratch / "whole", shard_size=SHARD_BYTES, verify=False, workers=1)
    everything.time(lambda: shard_corpus(options))

    def row(
        what: str, best: Best, other: Best | None, wanted: str, one_process: bool = True
    ) -> tuple[str, str, str, str, str]:
        rate = f"{len(files) / best.wall:,.0f} img/s, {size / best.wall / 1e6:,.0f} MB/s"
        if other is None:
            return f"{name}: {what}", rate, "", "", ""
        return (
            f"{name}: {what}",
            rate,
            f"{other.wall / best.wall:.2f}x",
            f"{other.cpu / best.cpu:.2f}x" if one_process else "",
            wanted,
        )

    return [
        row("raw copy (read, append, sync)", raw, None, ""),
        row("webdataset.ShardWriter loop", loop, raw, ""),
        row("pass-through, 1 process, to raw copy", one, raw, ">= 0.50x"),
        row("pass-through, 1 process, to ShardWriter", one, loop, ">= 2.50x"),
        row(f"decode only, {cores} processes", decode, None, ""),
        row(f"with verification, {cores} processes, to decode only", verified, decode, ">= 0.90x", False),
        row(f"with verification, {cores} processes, to 1", verified, single, ">= 1.80x (2 processes)", False),
        row("the whole command (scan, plan, pack, statistics), 1 process, to raw copy", everything, raw, ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder or tar of JPEG photographs")
    parser.add_argument("--small", type=Path, help="folder of small JPEGs; default: made")
    parser.add_argument(
        "--count",
        type=int,
        default=6000,
        help="photographs after replication; fewer, and starting processes weighs more",
    )
    parser.add_argument("--small-count", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=None, help="where to write; on the disk that matters")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench-shard-") as folder:
        scratch = Path(folder)
        rows: list[tuple[str, str, str, str, str]] = []
        corpora: list[tuple[str, list[bytes], int]] = []
        if args.photos is not None:
            corpora.append(("photos", read_photos(args.photos), args.count))
        small = read_photos(args.small) if args.small is not None else small_jpegs()
        corpora.append(("small", small, args.small_count))
        for name, images, count in corpora:
            corpus = replicate(images, count, scratch / name)
            rows += measure(name, corpus, _fresh(scratch / "work"), args.repeats)
            shutil.rmtree(corpus)
        for count in (2000, 8000, 30_000):
            corpus = replicate(small, count, scratch / f"memory{count}")
            peak = peak_memory(corpus, _fresh(scratch / "work"))
            rows.append((f"peak memory of packing {count:,} images", f"{peak:,.0f} MB", "", "", ""))
    print("| what | rate | ratio (wall) | ratio (cpu) | wanted |\n|-|-|-|-|-|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _emptied(folder: Path) -> None:
    """Outside of the time: who overwrites a file waits until its old bytes are gone."""
    _fresh(folder)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
