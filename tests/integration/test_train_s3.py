"""Training from an object store: a real server on loopback, and what happens when it, or a process, goes away."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Member, picture, png, shards_of, write_dataset
from mixer_process import (
    Mixer,
    assert_same_run,
    attempts,
    current_step,
    history,
    poll,
    run_arguments,
    wait_for_progress,
)
from s3_server import S3Server

from pipeline.checkpoint.manager import committed_steps
from pipeline.cli import run_audit
from pipeline.run import RunFolder, read_ledger, read_lines

pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytestmark = [pytest.mark.s3, pytest.mark.slow]

STEPS = 60
OUTAGE_SECONDS = float(os.environ.get("MIXER_TEST_OUTAGE", "60"))  # of the longest outage that a run stalls through
SAMPLES = 480  # 36 steps of 13 an epoch


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [Member(png(picture(i, 48, 48)), i % 10) for i in range(SAMPLES)]
    folder = tmp_path_factory.mktemp("set")
    return write_dataset(folder, {"train": shards_of(samples, [60] * 8), "val": [samples[:20]]}, classes=10)


@pytest.fixture(scope="module")
def undisturbed(local: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run from local files."""
    base = tmp_path_factory.mktemp("undisturbed")
    mixer = Mixer(["launch", "local", *run_arguments(base / "run", *settings(local)), "--nproc", "2"], base, stretch=0)
    assert mixer.wait(300) == 0, mixer.output()
    return base / "run"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, local: Path) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.client().create_bucket(Bucket="sets")
    for path in local.iterdir():
        server.client().put_object(Bucket="sets", Key=f"a/{path.name}", Body=path.read_bytes())
    yield server
    server.kill()


@pytest.fixture
def server(stored: S3Server) -> Iterator[S3Server]:
    yield stored
    stored.kill()
    stored.start()


def settings(where: Path | str) -> list[str]:
    return [f"data.train={where}", "data.chunk=4", "data.window=8", f"train.duration={STEPS} steps"]


def from_store(server: S3Server, cache: Path, *more: str) -> list[str]:
    return [
        *settings("s3://sets/a"),
        f"data.storage_options={json.dumps(server.options)}",
        f"data.cache_dir={cache}",
        *more,
    ]


def start(run: Path, *extra: str, nproc: int = 2, stretch: float = 0.01) -> Mixer:
    command = ["launch", "local", *run_arguments(run, *extra), "--nproc", str(nproc)]
    return Mixer(command, run.parent, stretch=stretch)


def prefetchers(mixer: Mixer) -> list[int]:
    return [pid for pid, command in mixer.processes().items() if "pipeline.data.prefetch" in command]


