"""What proof costs: bytes of ledger and seconds of audit a step, for a large job on a generated data set.

    python benchmarks/bench_audit.py [--ranks 512] [--steps 1000] [--batch 4096] [--samples 1281167]

Writes a data set of that many samples (index files; tars without content) and the ledgers that so many ranks would
have written, through the product's own writer, and audits them as `mixer audit` does. One process, processor time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

from data_tools.index import index_bytes
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo, index_name
from pipeline.audit import audit
from pipeline.config import load_config
from pipeline.data.order import key, rank_slots
from pipeline.inputs import open_training_data
from pipeline.ledger import LedgerWriter
from pipeline.run import RunFolder

SHARD = 1251


def write_dataset(folder: Path, samples: int) -> None:
    rng = np.random.default_rng(0)
    infos = []
    for number, first in enumerate(range(0, samples, SHARD)):
        n = min(SHARD, samples - first)
        crcs = rng.integers(0, 2**32, n, dtype=np.uint64).tolist()
        index = index_bytes([(first + i, 1024 * i, 100, crc, 0, 0, 0) for i, crc in enumerate(crcs)])
        name = f"train-{number:06d}.tar"
        (folder / index_name(name)).write_bytes(index)
        with open(folder / name, "wb") as tar:
            tar.truncate(1024 * n)
        infos.append(ShardInfo(name, n, 1024 * n, "", xxhash.xxh3_128_hexdigest(index)))
    (folder / MANIFEST_NAME).write_text(DatasetManifest({"train": infos}, ["a"]).to_json())


def write_run(run: RunFolder, overrides: list[str], ranks: int, steps: int) -> None:
    config = load_config(None, [*overrides, f"run.dir={run.path}"]).config
    data, batch = open_training_data(config), config.train.global_batch_size
    crcs = data.source.crc32(np.arange(data.samples))
    order = data.begin(seed=0, global_batch_size=batch)
    run.record("start", attempt=0, step=0, order=order.state.to_dict(), global_batch_size=batch, world_size=ranks)
    slots = [rank_slots(r, ranks, batch) for r in range(ranks)]
    writers = [LedgerWriter(run.ledger, r, attempt=0, first=a, last=b, batch=batch) for r, (a, b) in enumerate(slots)]
    state = order.state
    for step in range(1, steps + 1):
        positions = state.position + np.arange(batch)
        ids = order.sample_ids(state.epoch, positions)
        keys = key(positions, ids, crcs[ids], np.ones(batch, dtype=bool))
        for writer, (a, b) in zip(writers, slots):
            writer.add(step, state.epoch, state.position, int(keys[a:b].sum(dtype=np.uint64)))
        state = order.next_state(state)
    run.finished.write_text(f"step {steps}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=1_281_167)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "set").mkdir()
        write_dataset(root / "set", args.samples)
        overrides = [f"data.train={root / 'set'}", f"train.global_batch_size={args.batch}", "train.duration=1 epochs"]
        run = RunFolder(root / "run")
        begin = time.process_time()
        write_run(run, overrides, args.ranks, args.steps)
        written = time.process_time() - begin
        size = sum(f.stat().st_size for f in run.ledger.iterdir())
        config = load_config(None, [*overrides, f"run.dir={run.path}"]).config
        begin = time.process_time()
        report = audit(config, run)
        seconds = time.process_time() - begin
        assert report.faults == [] and report.steps == args.steps, report
        a_step, million = size / args.steps, 1_000_000 / args.steps
        print(f"{args.steps:,} steps of {args.batch:,} samples on {args.ranks} ranks, {args.samples:,} samples\n")
        print("| | a rank and step | a step | a million steps |")
        print("|---|---|---|---|")
        print(f"| ledger | {a_step / args.ranks:.1f} bytes | {a_step / 1000:.1f} kB | {a_step / 1000:.1f} GB |")
        print(f"| writing it | {written / args.steps / args.ranks * 1e6:.0f} µs | | |")
        print(f"| audit | | {seconds / args.steps * 1000:.1f} ms | {seconds * million / 3600:.1f} h |")


if __name__ == "__main__":
    main()
