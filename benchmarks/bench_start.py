"""What a training's start costs at scale: to the first step over 100,000 shards with 1e9 samples, and its memory.

    python benchmarks/bench_start.py [--shards 100000] [--samples 1000000000] [--batch 4096] [--chunk 64] [--ranks 2]

Starts `mixer launch local` as a user does, with ranks and loader workers, a model too small to matter, and evaluation
off; once on a set of as few shards as a batch fits into, once on the large one, by `pread` and through a node's cache
(`data.read=chunk`). All shards are there and are read: hard links to a few real tars and indexes, whose images are
small. So it shows what the number of shards and samples costs, not a disk's or a network's speed.

Time runs from the command to the first completed step of all ranks; "over the small set" is what the large one adds.
Memory is a rank's own highest (resident, and that of its workers that is not shared), less the same run's on the small
set. Wanted: below 10 s to the first batch over what the same start takes on the small set, below 300 MB a rank.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
import xxhash

from data_tools import ustar
from data_tools.index import index_bytes
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo, index_name
from pipeline.ledger import LedgerReader
from pipeline.run import RunFolder

TAG = "MIXER_BENCH_START"
SIZES = range(-3, 4)  # shards differ by a few samples, so that each ends in a short chunk
LINKS = 10_000  # to one file; ext4 allows 65,000
MODEL = [
    "model.name=mixer_s16", "model.image_size=32", "model.patch_size=8", "model.hidden_dim=16", "model.num_blocks=1",
    "model.tokens_mlp_dim=8", "model.channels_mlp_dim=16", "train.precision=fp32", "train.strategy=ddp",
    "checkpoint.every=1000 steps", "logging.to=[]", "data.val=none",
]  # fmt: skip


def write_shard(folder: Path, name: str, samples: int, images: list[bytes]) -> ShardInfo:
    """A real tar of so many small images and its index; the manifest's line of it."""
    tar, rows = bytearray(), []
    for i in range(samples):
        data = images[i % len(images)]
        tar += ustar.header(f"{i:09d}.jpg", len(data))
        rows.append((i, len(tar), len(data), zlib.crc32(data), i % 2, 40, 40))
        tar += data + ustar.padding(len(data))
    tar += ustar.END
    index = index_bytes(rows)
    (folder / name).write_bytes(tar)
    (folder / index_name(name)).write_bytes(index)
    digest = xxhash.xxh3_128_hexdigest
    return ShardInfo(name, samples, len(tar), digest(bytes(tar)), digest(index))


