"""What a loader with workers takes, and gives back: processes, memory, descriptors."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import members, script, write_dataset

from pipeline.data.augment import EvalTransform, TrainTransform
from pipeline.data.buffers import BufferPool, received
from pipeline.data.loader import Share, TrainSamples, eval_batches, train_batches
from pipeline.data.mixup import MixUp
from pipeline.data.order import SampleOrder
from pipeline.data.source import TarSource

SIZE, BATCH = 64, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("set"), {"train": [members(50)]})


def stream(folder: Path, *, workers: int = 2, micro: int = 8, mixup: MixUp | None = None):
    source = TarSource(folder, "train")
    samples = TrainSamples(source, TrainTransform(SIZE, 0), channels=3, num_classes=3)
    order = SampleOrder(source.shard_sizes, manifest_sha="", seed=0, global_batch_size=BATCH)
    return train_batches(samples, order, Share.of(0, 1, BATCH, micro), num_workers=workers, mixup=mixup)


def workers() -> set[int]:
    return {p.pid for p in multiprocessing.active_children() if p.pid}


def own_memory() -> int:
    """Bytes of this process and its workers, without files: shared pages counted once."""
    total = 0
    for pid in (os.getpid(), *workers()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1]) * 1024
    return total


def test_batches_that_are_kept_stay_as_they_were(folder):
    """However many: when there is no free buffer, fresh memory is taken."""
    plain = [b for step in islice(stream(folder, workers=0), 30) for b in step]
    kept = [b for step in islice(stream(folder), 30) for b in step]
    assert len({b.images.data_ptr() for b in kept}) == 60
    for a, b in zip(plain, kept):
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids)


@pytest.mark.parametrize("mixup", [None, MixUp(0.5, 16, 0)])
def test_few_buffers_are_used_again_and_again(folder, mixup):
    places = [b.images.data_ptr() for step in islice(stream(folder, mixup=mixup), 60) for b in step]
    assert len(set(places)) <= 2 * 2 + 4


def test_reading_ahead_does_not_grow_with_workers_times_accumulation(folder):
    """8 micro-batches a step, 4 workers: two steps ahead, two held, however many workers."""
    places = [b.images.data_ptr() for step in islice(stream(folder, workers=4, micro=2), 20) for b in step]
    assert len(set(places)) <= 2 * 8 + 2 * 8


def test_a_view_keeps_its_buffer():
    pool = BufferPool(2, 100)
    first, second, none = pool.take(), pool.take(), pool.take()
    assert {first, second} == {0, 1} and none is None and first is not None
    tensor = received(*pool.handle(first, (2, 5, 10)))
    part = tensor[1, 2:]
    array = part.numpy()
    del tensor, part
    gc.collect()
    assert pool.take() is None
    del array
    gc.collect()
    assert pool.take() == first and pool.take() is None


def test_memory_does_not_grow_over_epochs(folder):
    """12 MB of images go through it in each of five measurements: 20 epochs of 3 steps of 16 images of 12 KB."""
    batches, found = stream(folder), []
    for _ in range(5):
        for _ in islice(batches, 60):
            pass
        gc.collect()
        found.append((own_memory(), workers()))
    pids = found[0][1]
    assert len(pids) == 2 and all(p == pids for _, p in found)  # not started anew at any epoch's end
    # At first workers come to have copies of what they inherited: reference counts are written to. They inherit what
    # the tests before left behind as well; a leak of every fourth image would show.
    assert max(m for m, _ in found[3:]) - found[2][0] < 6_000_000


def test_a_consumer_that_stops_early_leaves_nothing_behind(folder):
    def state() -> tuple[set[int], int, int, set[str]]:
        descriptors = len(os.listdir("/proc/self/fd"))
        shared = {n for n in os.listdir("/dev/shm") if str(os.getpid()) in n}
        return workers(), threading.active_count(), descriptors, shared

    next(stream(folder))  # what only the first use of multiprocessing opens
    gc.collect()
    before = state()
    for steps in (1, 2, 7):
        batches = stream(folder)
        for _ in islice(batches, steps):
            pass
        assert len(workers()) == 2
        batches.close()
        del batches
        gc.collect()
    deadline = time.monotonic() + 10
    while state() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state() == before


def test_a_loader_that_nobody_closed_does_not_hold_up_the_end_of_python(folder):
    """Workers ignore SIGTERM, so that a signal to the process group does not take them from a run that is saving."""
    code = """
from pathlib import Path
from test_loader_memory import stream, workers
batches = stream(Path(sys.argv[1]))
next(batches)
print(*workers(), flush=True)
forever = [batches]; forever.append(forever)
raise SystemExit(3)
"""
    command = script(code, folder, PYTHONPATH="")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 3, done.stderr
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("restarts", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_an_evaluation_survives_a_lost_worker(folder, monkeypatch, restarts):
    """Its batches are made again; a rank that loses too many goes on to the end, and says so."""
    monkeypatch.setattr("pipeline.data.loader.MAX_RESTARTS", restarts)
    samples = TrainSamples(TarSource(folder, "train"), EvalTransform(SIZE), channels=3, num_classes=3)
    batches = list(killing_the_first_worker(eval_batches(samples, rank=0, world_size=1, batch_size=2, num_workers=1)))
    assert [i for b in batches for i in b.ids.tolist()] == list(range(50)) and not workers()
    assert ("loader worker" in str(batches[-1].failure)) == (restarts == 0)
    assert all(b.failure is None and b.weights.all() for b in batches) == (restarts > 0)


def killing_the_first_worker(batches):
    for number, batch in enumerate(batches):
        yield batch
        if number == 0:
            [worker] = workers()
            os.kill(worker, signal.SIGKILL)


def test_evaluation_with_workers_uses_buffers_too(folder):
    source = TarSource(folder, "train")
    samples = TrainSamples(source, EvalTransform(SIZE), channels=3, num_classes=3)
    loader = eval_batches(samples, rank=0, world_size=1, batch_size=2, num_workers=2)
    assert len(loader) == 25
    places, seen = set(), []
    for _ in range(2):
        for batch in loader:
            places.add(batch.images.data_ptr())
            seen += batch.ids.tolist()
            assert torch.equal(batch.images[1], samples.row(0, int(batch.ids[1])).image)
        assert not workers()
    assert seen == 2 * list(range(50))
    assert len(places) <= 2 * 2 + 2
    assert np.array_equal(np.unique(seen), np.arange(50))
