"""Sharding on a real local Ray: the bytes of the local engine, also when workers or the driver are killed."""

import os
import signal
from pathlib import Path

import pytest
from corpora import make_corpus, markers, repeated, run, set_files, start, wait_until

from data_tools.engines import ShardOptions, shard_corpus

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 1200, side=120)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    shard_corpus(ShardOptions(corpus, out, max_samples=20, workers=2))
    return set_files(out)


def ray_workers(driver: int) -> list[int]:
    """Ray's processes of this driver that are packing now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::pack_one") and driver in ancestors(int(entry.name)):
            found.append(int(entry.name))
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        found.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def test_a_killed_ray_worker_is_replaced_and_the_bytes_are_the_same(corpus, undisturbed, tmp_path):
    out = tmp_path / "out"
    driver = start("shard", corpus, out, "--max-samples", 20, "--engine", "ray", "--workers", 2)
    killed = []

    def kill_one() -> bool:
        for pid in ray_workers(driver.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return bool(killed)

    wait_until(lambda: markers(out) >= 3, driver, 120)
    wait_until(kill_one, driver)
    _, error = driver.communicate(timeout=200)
    assert driver.returncode == 0, error
    assert set_files(out) == undisturbed


def test_a_killed_driver_takes_ray_along_and_the_local_engine_finishes(corpus, undisturbed, tmp_path):
    out = tmp_path / "out"
    driver = start("shard", corpus, out, "--max-samples", 20, "--engine", "ray", "--workers", 2)
    wait_until(lambda: markers(out) >= 3, driver, 120)
    workers = ray_workers(driver.pid)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert "images were done before" in run("shard", corpus, out, "--max-samples", 20)
    assert set_files(out) == undisturbed


def test_trouble_in_a_task_is_said_as_the_local_engine_says_it(tmp_path):
    corpus = make_corpus(tmp_path / "in", 40)
    (corpus / "class0" / "00000.jpg").write_bytes(b"no image")
    error = run("shard", corpus, tmp_path / "out", "--max-samples", 10, "--engine", "ray", "--workers", 1, code=1)
    assert "1 of 40 images are bad" in error and "Traceback" not in error


def test_contents_are_hashed_on_ray_as_well(tmp_path):
    corpus, options = repeated(tmp_path / "in"), ["--dedupe", "exact", "--max-samples", 2000, "--workers", 2]
    run("shard", corpus, tmp_path / "local", *options)
    run("shard", corpus, tmp_path / "ray", *options, "--engine", "ray")
    assert set_files(tmp_path / "ray") == set_files(tmp_path / "local")
    assert set_files(tmp_path / "ray")["duplicates.jsonl"].count(b"\n") == 4400