def write_dataset(folder: Path, shards: int, samples: int) -> Path:
    """`shards` shards of about `samples` in all: every file is there, most are links."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (100, 10, 10, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    images = [simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=60) for p in pixels]
    folder.mkdir()
    infos: list[ShardInfo] = []
    real: dict[int, ShardInfo] = {}
    links: Counter[int] = Counter()
    for number in range(shards):
        name, kind = f"train-{number:06d}.tar", number % len(SIZES)
        if links[kind] % LINKS == 0:
            real[kind] = write_shard(folder, name, samples // shards + SIZES[kind], images)
        else:
            os.link(folder / real[kind].name, folder / name)
            os.link(folder / real[kind].index_name, folder / index_name(name))
        links[kind] += 1
        r = real[kind]
        infos.append(ShardInfo(name, r.samples, r.bytes, r.hash, r.index_hash))
    (folder / MANIFEST_NAME).write_text(DatasetManifest({"train": infos}, ["a", "b"]).to_json())
    return folder


@dataclass
class Started:
    """Of one start: seconds, and bytes by process."""

    first_step: float = float("nan")
    ranks: dict[int, int] = field(default_factory=dict)  # pid -> highest resident
    workers: dict[int, int] = field(default_factory=dict)  # pid -> most of its own
    prefetcher: int = 0

    def worst_rank(self) -> float:
        return max(self.ranks.values()) / 2**20

    def worst_worker(self) -> float:
        return max(self.workers.values(), default=0) / 2**20


def start(folder: Path, run: Path, args: argparse.Namespace, *extra: str) -> Started:
    settings = [
        f"data.train={folder}", f"run.dir={run}", f"train.global_batch_size={args.batch}", f"data.chunk={args.chunk}",
        f"train.micro_batch_size={args.batch // args.ranks // 4}", f"data.num_workers={args.workers}",
        f"train.duration={args.steps} steps", *MODEL, *extra,
    ]  # fmt: skip
    recipe = run.with_suffix(".yaml")
    recipe.write_text("run: {name: start}\n")
    command = [sys.executable, "-m", "launch.cli", "launch", "local", str(recipe), *settings]
    log = run.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MIXER_DEVICE": "cpu", TAG: str(run)}
    found, begin = Started(), time.perf_counter()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, "--nproc", str(args.ranks)], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        while process.poll() is None:
            if found.first_step != found.first_step and all(_steps(run, r) for r in range(args.ranks)):
                found.first_step = time.perf_counter() - begin
            _measure(run, found)
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its ranks
            process.wait()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with code {process.returncode}:\n{log.read_text()[-4000:]}")
    return found


def _steps(run: Path, rank: int) -> bool:
    return any(len(s.digests) for s in LedgerReader(RunFolder(run).ledger, rank))


def _measure(run: Path, found: Started) -> None:
    """Looks at all processes of a run, which inherit its tag. Loader workers are called what torch calls them."""
    mark = f"{TAG}={run}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            pid = int(entry.name)
            variables = (entry / "environ").read_bytes().split(b"\0")
            if mark not in variables:
                continue
            command = (entry / "cmdline").read_bytes()
            if b"pipeline.data.prefetch" in command:
                found.prefetcher = max(found.prefetcher, _kb(entry / "status", "VmHWM:") * 1024)
            elif (entry / "comm").read_text().strip() == "pt_data_worker":
                own = _kb(entry / "smaps_rollup", "Private_Dirty:") * 1024
                found.workers[pid] = max(found.workers.get(pid, 0), own)
            elif any(v.startswith(b"RANK=") for v in variables):
                found.ranks[pid] = max(found.ranks.get(pid, 0), _kb(entry / "status", "VmHWM:") * 1024)
        except (OSError, ValueError):  # it has just ended
            continue


def _kb(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: TMPDIR)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        # Chunks are of the same size in both only from 4 * B * chunk samples on
        per_shard = args.samples // args.shards
        few = -(-4 * args.batch * args.chunk // (per_shard - 3))
        small = write_dataset(root / "small", few, few * per_shard)
        begin = time.perf_counter()
        large = write_dataset(root / "large", args.shards, args.samples)
        print(
            f"{args.samples:,} samples in {args.shards:,} shards (written in {time.perf_counter() - begin:.0f} s), "
            f"against {few * per_shard:,} in {few:,}; B = {args.batch}, c = {args.chunk}, {args.ranks} ranks of "
            f"{args.workers} workers\n",
            flush=True,
        )
        print("| read | set | command to first step, s | over the small set, s | a rank, MB over the small set | "
              "a worker | prefetcher |\n|---|---|---|---|---|---|---|")  # fmt: skip
        for read in ("pread", "chunk"):
            extra = [f"data.read={read}", f"data.cache_dir={root / 'cache'}"]
            base = start(small, root / f"run-small-{read}", args, *extra)
            print(f"| {read} | small | {base.first_step:.1f} | | | | |", flush=True)
            found = start(large, root / f"run-large-{read}", args, *extra)
            print(
                f"| {read} | large | {found.first_step:.1f} | {found.first_step - base.first_step:+.1f} | "
                f"{found.worst_rank() - base.worst_rank():+.0f} | {found.worst_worker() - base.worst_worker():+.0f} | "
                f"{(found.prefetcher - base.prefetcher) / 2**20:+.0f} |",
                flush=True,
            )
    print("\nwanted: below 10 s over the small set, below 300 MB a rank")


if __name__ == "__main__":
    main()
