"""Sharding on a real local Ray: the bytes of the local engine, also when workers or the driver are killed."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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


@pytest.fixture
def cluster(tmp_path):
    """A Ray that was there before; yields what a driver's environment needs to join it."""
    ray = str(Path(sys.executable).with_name("ray"))
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # sockets below pytest's own folder would have too long names
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--block",
               "--node-ip-address=127.0.0.1", f"--temp-dir={folder}",
               "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
    join = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **join}
    del env["RAY_ADDRESS"]
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        wait_until(lambda: reachable(port), head, 60)
        yield join
    finally:
        head.terminate()  # with --block it takes the others along
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def reachable(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_a_cluster_that_is_there_is_joined_and_stays(cluster, tmp_path):
    corpus = make_corpus(tmp_path / "in", 60)
    run("shard", corpus, tmp_path / "local", "--max-samples", 10)
    for number in (1, 2):
        run("shard", corpus, tmp_path / f"out{number}", "--max-samples", 10, "--engine", "ray",
            env=cluster)  # fmt: skip
        assert set_files(tmp_path / f"out{number}") == set_files(tmp_path / "local")
    error = run(
        "shard", corpus, tmp_path / "no", "--engine", "ray", env={**cluster, "RAY_ADDRESS": "127.0.0.1:1"}, code=1
    )
    assert "cannot reach Ray at 127.0.0.1:1" in error and "Traceback" not in error
