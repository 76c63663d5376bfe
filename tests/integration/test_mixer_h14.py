"""The largest model of the paper at its real size, on two CPU processes: fsdp, saved, resumed as zero3.

Minutes long: a step of one image a process takes most of a minute on two cores. What it measures is printed: times as
multiples of a forward and backward pass of the bare model, memory of all processes together; docs/strategies.md holds
the figures of one run. MIXER_H14_ORDER="zero3 fsdp" takes the other way round.
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
    assert "restarting from" not in output, output  # 18 GiB beside other processes: most often killed for memory
    return time.monotonic() - begin, most


BARE_PASS = """
import time, torch
from pipeline.model import create_model
torch.set_num_threads(1)
model = create_model("mixer_h14", 1000, 224, seed=0)
images = torch.zeros(1, 3, 224, 224)
for _ in range(2):  # the first one also takes its memory
    begin = time.perf_counter()
    model(images).sum().backward()
    model.zero_grad()
    seconds = time.perf_counter() - begin
print(seconds)
"""


def bare_pass() -> float:
    """Seconds of a forward and backward pass of one image in plain torch, in as many processes as train below."""
    command = [sys.executable, "-c", BARE_PASS]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return max(float(p.communicate(timeout=600)[0]) for p in processes)


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
    unit = bare_pass()
    for strategy, steps in ((first, 2), (second, 4)):
        settings = [*SETTINGS, f"train.strategy={strategy}", f"train.duration={steps} steps"]
        command = ["train", recipe, *settings, f"run.dir={run}", "--nproc", 2]
        seconds, most = mixer(*(command if steps == 2 else ["resume", run, *settings[-2:], "--nproc", 2]))
        print(f"{strategy}: {seconds / unit:.1f} passes in all, at most {most / 2**30:.1f} GiB in all processes")
        for m in read_metrics(run)[-2:]:
            print(f"  step {m['step']}: loss {m['loss']:.6f}, {2 / m['img_per_s'] / unit:.2f} passes")
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
