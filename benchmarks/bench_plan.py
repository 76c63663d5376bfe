"""Planning at scale: time and peak memory of listing, sorting and cutting a generated manifest; no image exists.

    python benchmarks/bench_plan.py --rows 10000000
    python benchmarks/bench_plan.py --rows 200000000 --scratch /a/disk/with/80GB

The manifest is Parquet (path, label, size), 18,000 classes, sizes of about 100 kB. Planning runs in one process of
its own, so that the figures are its alone; the plan is then checked: every sample once, one shard read back.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CHUNK = 1 << 20
CLASSES = 18_000


def generate(file: Path, rows: int) -> None:
    """A manifest of `rows` rows, in order of path, as a listing would give it."""
    rng = np.random.default_rng(0)
    schema = pa.schema([("path", pa.string()), ("label", pa.string()), ("size", pa.int64())])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            number = np.arange(start, start + count)
            digits = pc.utf8_lpad(pa.array(number * CLASSES // rows).cast(pa.string()), 8, "0")
            names = pc.binary_join_element_wise("n", digits, "")
            numbers = pc.utf8_lpad(pa.array(number).cast(pa.string()), 9, "0")
            paths = pc.binary_join_element_wise("train/", names, "/", names, "_", numbers, ".JPEG", "")
            sizes = rng.lognormal(11.4, 0.5, count).astype(np.int64) + 1
            writer.write_table(pa.table([paths, names, sizes], schema=schema))


def plan(manifest: Path, folder: Path, order: str) -> None:
    """Plans and prints figures as JSON: run as a process of its own."""
    from data_tools.draft import Draft, Request
    from data_tools.plan import PlanOptions
    from data_tools.plan_store import read_slice

    stages: dict[str, float] = {}
    begin = time.perf_counter()

    def report(what: str, done: int, of: int) -> None:
        stages[what] = time.perf_counter() - begin

    options = PlanOptions(val_fraction=0.01, order=order)  # type: ignore[arg-type]
    draft = Draft(Request((str(manifest),)), options, folder, report)
    made = draft.build()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    begin = time.perf_counter()
    slice_ = read_slice(folder, made.shards[len(made.shards) // 2], made.corpus.prefixes)
    read = time.perf_counter() - begin
    disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e9
    kept = sum(p.stat().st_size for p in folder.glob("samples-*")) / 1e9
    train = [s.bytes for s in made.shards if s.split == "train"]
    assert sum(s.samples for s in made.shards) == made.corpus.samples and slice_
    print(json.dumps({
        "rows": made.corpus.samples, "seconds": seconds, "stages end at": stages, "peak GiB": peak,
        "shards": len(made.shards), "smallest/largest train shard": min(train) / max(train),
        "plan GB": kept, "work GB": disk - kept, "read one slice s": read, "slice": len(slice_),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--order", choices=["shuffled", "source"], default="shuffled")
    parser.add_argument("--scratch", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan is not None:
        plan(args.manifest, args.plan, args.order)
        return
    scratch = Path(tempfile.mkdtemp(prefix="bench-plan-", dir=args.scratch))
    try:
        manifest = scratch / "manifest.parquet"
        begin = time.perf_counter()
        generate(manifest, args.rows)
        print(f"manifest: {args.rows:,} rows, {manifest.stat().st_size / 1e9:.2f} GB, "
              f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        command = [sys.executable, __file__, "--manifest", str(manifest), "--plan", str(scratch / "plan")]
        out = subprocess.run([*command, "--order", args.order], check=True, stdout=subprocess.PIPE, text=True).stdout
        for name, value in json.loads(out).items():
            print(f"{name}: {value}")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
