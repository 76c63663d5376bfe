"""How well samples are mixed, measured on a corpus that is sorted by class: ours, webdataset's shuffle, a permutation.

    python benchmarks/bench_shuffle.py [--samples 1281167] [--classes 1000] [--batch 4096]

Three figures over the batches of one epoch:
- chi2/dof of a batch's classes against the corpus' (1: like a draw at random; above: batches lack classes);
- lag-1: correlation of one batch's deviations of classes with the next one's (0: none; 1: the same classes stay on);
- pairs: how often two samples of a batch come from the same 64 neighbours of the corpus, over what chance gives (1).

webdataset is the library itself, arranged as its documentation does: shards split by node and worker, a shard shuffle
of 100, then `.shuffle(N)` over samples, on 8 ranks of 8 workers each; a rank's batch comes whole from one worker after
the other. In its last row, samples pass a second shuffle of 1,000 behind the loader. Shards hold 1,000 samples; what
they would have to be read from is left out, for it changes no order. Every epoch has the same number of whole batches.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator

import numpy as np
import webdataset as wds

from pipeline.data.order import SampleOrder

RANKS, WORKERS, SHARD = 8, 8, 1000


def measures(ids: np.ndarray, n: int, classes: int) -> tuple[float, float, float]:
    """(chi2/dof, lag-1, pairs) of `ids` [batches, B], sample ids of a corpus sorted by class."""
    batches, b = ids.shape
    label = ids * classes // n
    share = np.bincount(np.arange(n) * classes // n, minlength=classes) / n
    counts = np.stack([np.bincount(row, minlength=classes) for row in label])
    deviation = counts - b * share
    chi2 = (deviation**2 / (b * share)).sum() / (batches * (classes - 1))
    lag = np.mean([np.corrcoef(deviation[t], deviation[t + 1])[0, 1] for t in range(batches - 1)])
    runs = [np.bincount(row // 64) for row in ids]
    same = sum((r * (r - 1) // 2).sum() for r in runs) / (batches * b * (b - 1) / 2)
    return float(chi2), float(lag), float(same / ((64 - 1) / (n - 1)))


def ours(n: int, batch: int, chunk: int = 16, window: int = 64, lanes: int | None = None) -> np.ndarray:
    sizes = [min(SHARD, n - i) for i in range(0, n, SHARD)]
    order = SampleOrder(
        sizes, manifest_sha="", seed=1, global_batch_size=batch, chunk=chunk, window=window, lanes=lanes
    )
    steps = order.steps_per_epoch
    return np.stack([order.sample_ids(0, t * batch + np.arange(batch)) for t in range(steps)])


def permutation(n: int, batch: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(n)[: n // batch * batch].reshape(-1, batch)


def worker_stream(n: int, rank: int, worker: int, buffer: int) -> np.ndarray:
    """Sample ids in the order in which one of webdataset's workers yields them."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), WORKER=str(worker), NUM_WORKERS=str(WORKERS))

    def samples(shards: Iterator[dict]) -> Iterator[int]:
        for shard in shards:
            first = int(shard["url"])
            yield from range(first, min(first + SHARD, n))

    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(first) for first in range(0, n, SHARD)]),
        wds.split_by_node,
        wds.split_by_worker,
        wds.shuffle(100, rng=random.Random(rank * WORKERS + worker)),
        samples,
        wds.shuffle(buffer, rng=random.Random(1000 + rank * WORKERS + worker)),
    )
    return np.fromiter(pipeline, dtype=np.int64)


def webdataset(n: int, batch: int, buffer: int, behind: int = 0) -> np.ndarray:
    """Global batches [batches, B]; `behind`: buffer of a second shuffle, after the loader."""
    per_rank = batch // RANKS
    ranks = []
    for rank in range(RANKS):
        streams = [worker_stream(n, rank, worker, buffer) for worker in range(WORKERS)]
        piece = 64 if behind else per_rank  # what the loader hands over at once
        rounds = min(len(s) for s in streams) // piece
        line = np.concatenate([s[i * piece : (i + 1) * piece] for i in range(rounds) for s in streams])
        if behind:
            again = wds.DataPipeline(
                lambda line=line: iter(line.tolist()), wds.shuffle(behind, rng=random.Random(rank))
            )
            line = np.fromiter(again, dtype=np.int64)
        ranks.append(line[: len(line) // per_rank * per_rank].reshape(-1, per_rank))
    steps = min(map(len, ranks))
    return np.concatenate([r[:steps] for r in ranks], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4096)
    args = parser.parse_args()
    n, b = args.samples, args.batch
    print(f"{n:,} samples sorted by {args.classes:,} classes, batches of {b:,}\n")
    print("| order | chi2/dof | lag-1 | pairs | samples delivered |")
    print("|---|---|---|---|---|")
    rows = {
        "a permutation of all samples": lambda: permutation(n, b),
        "ours, chunks of 16, windows of 64 (the default)": lambda: ours(n, b),
        "ours, chunks of 64": lambda: ours(n, b, chunk=64),
        "ours, data.lanes = B/4": lambda: ours(n, b, lanes=b // 4),
        "webdataset, shuffle(1000)": lambda: webdataset(n, b, 1000),
        "webdataset, shuffle(5000)": lambda: webdataset(n, b, 5000),
        "webdataset, shuffle(5000), shuffle(1000) behind the loader": lambda: webdataset(n, b, 5000, 1000),
    }
    for name, make in rows.items():
        ids = make()
        assert len(np.unique(ids)) == ids.size  # nothing twice
        chi2, lag, pairs = measures(ids, n, args.classes)
        print(f"| {name} | {chi2:.2f} | {lag:+.3f} | {pairs:.2f} | {ids.size / n:.1%} |", flush=True)


if __name__ == "__main__":
    main()
