"""What the sample order costs at scale: start-up, memory, a step, anywhere in an epoch; one set and a mixture.

    python benchmarks/bench_order.py [--shards 100000] [--samples 1000000000] [--batch 4096] [--chunk 64]

Writes a manifest of that many shards (no tars), and asks for ids in fresh processes, as a rank of a training does:
read the manifest, make the order, draw the first batch. Wanted: below 10 s to the first 4,096 ids, below 5 ms a step,
below 300 MB over the interpreter in each process. Memory is the highest of a process, less what an interpreter has that
imported the same modules; nothing is shared between processes, so that nothing can be left over. Steps are in
processor time, 128 of them in a row, best of 3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo

MODULES = "import json, sys, time; import numpy as np; from data_tools.manifest import DatasetManifest\n"
MODULES += "from pipeline.data.order import SampleOrder; from pipeline.data.mixture import MixedSet, MixtureOrder\n"
ASK = """
folder, batch, chunk, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def highest():  # kB resident, ever
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = highest()
begin = time.perf_counter()
manifest = DatasetManifest.load(folder)
sizes = [s.samples for s in manifest.splits["train"]]
sha = manifest.split_digest("train")
loaded = time.perf_counter()
if kind == "mixture":
    half = len(sizes) // 2
    a, b = sizes[:half], sizes[half:]
    sets = [MixedSet("a", 0.7, a, sha, sum(a)), MixedSet("b", 0.3, b, sha, sum(b))]
    order = MixtureOrder(sets, seed=0, global_batch_size=batch, chunk=chunk)
else:
    order = SampleOrder(sizes, manifest_sha=sha, seed=0, global_batch_size=batch, chunk=chunk)
order.sample_ids(0, np.arange(batch))
first = time.perf_counter()
out = {"manifest_s": loaded - begin, "first_s": first - begin}
def step_ms(start, count=128):
    best = 1e9
    for again in range(3):
        begin = time.process_time()
        for t in range(start, start + count):
            order.sample_ids(0, t * batch + np.arange(batch))
        best = min(best, (time.process_time() - begin) / count)
    return 1000 * best
out["start_ms"], out["late_ms"] = step_ms(1), step_ms(int(0.9 * order.steps_per_epoch))
begin = time.perf_counter()
order.sample_ids(1 if kind == "one set" else 0, np.arange(batch))
out["next_epoch_ms"] = 1000 * (time.perf_counter() - begin)
out["mb"] = (highest() - before) / 1024
print(json.dumps(out))
"""


def write_manifest(folder: Path, shards: int, samples: int) -> float:
    """Sizes differ by a few samples, so that every shard ends in a short chunk. MB of the file."""
    sizes = samples // shards + np.arange(shards) % 7 - 3
    infos = [
        ShardInfo(f"train-{i:06d}.tar", int(n), int(n) * 110_000, f"{i:032x}", f"{i:032x}") for i, n in enumerate(sizes)
    ]
    (folder / MANIFEST_NAME).write_text(DatasetManifest({"train": infos}, ["a", "b"]).to_json())
    return (folder / MANIFEST_NAME).stat().st_size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        size = write_manifest(folder, args.shards, args.samples)
        print(f"{args.samples:,} samples in {args.shards:,} shards (manifest of {size:.0f} MB, written in "
              f"{time.perf_counter() - begin:.1f} s), B = {args.batch}, c = {args.chunk}\n")  # fmt: skip
        print("| order | manifest read, s | first batch's ids, s | a step, ms | at 90% of the epoch, ms | ratio | "
              "first of the next epoch, ms | memory, MB |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|")
        for kind in ("one set", "mixture"):
            command = [sys.executable, "-c", MODULES + ASK, str(folder), str(args.batch), str(args.chunk), kind]
            r = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(
                f"| {kind} | {r['manifest_s']:.2f} | {r['first_s']:.2f} | {r['start_ms']:.2f} | {r['late_ms']:.2f} | "
                f"{r['late_ms'] / r['start_ms']:.2f} | {r['next_epoch_ms']:.1f} | {r['mb']:.0f} |"
            )
    print("\nwanted: < 10 s, < 5 ms, ratio <= 1.1, < 300 MB")


if __name__ == "__main__":
    main()
