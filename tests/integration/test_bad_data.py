"""Bad data and lost workers, end to end: what is masked, what ends the run, and that nothing hangs or stays behind."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Member, members, picture, png, shards_of, train, write_dataset
from mixer_process import (
    Mixer,
    assert_same_run,
    current_step,
    run_arguments,
    wait_for_progress,
)

from data_tools.errors import UserError
from data_tools.manifest import index_name
from pipeline.audit import audit
from pipeline.checkpoint.manager import committed_steps
from pipeline.config import load_config
from pipeline.data.feed import Feed
from pipeline.run import RunFolder, read_ledger, read_lines

SAMPLES, BATCH = 64, 16  # 4 steps an epoch; TINY trains 8
ALL_MAY_BE_BAD = "data.max_bad_fraction=1"


def make_set(folder: Path, samples: list[Member] | None = None, shards: int = 4) -> Path:
    samples = samples or members(SAMPLES)
    return write_dataset(folder, {"train": shards_of(samples, [len(samples) // shards] * shards)})


def masked(run: Path) -> list[tuple[int, str]]:
    """(sample id, why) of every masked slot of a run."""
    found = []
    for segments in read_ledger(run).values():
        for segment in segments:
            for m in segment.masked.values():
                found += [(sample_id, why) for _, sample_id, why in m]
    return sorted(found)


def assert_audited(run: Path) -> None:
    folder = RunFolder(run)
    assert audit(load_config(str(folder.config)).config, folder).faults == []


def raw_edit(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def test_a_flipped_bit_masks_one_sample(tmp_path):
    data = make_set(tmp_path / "set")
    raw_edit(data / "train-000001.tar", 512 + 60)
    assert train(tmp_path / "run", f"data.train={data}", ALL_MAY_BE_BAD) == 0
    assert [i for i, _ in masked(tmp_path / "run")] == [16, 16]  # once an epoch
    assert "train-000001.tar row 0: crc32" in masked(tmp_path / "run")[0][1]
    assert_audited(tmp_path / "run")


def test_undecodable_bytes_and_impossible_labels_mask_their_samples(tmp_path):
    samples = members(SAMPLES)
    samples[5] = Member(b"no image at all", 0)
    samples[40] = Member(png(picture(1)), 7)
    samples[41] = Member(png(picture(1)), -1)
    data = make_set(tmp_path / "set", samples)
    assert train(tmp_path / "run", f"data.train={data}", ALL_MAY_BE_BAD) == 0
    assert [i for i, _ in masked(tmp_path / "run")] == [5, 5, 40, 40, 41, 41]
    reasons = " ".join(why for _, why in masked(tmp_path / "run"))
    assert "row 5: cannot identify image" in reasons and "label 7 outside" in reasons and "label -1 outside" in reasons
    assert_audited(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncated", "replaced", "missing", "index"])
def test_a_corrupt_shard_fails_by_default_and_is_masked_on_request(tmp_path, damage):
    data = make_set(tmp_path / "set")
    path, run = data / "train-000002.tar", tmp_path / "run"
    if damage == "truncated":
        os.truncate(path, 3000)
    elif damage == "replaced":
        path.write_bytes((data / "train-000003.tar").read_bytes()[:4096])
    elif damage == "missing":
        path.unlink()
    else:
        (data / index_name(path.name)).write_bytes((data / index_name("train-000003.tar")).read_bytes())
    with pytest.raises(UserError, match=r"train-000002.*(manifest|missing)"):
        train(run, f"data.train={data}")
    if damage == "index":  # found at its first use: nothing is lost by then
        assert len(committed_steps(RunFolder(run).checkpoints)) == 1
    assert train(run, f"data.train={data}", "data.corrupt_shards=mask", ALL_MAY_BE_BAD) == 0
    bad = {i for i, _ in masked(run)}
    assert bad <= set(range(32, 48)) and len(bad) >= (10 if damage in ("truncated", "replaced") else 16)
    assert_audited(run)


def test_a_shard_cut_short_while_it_is_trained_on(tmp_path):
    from pipeline.data.source import Access, BadSample, TarSource
    from pipeline.data.store import DamagedShard

    data = make_set(tmp_path / "set")
    failing, masking = TarSource(data, "train"), TarSource(data, "train", access=Access(corrupt_shards="mask"))
    failing.read(0, 3), masking.read(0, 3)
    os.truncate(data / "train-000000.tar", 1024)
    with pytest.raises(DamagedShard, match=r"train-000000.tar ends before byte .*cut short"):
        failing.read(9, 3)
    with pytest.raises(BadSample, match="cut short"):
        masking.read(9, 3)


def test_bad_samples_alone_end_the_run_with_a_message(tmp_path):
    data = make_set(tmp_path / "set", [Member(b"nothing", 0)] * SAMPLES)
    with pytest.raises(UserError, match=r"16 samples could not be read, more than data.max_bad_fraction=0.0001 of 64"):
        train(tmp_path / "run", f"data.train={data}")
    assert len(committed_steps(RunFolder(tmp_path / "run").checkpoints)) == 1


def test_a_set_of_samples_with_several_labels_is_told_from_a_damaged_one(tmp_path):
    samples = [m._replace(label=-1) if i % 2 else m for i, m in enumerate(members(SAMPLES))]
    data = make_set(tmp_path / "set", samples)
    with pytest.raises(UserError, match=r"\(sample \d+: label -1 outside .*: it has no single class \(several labels"):
        train(tmp_path / "run", f"data.train={data}")


def test_fewer_samples_than_a_batch(tmp_path):
    data = make_set(tmp_path / "set", members(12), shards=2)
    with pytest.raises(UserError, match=r"has 12 samples, fewer than train.global_batch_size=16: lower it to at most"):
        train(tmp_path / "run", f"data.train={data}")


def test_a_consumer_that_stops_early_leaves_no_process(tmp_path):
    from pipeline.data.augment import TrainTransform
    from pipeline.data.loader import Share, TrainSamples, train_batches
    from pipeline.data.order import SampleOrder
    from pipeline.data.source import TarSource

    source = TarSource(make_set(tmp_path / "set"), "train")
    samples = TrainSamples(source, TrainTransform(8, 0), channels=3, num_classes=3)
    order = SampleOrder(source.shard_sizes, manifest_sha=source.digest, seed=0, global_batch_size=BATCH)
    feed = Feed(lambda: train_batches(samples, order, Share.of(0, 1, BATCH, None), num_workers=2))
    first = feed.next()
    assert isinstance(first, list)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    again = feed.next()  # from where the order stands: it was not moved on
    while isinstance(again, list) and not np.array_equal(again[0].ids, first[0].ids):
        again = feed.next()  # batches that were ready when the worker died
    assert isinstance(again, list) and np.array_equal(again[0].images, first[0].images)
    feed.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_does_not_start_is_lost_and_the_loader_made_anew(tmp_path, monkeypatch):
    """It inherited a lock which nobody will release in it."""
    from pipeline.data import workers
    from pipeline.data.augment import TrainTransform
    from pipeline.data.loader import Share, TrainSamples, eval_batches, train_batches
    from pipeline.data.order import SampleOrder
    from pipeline.data.synthetic import SyntheticSource

    held = threading.Lock()
    held.acquire()

    def hang_once() -> None:
        with suppress(FileExistsError):
            (tmp_path / "hung").touch(exist_ok=False)
            faulthandler.disable()  # its stack would look like a failure among the tests' output
            held.acquire(timeout=60)

    monkeypatch.setattr(workers, "START_SECONDS", 3.0)
    monkeypatch.setattr(workers, "die_with_parent", hang_once)
    samples = TrainSamples(
        SyntheticSource("train", image_size=8, num_classes=3), TrainTransform(8, 0), channels=3, num_classes=3
    )
    order = SampleOrder([64], manifest_sha="", seed=0, global_batch_size=BATCH)
    share, said = Share.of(0, 1, BATCH, None), []
    feed = Feed(lambda: train_batches(samples, order, share, num_workers=2), said.append)
    got = feed.next()
    feed.close()
    assert len(said) == 1 and "did not start within 3 s" in said[0] and "starting the loader again" in said[0]
    expected = next(train_batches(samples, order, share, num_workers=0))
    assert isinstance(got, list) and np.array_equal(got[0].images, expected[0].images)
    batches = eval_batches(samples, rank=0, world_size=1, batch_size=4, num_workers=2)
    first = [b.images for b in batches]
    (tmp_path / "hung").unlink()
    assert np.array_equal(np.concatenate(first), np.concatenate([b.images for b in batches])), "a second pass"


def test_a_feed_closed_while_it_waits_makes_no_new_loader():
    from pipeline.data.augment import TrainTransform
    from pipeline.data.loader import Share, TrainSamples, train_batches
    from pipeline.data.order import SampleOrder
    from pipeline.data.synthetic import SyntheticSource

    class Hanging(SyntheticSource):
        def read(self, sample_id: int, channels: int, shrink: Any = None) -> Any:
            time.sleep(600)

    samples = TrainSamples(
        Hanging("train", image_size=8, num_classes=3), TrainTransform(8, 0), channels=3, num_classes=3
    )
    order = SampleOrder([64], manifest_sha="", seed=0, global_batch_size=BATCH)
    made, said = [], []

    def make() -> Any:
        made.append(True)
        return train_batches(samples, order, Share.of(0, 1, BATCH, None), num_workers=2)

    feed = Feed(make, said.append)
    assert feed.next(give_up=lambda: len(multiprocessing.active_children()) == 2) is None
    feed.close()
    assert multiprocessing.active_children() == [] and said == [] and len(made) == 1


# --------------------------------------------------------------------------------------- real processes, slow


STEPS = 40


def run_set(folder: Path) -> Path:
    samples = [Member(png(picture(i, 20, 20)), i % 10) for i in range(200)]
    return write_dataset(folder, {"train": shards_of(samples, [50] * 4)}, classes=10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("undisturbed")
    mixer = launch(base / "run", data, stretch=0)
    assert mixer.wait(300) == 0, mixer.output()
    return base / "run"


def launch(run: Path, data: Path, *extra: str, stretch: float = 0.01) -> Mixer:
    arguments = run_arguments(run, f"data.train={data}", f"train.duration={STEPS} steps", *extra)
    return Mixer(["launch", "local", *arguments, "--nproc", "2"], run.parent, stretch=stretch)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_changes(tmp_path, data, undisturbed):
    run = tmp_path / "run"
    mixer = launch(run, data, stretch=0.03)
    for _ in range(2):
        wait_for_progress(mixer, run, 0, steps=current_step(run)[1] + 3)
        os.kill(mixer.worker(0), signal.SIGKILL)
    assert mixer.wait() == 0, mixer.output()
    assert "starting the loader again" in mixer.output() and "Traceback" not in mixer.output()
    assert sum(e["event"] in ("start", "resume") for e in read_lines(RunFolder(run).events)) == 1
    assert_same_run(run, undisturbed, STEPS)
    assert mixer.all_gone(5)


@pytest.mark.slow
def test_a_worker_that_hangs_is_noticed_and_the_run_goes_on(tmp_path, data, undisturbed):
    run = tmp_path / "run"
    mixer = launch(run, data, "health.timeout=5 s", "data.read_timeout=0 s", stretch=0.03)
    wait_for_progress(mixer, run, 0)
    os.kill(mixer.worker(0), signal.SIGSTOP)
    assert mixer.wait(240) == 0, mixer.output()
    assert "no step for" in mixer.output()
    assert_same_run(run, undisturbed, STEPS)
    assert mixer.all_gone(5), mixer.processes()


@pytest.mark.slow
def test_a_shard_that_is_cut_short_under_way_ends_the_run_saved(tmp_path, undisturbed):
    data, run = run_set(tmp_path / "set"), tmp_path / "run"
    whole = {p: p.read_bytes() for p in data.glob("*.tar")}
    mixer = launch(run, data, stretch=0.03)
    wait_for_progress(mixer, run, 0)
    for path in whole:
        os.truncate(path, 2048)
    assert mixer.wait(120) == 1, mixer.output()
    assert "cut short" in mixer.output() and "saved at step" in mixer.output()
    assert committed_steps(RunFolder(run).checkpoints)[-1] == current_step(run)[1]
    for path, content in whole.items():
        path.write_bytes(content)
    again = Mixer(["resume", str(run)], tmp_path)
    assert again.wait() == 0, again.output()
    assert_same_run(run, undisturbed, STEPS)
