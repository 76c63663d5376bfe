"""SIGKILL in mid-accumulation, again and again, and each time other numbers of ranks and workers: the same run."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from helpers import members, shards_of, write_dataset
from mixer_process import RUN, Mixer, attempts, history, run_arguments, wait_for_progress

from pipeline.cli import run_audit
from pipeline.run import RunFolder, read_lines

STEPS = 30
LAYOUTS = [(2, 0), (5, 1), (3, 2), (7, 0), (2, 8), (3, 0), (5, 0), (1, 3)]  # (ranks, workers), each until it is killed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_mid_accumulation_and_gone_on_with_otherwise(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", {"train": shards_of(members(300), [180, 120])})
    write_dataset(tmp_path / "b", {"train": [members(90, first=300)]})
    extra = [
        f"data.train=[{{path: {tmp_path / 'a'}, weight: 0.7}}, {{path: {tmp_path / 'b'}, weight: 0.3}}]",
        "model.num_classes=3",
        "train.global_batch_size=64",
        "train.micro_batch_size=3",  # 4 micro-steps on 7 ranks, 22 on one
        "augment.mixup_alpha=0.5",
        "augment.randaugment_magnitude=10",
        "optimizer.lr=0.001",
        f"train.duration={STEPS} steps",
        "checkpoint.every=2 steps",
    ]
    assert any(setting.startswith("data.train=") for setting in RUN)  # overruled above: the last one counts
    undisturbed = tmp_path / "undisturbed"
    whole = ["train.micro_batch_size=64", "data.num_workers=0"]
    mixer = Mixer(["launch", "local", *run_arguments(undisturbed, *extra, *whole), "--nproc", "1"], tmp_path, stretch=0)
    assert mixer.wait(200) == 0, mixer.output()

    run, clock, landed = tmp_path / "run", random.Random(5), []
    command = ["launch", "local", *run_arguments(run, *extra)]
    for number, (ranks, workers) in enumerate(LAYOUTS):
        probe, started = tmp_path / f"probe-{number}", attempts(run)
        mixer = Mixer(
            [*command, f"data.num_workers={workers}", "--nproc", str(ranks)], tmp_path, stretch=0.03, probe=probe
        )
        wait_for_progress(mixer, run, started, steps=clock.choice([1, 2]))
        time.sleep(clock.uniform(0, 0.3))
        assert mixer.process.poll() is None, f"it ended before it could be killed:\n{mixer.output()}"
        mixer.kill()
        landed.append(probe.read_bytes().replace(b"\0", b".").decode() if probe.exists() else "")
        command = ["resume", str(run)]
    mixer = Mixer([*command, "data.num_workers=2", "--nproc", "2"], tmp_path, stretch=0)
    assert mixer.wait(300) == 0, mixer.output()
    begun = [
        (e["step"], e["world_size"]) for e in read_lines(RunFolder(run).events) if e["event"] in ("start", "resume")
    ]
    print(f"kills landed at (two letters a rank; B backward): {landed}; starts at (step, ranks): {begun}")
    assert sum("B" in where for where in landed) >= 3  # a backward pass of one of at least 4 micro-steps
    assert len({ranks for _, ranks in begun}) >= 5 and begun[-1][0] > 0
    for (step, samples, loss), (_, wanted, expected) in zip(history(run), history(undisturbed), strict=True):
        assert samples == wanted, step
        assert loss == pytest.approx(expected, abs=1e-6), step
    assert run_audit(str(run), []) == 0