def on_disk(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:  # evicted meanwhile
                continue
    return total


def facts(cache: Path) -> dict[str, int]:
    """What the prefetcher of the only cache says of itself."""
    try:
        return json.loads(next(cache.glob("*/beat")).read_text())
    except (OSError, ValueError, StopIteration):
        return {}


def test_the_same_run_from_a_store_through_a_cache_that_stays_below_its_limit(server, undisturbed, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    refused = start(run, *from_store(server, cache, "data.cache_size=100KiB"))
    assert refused.wait() == 1
    said = next(line for line in refused.output().splitlines() if "data.cache_size" in line)
    needed = said.split("set data.cache_size=")[1].split()[0]  # what the message tells to write
    mixer = start(run, *from_store(server, cache, f"data.cache_size={needed}"))
    most, seen = 0, {}
    while mixer.process.poll() is None:
        most, seen = max(most, on_disk(cache)), facts(cache) or seen
        time.sleep(0.02)
    assert mixer.wait() == 0, mixer.output()
    assert_same_run(run, undisturbed, STEPS)
    limit = int(needed.removesuffix("MiB")) * 2**20
    assert 0 < most <= limit
    assert seen["fetched"] > 8 and seen["evicted"] > 0
    assert list(cache.iterdir()) == []  # nothing is left after an orderly end
    assert mixer.all_gone(5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "size", "seconds"), [(0, "0", 16.0), (2, "4MiB", OUTAGE_SECONDS)])
def test_an_outage_stalls_and_loses_nothing(server, undisturbed, tmp_path, workers, size, seconds):
    """The watchdog, set to less than the outage, leaves the run alone, and the audit finds every sample."""
    run, budget = tmp_path / "run", 2 * seconds + 60
    more = [f"data.num_workers={workers}", "health.timeout=4 s", f"data.read_timeout={budget} s"]
    mixer = start(run, *from_store(server, tmp_path / "cache", *more, f"data.cache_size={size}"))
    wait_for_progress(mixer, run, 0)
    server.kill()
    time.sleep(seconds - 4)
    stalled = current_step(run)
    time.sleep(4)
    assert mixer.process.poll() is None and current_step(run) == stalled
    server.start()
    assert mixer.wait(180 + seconds) == 0, mixer.output()
    assert attempts(run) == 1
    assert_same_run(run, undisturbed, STEPS)
    assert not any(segment.masked for segments in read_ledger(run).values() for segment in segments)
    assert run_audit(str(run), []) == 0


def test_a_store_that_stays_away_ends_the_run_with_a_checkpoint(server, undisturbed, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    mixer = start(run, *from_store(server, cache, "data.read_timeout=3 s", "data.cache_size=4MiB"))
    wait_for_progress(mixer, run, 0)
    server.kill()
    assert mixer.wait(120) == 75, mixer.output()
    lines = [line for line in mixer.output().splitlines() if line.startswith("error")]
    assert lines and "cannot read s3://sets/a/" in lines[0] and "data.read_timeout" in lines[0]
    assert "Traceback" not in mixer.output()
    step = current_step(run)[1]
    assert committed_steps(RunFolder(run).checkpoints)[-1] == step
    assert RunFolder(run).read_status()["state"] == "saved"
    assert mixer.all_gone(10), mixer.processes()
    assert list(cache.iterdir()) == []
    server.start()
    again = Mixer(["resume", str(run)], tmp_path)
    assert again.wait(120) == 0, again.output()
    assert_same_run(run, undisturbed, STEPS)


def test_a_signal_during_an_outage_saves_at_once(server, undisturbed, tmp_path):
    run = tmp_path / "run"
    mixer = start(run, *from_store(server, tmp_path / "cache", "data.read_timeout=10 min"))
    wait_for_progress(mixer, run, 0)
    server.kill()
    assert poll(lambda: not _advances(run), 60)
    os.kill(mixer.process.pid, signal.SIGTERM)
    assert mixer.wait(60) == 75, mixer.output()
    assert committed_steps(RunFolder(run).checkpoints)[-1] == current_step(run)[1]
    assert mixer.all_gone(10), mixer.processes()
    server.start()
    again = Mixer(["resume", str(run)], tmp_path)
    assert again.wait(120) == 0, again.output()
    assert_same_run(run, undisturbed, STEPS)


def _advances(run: Path) -> bool:
    before = current_step(run)
    time.sleep(3)
    return current_step(run) != before


def test_the_prefetcher_is_killed_and_then_everything(server, undisturbed, tmp_path):
    """Readers help themselves; another prefetcher starts; a killed run leaves a cache that its successor takes over,
    and one of another run that is removed."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    host = os.uname().nodename
    (cache / f"mixer-cache-{host}-dead-0").mkdir()
    (cache / f"mixer-cache-{host}-dead-0" / "chunk").write_bytes(b"x" * 1000)
    (cache / f"mixer-cache-{host}-dead-0.lock").touch()
    mixer = start(run, *from_store(server, cache, "data.cache_size=4MiB"), stretch=0.02)
    wait_for_progress(mixer, run, 0)
    assert not list(cache.glob("*dead*"))
    first = prefetchers(mixer)
    assert len(first) == 1  # one a node, whatever the number of ranks
    os.kill(first[0], signal.SIGKILL)
    assert poll(lambda: prefetchers(mixer) not in ([], first), 30), mixer.output()
    wait_for_progress(mixer, run, 0, steps=current_step(run)[1] + 3)
    mixer.kill()
    assert mixer.all_gone(5) and len(list(cache.glob("mixer-cache-*-0"))) == 1
    held = {p.name for p in next(cache.glob("mixer-cache-*-0")).iterdir() if p.stat().st_size and "." in p.name[1:]}
    assert held
    again = Mixer(["resume", str(run)], tmp_path, stretch=0.02)
    wait_for_progress(again, run, 1, steps=1)
    assert held & {p.name for p in next(cache.glob("mixer-cache-*-0")).iterdir() if p.stat().st_size}
    os.kill(again.rank(1), signal.SIGKILL)  # the launcher starts all anew
    assert again.wait(180) == 0, again.output()
    assert_same_run(run, undisturbed, STEPS)
    assert list(cache.iterdir()) == [] and again.all_gone(5)


def test_a_damaged_cache_is_read_around(server, undisturbed, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    mixer = start(run, *from_store(server, cache, "data.cache_size=4MiB"), stretch=0.02)
    damaged = 0
    while mixer.process.poll() is None:
        for path in cache.glob("*/*.*.*.*"):
            try:
                raw = bytearray(path.read_bytes())
                if len(raw) > 600 and damaged % 2:
                    raw[-100] ^= 1
                path.write_bytes(raw[:500] if damaged % 2 == 0 else raw)
                damaged += 1
            except OSError:
                continue
        time.sleep(0.2)
    assert mixer.wait() == 0, mixer.output()
    assert damaged > 5
    assert_same_run(run, undisturbed, STEPS)


def test_a_shard_missing_in_the_store(server, undisturbed, tmp_path):
    """It is found at the start; lost in the middle it ends the run with a checkpoint."""
    client = server.client()
    name = "a/train-000005.tar"
    body = client.get_object(Bucket="sets", Key=name)["Body"].read()
    try:
        client.delete_object(Bucket="sets", Key=name)
        run = tmp_path / "run"
        refused = start(run, *from_store(server, tmp_path / "cache"))
        assert refused.wait() == 1
        assert "s3://sets/a/train-000005.tar is missing; the manifest lists it" in refused.output()
        client.put_object(Bucket="sets", Key=name, Body=body)
        mixer = start(run, *from_store(server, tmp_path / "cache", "data.cache_size=0", "data.read_timeout=3 s"))
        wait_for_progress(mixer, run, 0)
        client.delete_object(Bucket="sets", Key=name)
        assert mixer.wait(120) == 1, mixer.output()
        assert "train-000005.tar is missing" in mixer.output() and "saved at step" in mixer.output()
        assert committed_steps(RunFolder(run).checkpoints)[-1] == current_step(run)[1]
    finally:
        client.put_object(Bucket="sets", Key=name, Body=body)
    again = Mixer(["resume", str(run)], tmp_path)
    assert again.wait(120) == 0, again.output()
    assert_same_run(run, undisturbed, STEPS)


def test_checkpoints_in_a_store_that_goes_away(server, local, undisturbed, tmp_path):
    """Where the store is out of reach a start says so; a restart after a lost process waits for it."""
    run = tmp_path / "run"
    options = {k: v for k, v in server.options.items() if isinstance(v, str)}
    where = ["checkpoint.dir=s3://sets/saved", f"checkpoint.storage_options={json.dumps(options)}"]
    training = [*settings(local), *where]
    server.kill()
    refused = start(run, *training)
    assert refused.wait() == 1, refused.output()
    assert "s3://sets/saved is out of reach" in refused.output() and "mixer resume" in refused.output()
    assert "Traceback" not in refused.output() and "unexpected" not in refused.output()
    server.start()
    mixer = start(run, *training, stretch=0.02)
    wait_for_progress(mixer, run, 0)
    assert poll(lambda: any(e["event"] == "save" for e in read_lines(run / "events.jsonl"))), mixer.output()
    server.kill()
    os.kill(mixer.rank(1), signal.SIGKILL)
    assert poll(lambda: "is out of reach" in mixer.output()), mixer.output()
    server.start()
    assert mixer.wait(180) == 0, mixer.output()
    assert "a training process died; restarting from step" in mixer.output()
    assert history(run) == history(undisturbed)
