"""`mixer compare scaling` and `permutation` as a user types them: killed in the middle, gone on with, reported."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import Member, png, shards_of, write_dataset
from mixer_process import Mixer, attempts, final_digest, history, poll, wait_for_progress

from data_tools.errors import UserError
from pipeline.run import RunFolder

pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 60
COMMON = ["model.image_size=8", f"train.duration={STEPS} steps", "train.global_batch_size=8", "train.precision=fp32",
          "train.strategy=ddp", "data.num_workers=0", "eval.every=20 steps", "eval.batch_size=16", "optimizer.lr=0.01",
          "augment.crop=resize", "augment.hflip=0", "checkpoint.every=4 steps", "logging.every=1 steps",
          "logging.to=[]"]  # fmt: skip
MIXER = "model.patch_size=4 model.hidden_dim=16 model.num_blocks=2"


def image(i: int, label: int) -> Member:
    """A bright quarter says the class."""
    pixels = np.random.default_rng(i).integers(0, 100, (8, 8, 3), dtype=np.uint8)
    y, x = divmod(label, 2)
    pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 120
    return Member(png(pixels), label)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    samples = [image(i, i % 4) for i in range(160)]
    return write_dataset(tmp_path / "set", {"train": shards_of(samples[:120], [70, 50]), "val": [samples[120:]]}, 4)


def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("run: {name: tiny}\nmodel: {name: mixer_s16}\n")
    return path


def test_scaling_killed_in_the_middle_goes_on(tmp_path, data):
    base, out = recipe(tmp_path), tmp_path / "out"
    asked = ["compare", "scaling", "--model", f"Small={base} {MIXER}", "--model",
             f"Wide={base} {MIXER} model.hidden_dim=32", "--fractions", "25,100", "--shots", "1,5",
             "--out", str(out), f"data.train={data}", *COMMON]  # fmt: skip
    runs = {name: out / "runs" / name for name in ("Small-25pct", "Small-100pct", "Wide-25pct", "Wide-100pct")}

    mixer = Mixer(asked, tmp_path, stretch=0.03)
    assert poll(lambda: RunFolder(runs["Small-25pct"]).finished.exists(), 180), mixer.output()
    wait_for_progress(mixer, runs["Small-100pct"], 0, steps=8)
    os.kill(mixer.process.pid, signal.SIGKILL)
    mixer.process.wait()
    assert mixer.all_gone(), mixer.processes()  # the training saved and ended by itself
    before = (runs["Small-25pct"] / "events.jsonl").read_bytes()

    changed = Mixer([*asked, "optimizer.lr=0.5"], tmp_path)
    assert changed.wait() == UserError.exit_code and "optimizer.lr: 0.01 -> 0.5" in changed.output(), changed.output()

    folder = RunFolder(out)
    folder.lock()  # as another study in this folder would
    again = Mixer(["compare", "scaling", "--out", str(out)], tmp_path)
    assert again.wait() == UserError.exit_code and "another training writes into" in again.output(), again.output()
    assert folder._lock is not None
    folder._lock.close()

    mixer = Mixer(["compare", "scaling", "--out", str(out), "--jobs", "2"], tmp_path, stretch=0.03)
    wait_for_progress(mixer, runs["Small-100pct"], 1, steps=2)
    mixer.process.terminate()
    assert mixer.wait() == 75 and f"go on with `mixer compare scaling --out {out}`" in mixer.output(), mixer.output()
    assert mixer.all_gone() and "Small-100pct: training, goes on from step" in mixer.output()

    mixer = Mixer(["compare", "scaling", "--out", str(out), "--jobs", "2"], tmp_path, stretch=0)
    assert mixer.wait(300) == 0, mixer.output()
    assert "finished in" in mixer.output()
    assert (runs["Small-25pct"] / "events.jsonl").read_bytes() == before  # kept as it was
    assert attempts(runs["Small-100pct"]) >= 2

    alone = Mixer(["train", str(out / "configs" / "Small-100pct.yaml"), f"run.dir={tmp_path / 'alone'}"], tmp_path,
                  stretch=0)  # fmt: skip
    assert alone.wait() == 0, alone.output()
    assert history(runs["Small-100pct"]) == history(tmp_path / "alone")
    assert final_digest(runs["Small-100pct"]) == final_digest(tmp_path / "alone")

    facts = json.loads((out / "scaling.json").read_text())
    assert [f["run"] for f in facts] == list(runs) and facts[1]["samples"] == 120 and 10 < facts[0]["samples"] < 60
    for row in facts:
        assert [p["step"] for p in row["evaluations"]] == [20, 40, 60]
        assert row["best"]["top1"] == max(p["top1"] for p in row["evaluations"])
        assert {"fewshot_1", "fewshot_5"} <= row["best"].keys()
    assert facts[1]["best"]["fewshot_5"] > 0.6  # four classes
    table = (out / "scaling.md").read_text()
    assert table.strip() in mixer.output() and table.count("\n") == 6
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_does_not_keep_the_others(tmp_path, data):
    """One model does not train; the other's table is there, and the failure is said at the end."""
    base, out = recipe(tmp_path), tmp_path / "out"
    asked = ["compare", "scaling", "--model", f"Bad={base} {MIXER} run.init_from=nowhere",
             "--model", f"Good={base} {MIXER}", "--fractions", "100", "--shots", "5", "--out", str(out),
             f"data.train={data}", *COMMON, "train.duration=10 steps", "eval.every=5 steps"]  # fmt: skip
    mixer = Mixer(asked, tmp_path, stretch=0)
    assert mixer.wait() == UserError.exit_code, mixer.output()
    said = mixer.output()
    assert "these runs failed; the same command tries them again:\n  Bad-100pct: error: " in said
    assert "Good-100pct: finished" in said and "1 of 2 runs are not in it yet" in said and "Traceback" not in said
    assert [f["run"] for f in json.loads((out / "scaling.json").read_text())] == ["Good-100pct"]


