"""`mixer demo`: the real thing (slow), and what its verdict says of folders that were tampered with (quick)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.errors import UserError
from data_tools.manifest import INDEX_DTYPE, DatasetManifest, ShardInfo
from launch import demo
from launch.demo_report import examine, expected_digests, interrupted_run, undisturbed_run
from pipeline.config import load_config, to_yaml
from pipeline.data.order import key, rank_slots
from pipeline.run import RunFolder, append_line, read_lines

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

STEPS, BATCH, CHECKPOINT, KILLED = 12, 8, 4, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a demo leaves, made up: a data set of three shards, and two runs that saw what the formula says."""
    root = tmp_path / "demo"
    (root / "shards").mkdir(parents=True)
    (root / demo.MARKER).touch()
    generator = np.random.default_rng(0)
    shards = []
    for i, count in enumerate((20, 13, 7)):
        shard = ShardInfo(f"train-{i:06d}.tar", count, 1, "0", str(i))
        rows = np.zeros(count, dtype=INDEX_DTYPE)
        rows["crc32"] = generator.integers(0, 2**32, count, dtype=np.uint32)
        np.save(root / "shards" / shard.index_name, rows)
        shards.append(shard)
    manifest = DatasetManifest({"train": shards, "val": shards[2:]}, classes=["a", "b"])
    (root / "shards" / "dataset.json").write_text(manifest.to_json())
    (root / "kill.json").write_text(json.dumps({"pids": [1, 2, 3]}))
    _write_run(root, interrupted_run(root), [(0, "ddp", 2, 0, KILLED), (1, "zero3", 3, CHECKPOINT, STEPS)])
    _write_run(root, undisturbed_run(root), [(0, "ddp", 2, 0, STEPS)])
    return root


def _write_run(root: Path, path: Path, attempts: list[tuple[int, str, int, int, int]]) -> None:
    run = RunFolder(path)
    path.mkdir(parents=True)
    settings = [f"data.train={root / 'shards'}", f"run.dir={path}", f"train.global_batch_size={BATCH}"]
    config = load_config("digits", [*settings, f"train.duration={STEPS} steps", "scheduler.warmup=1 steps"]).config
    run.config.write_text(to_yaml(config))
    expected = expected_digests(config, STEPS)
    for number, strategy, ranks, first, last in attempts:
        event = "resume" if first else "start"
        run.record(event, attempt=number, step=first, world_size=ranks, strategy=strategy)
        for step in range(first + 1, last + 1):
            epoch, position, digest = expected[step]
            left = int(digest, 16)
            for rank in range(ranks):  # parts that add up to the whole
                part = int(key(step, rank)) if rank < ranks - 1 else left % 2**64
                left -= part
                place = {"step": step, "attempt": number, "epoch": epoch, "position": position}
                slots = list(rank_slots(rank, ranks, BATCH))
                append_line(run.ledger / f"rank-{rank:05d}.jsonl", {**place, "slots": slots, "digest": f"{part:016x}"})
            line = {"step": step, "attempt": number, "split": "train", "loss": 2.0 / step, "img_per_s": 100.0}
            append_line(run.metrics, line)
    run.record("finish", attempt=attempts[-1][0], step=STEPS, metrics={})
    run.finished.write_text(f"step {STEPS}\n")
    (path / "eval").mkdir()
    _write_accuracy(path, 0.97)
    checkpoint = run.checkpoints / f"step-{STEPS:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"tensors": [["w", "weight", [3, 4]], ["w", "ema", [3, 4]]]}))


def _write_accuracy(run: Path, top1: float) -> None:
    (run / "eval" / f"step-{STEPS:08d}.json").write_text(json.dumps({"top1": top1, "samples": 7}))


