"""`mixer launch torchrun`: hosts without a scheduler, here three launchers on loopback."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mixer_process import RUN, STEPS, Mixer, current_step, poll

from pipeline.checkpoint.manager import committed_steps
from pipeline.run import RunFolder, read_ledger, read_lines

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def world_sizes(run: Path) -> list[int]:
    return [e["world_size"] for e in read_lines(RunFolder(run).events) if e["event"] in ("start", "resume")]


def start_hosts(run: Path, ranks: list[int], nnodes: str, port: int) -> list[Mixer]:
    recipe = run.parent / "plain.yaml"
    recipe.write_text("run: {name: test}\n")
    arguments = ["launch", "torchrun", str(recipe), f"run.dir={run}", *RUN, "health.timeout=1 min", "--nproc", "1",
                 "--nnodes", nnodes, "--rdzv-endpoint", f"localhost:{port}"]  # fmt: skip
    return [
        Mixer(
            [*arguments, "--node-rank", str(rank)], run.parent / f"host{rank}", stretch=0.4, probe=run.parent / "probe"
        )
        for rank in ranks
    ]


def wait_for_step(run: Path, hosts: list[Mixer], attempt: int, step: int) -> None:
    def arrived() -> bool:
        assert any(host.process.poll() is None for host in hosts), "\n".join(host.output() for host in hosts)
        now = current_step(run)
        return now[0] > attempt or (now[0] == attempt and now[1] >= step)

    assert poll(arrived, 240), "\n".join(host.output() for host in hosts)


def audit(run: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "audit", str(run)]
    result = subprocess.run(command, env={**os.environ, "MIXER_DEVICE": "cpu"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_lost_host_shrinks_the_job(tmp_path):
    """Killed, as by a power cut: the two left go on; each step's samples are those of the order, once."""
    run = tmp_path / "run"
    hosts = start_hosts(run, [0, 1, 2], "2:3", free_port())
    try:
        wait_for_step(run, hosts, attempt=0, step=8)
        hosts[2].kill()
        assert [host.wait(300) for host in hosts[:2]] == [0, 0], hosts[0].output() + hosts[1].output()
    finally:
        for host in hosts:
            host.kill()
    assert world_sizes(run) == [3, 2]
    assert list(read_ledger(run)) == list(range(1, STEPS + 1))
    audit(run)


def test_a_host_leaves_after_a_save_and_comes_back(tmp_path):
    """SIGTERM to one host: all save, it leaves with 75, the others go on; another host widens the job again."""
    run, port = tmp_path / "run", free_port()
    hosts = start_hosts(run, [0, 1], "1:2", port)
    try:
        wait_for_step(run, hosts, attempt=0, step=6)
        hosts[1].process.send_signal(signal.SIGTERM)
        assert hosts[1].wait(120) == 75, hosts[1].output()
        left_at = committed_steps(RunFolder(run).checkpoints)[-1]
        wait_for_step(run, hosts[:1], attempt=1, step=left_at + 2)
        starts = [e for e in read_lines(RunFolder(run).events) if e["event"] in ("start", "resume")]
        assert starts[1]["step"] == left_at  # nothing was lost
        hosts += start_hosts(run, [1], "1:2", port)
        assert hosts[0].wait(300) == 0, hosts[0].output()
        assert hosts[2].wait(60) == 0, hosts[2].output()
    finally:
        for host in hosts:
            host.kill()
    assert world_sizes(run) == [2, 1, 2]
    assert list(read_ledger(run)) == list(range(1, STEPS + 1))
    audit(run)


def test_a_signal_while_it_waits_to_join_again(tmp_path):
    """Its agent is killed; told to leave before it starts another, it leaves. An old STOP keeps nobody out."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").write_text("save\n")
    code = (
        "from launch.torchrun import Host; from pipeline.config import load_config; import sys; "
        f"c = load_config('digits', ['data.train=synthetic', 'run.dir={run}']).config; "
        f"sys.exit(Host(c, ['no-such'], (1, 1), 0, 'localhost:{free_port()}', 'x', 1).launch())"
    )
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert poll(lambda: bool(children(host.pid)), 30)
        os.kill(children(host.pid)[0], signal.SIGKILL)
        assert any("joining again in 5 s" in line for line in host.stdout) and not (run / "STOP").exists()
        host.send_signal(signal.SIGTERM)
        assert host.wait(20) == 75
    finally:
        host.kill()


def test_it_prints_the_command_of_every_host(tmp_path):
    command = [sys.executable, "-m", "launch.cli", "launch", "torchrun", "digits", "data.train=/a b", "run.dir=r",
               "--nnodes", "2:3", "--rdzv-endpoint", "h0:29500", "--nproc", "8"]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    commands = [shlex.split(line) for line in said if not line.startswith("#")]
    assert [c[-2:] for c in commands] == [["--node-rank", str(r)] for r in range(3)]
    assert all(c[:5] == ["mixer", "launch", "torchrun", "digits", "data.train=/a b"] for c in commands)