def test_runs_prepared_for_a_cluster(tmp_path, data):
    """--prepare trains nothing; once its runs are trained by whatever means, the study reports them."""
    base, out = recipe(tmp_path), tmp_path / "out"
    asked = ["compare", "scaling", "--model", f"Small={base} {MIXER}", "--fractions", "100", "--shots", "5",
             "--out", str(out), f"data.train={data}", *COMMON, "train.duration=10 steps",
             "eval.every=5 steps"]  # fmt: skip
    mixer = Mixer([*asked, "--prepare"], tmp_path)
    assert mixer.wait() == 0, mixer.output()
    config = out / "configs" / "Small-100pct.yaml"
    assert f"mixer launch slurm {config} --nodes" in mixer.output() and not (out / "runs").exists()
    assert Mixer(["train", str(config)], tmp_path, stretch=0).wait() == 0
    mixer = Mixer(["compare", "scaling", "--out", str(out)], tmp_path)
    assert mixer.wait() == 0 and "1 of 1 runs are finished already" in mixer.output(), mixer.output()
    assert "training" not in mixer.output().split("|")[0] and (out / "scaling.png").exists()


@pytest.mark.skipif(not find_spec("timm"), reason="needs the extra compare")
def test_permutation(tmp_path, data):
    base, out = recipe(tmp_path), tmp_path / "out"
    bit = "model.name=timm/resnetv2_50x1_bit model.hidden_dim=128 model.num_blocks=1"
    mixer = Mixer(["compare", "permutation", "--model", f"Mixer={base} {MIXER}", "--model", f"BiT={base} {bit}",
                   "--shots", "1,5", "--out", str(out), f"data.train={data}", *COMMON, "augment.permute_patch=4",
                   "--jobs", "2"], tmp_path, stretch=0)  # fmt: skip
    assert mixer.wait(300) == 0, mixer.output()
    facts = json.loads((out / "permutation.json").read_text())
    kinds = ["none", "patches", "pixels"]
    assert [(f["model"], f["condition"]) for f in facts] == [(m, k) for m in ("Mixer", "BiT") for k in kinds]
    assert all(len(f["evaluations"]) == 3 for f in facts)
    assert "patches and pixels within" in (out / "permutation.md").read_text()
    assert (out / "permutation.png").read_bytes().startswith(b"\x89PNG")