def _tamper(path: Path, step: int, **values: object) -> None:
    lines = [{**line, **values} if line["step"] == step else line for line in read_lines(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_honest_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert demo.report_demo(folder) == 0
    out = capsys.readouterr().out
    assert f"after step {KILLED} of {STEPS} (3 processes at once)" in out
    assert f"from step {CHECKPOINT}, ZeRO-3 on 3 processes; {KILLED - CHECKPOINT} steps repeated" in out
    assert f"{STEPS} of {STEPS} steps" in out
    assert "97.00%" in out and "--logdir" in out
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (1000, 450)


@pytest.mark.parametrize("which", [interrupted_run, undisturbed_run])
def test_another_sample_in_one_step_fails(folder: Path, which, capsys: pytest.CaptureFixture[str]):
    _tamper(
        RunFolder(which(folder)).ledger / "rank-00001.jsonl",
        9 if which is interrupted_run else 3,
        digest="00000000deadbeef",
    )
    assert demo.report_demo(folder) == 1
    assert "saw other samples in 1 steps" in capsys.readouterr().err


def test_both_runs_wrong_in_the_same_way_fail(folder: Path):
    """Equal to each other, but not to the formula."""
    for run in (interrupted_run(folder), undisturbed_run(folder)):
        for ledger in (run / "ledger").iterdir():
            _tamper(ledger, 10, digest="0000000000000001" if ledger.name == "rank-00000.jsonl" else "0" * 16)
    problems = examine(folder).problems
    assert len(problems) == 2 and all("formula" in p and "step 10" in p for p in problems)


def test_a_missing_step_fails(folder: Path):
    for ledger in (interrupted_run(folder) / "ledger").iterdir():
        kept = [line for line in read_lines(ledger) if line["step"] != 8]
        ledger.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert any("step 8" in p for p in examine(folder).problems)


def test_no_kill_fails(folder: Path):
    run = RunFolder(interrupted_run(folder))
    for path in (run.events, run.metrics, *(run.path / "ledger").iterdir()):
        path.unlink()
    source = RunFolder(undisturbed_run(folder))
    for path in (source.events, source.metrics, *(source.path / "ledger").iterdir()):
        (run.path / path.relative_to(source.path)).write_text(path.read_text())
    assert any("kill did not land" in p for p in examine(folder).problems)


def test_low_accuracy_fails(folder: Path):
    _write_accuracy(interrupted_run(folder), 0.94)
    assert examine(folder).problems == ["top-1 is 94.00%, below 95%"]


def test_another_loss_fails(folder: Path):
    _tamper(RunFolder(interrupted_run(folder)).metrics, 11, loss=2.0)
    assert any("losses" in p for p in examine(folder).problems)


def test_an_unfinished_demo_says_what_to_do(folder: Path):
    RunFolder(undisturbed_run(folder)).finished.unlink()
    with pytest.raises(UserError, match="mixer demo"):
        demo.report_demo(folder)
    with pytest.raises(UserError, match="holds no demo"):
        demo.report_demo(folder.parent)


def test_only_its_own_folder_is_emptied(folder: Path, tmp_path: Path):
    demo._clear(folder)
    assert [p.name for p in folder.iterdir()] == [demo.MARKER]
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").touch()
    with pytest.raises(UserError, match="not made by the demo"):
        demo._clear(foreign)
    assert (foreign / "cat.jpg").exists()


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-learn and matplotlib.*pip install"):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_kill_tree_leaves_nobody():
    """Three generations, the last in a session of its own and deaf to SIGTERM."""
    code = (
        "import subprocess, sys, time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); n = int(sys.argv[1])\n"
        "if n: subprocess.Popen([sys.executable, '-c', sys.argv[2], str(n - 1), sys.argv[2]], start_new_session=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "2", code])
    deadline = time.monotonic() + 30
    while len(demo._descendants(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = demo.kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert len(pids) == 3
    assert not demo._running() & set(pids)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_itself(tmp_path: Path):
    folder = tmp_path / "demo"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "launch.cli", "demo", str(folder)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.search(r"after step (\d+) of (\d+)", done.stdout)
    assert killed and 0 < int(killed[1]) < int(killed[2])
    assert f"{killed[2]} of {killed[2]} steps: as undisturbed" in done.stdout
    assert re.search(r"top-1 +9[5-9]\.\d\d%", done.stdout)
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (1000, 450)

    ledger = sorted(RunFolder(interrupted_run(folder)).ledger.glob("rank-00000.*"))[-1]
    ledger.write_bytes(ledger.read_bytes()[:-16] + b"0" * 16)
    again = subprocess.run([*command, "--report"], env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert "FAILED" in again.stderr
