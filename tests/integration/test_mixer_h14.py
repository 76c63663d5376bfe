"""The largest model of the paper at its real size, on two CPU processes: fsdp, saved, resumed as zero3.

Minutes long: a step of one image a process takes most of a minute on two cores. What it measures (seconds, memory of
all processes together) is printed; docs/strategies.md holds the figures of one run. MIXER_H14_ORDER="zero3 fsdp"
takes the other way round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose
from pipeline.run import read_lines, read_metrics

LIMIT = 24 << 30
SETTINGS = [
    "model.num_classes=1000", "data.train=synthetic", "data.val=none", "data.num_workers=0",
    "train.global_batch_size=2", "train.micro_batch_size=1", "train.precision=fp32", "optimizer.lr=1e-4",
    "logging.every=1 steps", "logging.to=[]", "checkpoint.every=100 steps",
    "checkpoint.background=false",  # no staging: DeepSpeed holds weights and master weights, both fp32
]  # fmt: skip


def mixer(*arguments: object) -> tuple[float, int]:
    """Runs the command; (seconds, the most memory that all its processes had together, shared pages once)."""
    environment = {**os.environ, "MIXER_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    most = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.5):
            most = max(most, sum(map(_memory, _family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate(timeout=900)[0]
    over.set()
    watcher.join()
    assert process.returncode == 0, output
    return time.monotonic() - begin, most


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mixer_h14_goes_on_under_another_strategy(tmp_path: Path) -> None:
    first, second = os.environ.get("MIXER_H14_ORDER", "fsdp zero3").split()
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: mixer_h14}\n")
    for strategy, steps in ((first, 2), (second, 4)):
        settings = [*SETTINGS, f"train.strategy={strategy}", f"train.duration={steps} steps"]
        command = ["train", recipe, *settings, f"run.dir={run}", "--nproc", 2]
        seconds, most = mixer(*(command if steps == 2 else ["resume", run, *settings[-2:], "--nproc", 2]))
        print(f"{strategy}: {seconds:.0f} s in all, at most {most / 2**30:.1f} GiB in all processes together")
        for m in read_metrics(run):
            print(f"  step {m['step']}: loss {m['loss']:.6f}, {2 / m['img_per_s']:.1f} s")
        assert most < LIMIT
    assert [m["step"] for m in read_metrics(run)] == [1, 2, 3, 4]
    resumed = [e for e in read_lines(run / "events.jsonl") if e["event"] == "resume"]
    assert [e["step"] for e in resumed] == [2] and resumed[0]["previous"]["strategy"] == first
    reader = CheckpointReader(choose(run / "checkpoints", "last"))
    elements = sum(reader.tensor(n, k).numel() for n, k in reader.manifest.tensors if k == "weight")
    assert elements == 432_350_952
    assert reader.manifest.written_by["strategy"] == second
    losses = [m["loss"] for m in read_metrics(run)]
    assert losses[0] == pytest.approx(6.907755, abs=1e-4), "a head of zeros guesses all classes alike"
