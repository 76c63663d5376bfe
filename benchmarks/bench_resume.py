"""What resuming costs: the first batch at 90% of an epoch against the first batch at its start.

    python benchmarks/bench_resume.py [--samples 60000] [--batch 256] [--repetitions 25]

Writes a data set of small JPEGs, opens it as a training does (manifest, order at a stored state, loader), and takes
the time to the first batch: in this process (processor time), and with one worker, which has to start (wall clock).
One set and a mixture of two. Repetitions of both positions take turns; best of them. Wanted: a ratio of at most 1.1.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import xxhash

from data_tools import ustar
from data_tools.index import index_bytes
from data_tools.manifest import MANIFEST_NAME, DatasetManifest, ShardInfo, index_name
from pipeline.config import load_config
from pipeline.data.loader import Share, TrainSamples, train_batches
from pipeline.inputs import open_training_data, train_transform

SHARD = 2000


def write_dataset(folder: Path, samples: int) -> Path:
    rng = np.random.default_rng(0)
    images = [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1))
        )
        for _ in range(200)
    ]
    folder.mkdir()
    infos = []
    for number, first in enumerate(range(0, samples, SHARD)):
        tar, rows = bytearray(), []
        for i in range(first, min(first + SHARD, samples)):
            data = images[i % len(images)]
            tar += ustar.header(f"{i:09d}.jpg", len(data))
            rows.append((i, len(tar), len(data), zlib.crc32(data), i % 2, 64, 64))
            tar += data + ustar.padding(len(data))
        tar += ustar.END
        name, index = f"train-{number:06d}.tar", index_bytes(rows)
        (folder / name).write_bytes(tar)
        (folder / index_name(name)).write_bytes(index)
        digest = xxhash.xxh3_128_hexdigest
        infos.append(ShardInfo(name, len(rows), len(tar), digest(bytes(tar)), digest(index)))
    (folder / MANIFEST_NAME).write_text(DatasetManifest({"train": infos}, ["a", "b"]).to_json())
    return folder


def first_batch(overrides: list[str], state: dict[str, Any], workers: int) -> float:
    """Seconds from nothing to the first batch at a stored state."""
    clock = time.perf_counter if workers else time.process_time
    begin = clock()
    config = load_config(None, overrides).config
    data, batch = open_training_data(config), config.train.global_batch_size
    order = data.resume(state, global_batch_size=batch)
    samples = TrainSamples(data.source, train_transform(config), channels=3, num_classes=2, seed=0)
    batches = train_batches(samples, order, Share.of(0, 1, batch, None), num_workers=workers)
    next(batches)
    seconds = clock() - begin
    batches.close()  # type: ignore[attr-defined]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        a, b = (write_dataset(Path(name) / n, args.samples // 2) for n in "ab")
        whole = write_dataset(Path(name) / "whole", args.samples)
        sets = {"one set": f"{whole}", "a mixture": f"[{{path: {a}, weight: 0.7}}, {{path: {b}, weight: 0.3}}]"}
        print(f"{args.samples:,} samples, batches of {args.batch}: time to the first batch, ms\n")
        print("| data | workers | at the start | at 90% of the epoch | ratio |")
        print("|---|---|---|---|---|")
        for (kind, path), workers in itertools.product(sets.items(), (0, 1)):
            overrides = [f"data.train={path}", f"train.global_batch_size={args.batch}", "train.duration=1 epochs"]
            overrides += ["model.image_size=32"]
            config = load_config(None, overrides).config
            order = open_training_data(config).begin(seed=0, global_batch_size=args.batch)
            state = replace(order.state, position=int(0.9 * order.steps_per_epoch) * args.batch)
            states = [order.state.to_dict(), state.to_dict()]
            best = [float("inf")] * 2
            for _ in range(args.repetitions):
                for i, stored in enumerate(states):
                    best[i] = min(best[i], first_batch(overrides, stored, workers))
            print(
                f"| {kind} | {workers} | {best[0] * 1000:.0f} | {best[1] * 1000:.0f} | {best[1] / best[0]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
