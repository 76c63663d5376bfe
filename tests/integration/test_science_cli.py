"""Weights in, evaluated, probed, fine-tuned at a higher resolution on two processes, and out, as typed by a user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import picture, png

from pipeline.model import create_model
from pipeline.weights.flax import flax_array, flax_name

pytestmark = pytest.mark.slow


def mixer(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def images(root: Path) -> Path:
    for split, each in (("train", 8), ("val", 5)):
        for k in range(3):
            for i in range(each):
                path = root / split / f"class{k}" / f"{split}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png((picture(100 * k + i, 20, 24) // 4 + 80 * k).astype(np.uint8)))
    return root


def test_from_released_weights_to_a_fine_tuned_model_and_out_again(tmp_path):
    model = create_model("mixer_s16", 3, 16, patch_size=4, hidden_dim=16, num_blocks=2)
    np.savez(tmp_path / "w.npz", **{flax_name(n): flax_array(p.detach()) for n, p in model.named_parameters()})
    data, weights, run = images(tmp_path / "set"), tmp_path / "weights", tmp_path / "run"

    assert "16 pixels, 3 classes" in mixer("import", tmp_path / "w.npz", weights, "--num-classes", "3")
    said = mixer("eval", weights, f"data.val={data}", "data.num_workers=0", "train.precision=fp32", "--nproc", "2")
    assert "top-1 33.33%" in said and "on 15 samples" in said  # a head of zeros takes all for the first class
    said = mixer("fewshot", weights, data, "--shots", "1,5", "--seeds", "2", "data.num_workers=0")
    assert json.loads((weights / "eval" / "fewshot-step-00000000.json").read_text())["fewshot"][1]["top1"] > 0.5, said

    small = ["train.duration=4 steps", "scheduler.warmup=1 steps", "train.global_batch_size=8", "train.precision=fp32",
             "data.num_workers=0", "eval.every=null", "eval.batch_size=8", "logging.to=[]"]  # fmt: skip
    said = mixer("finetune", weights, f"data.train={data}", f"run.dir={run}", "model.image_size=32", "--nproc", "2",
                 "train.strategy=fsdp", *small)  # fmt: skip
    assert "grown for 2x2 tiles" in said and "finished: 4 steps" in said
    assert "exact: what reached the model" in mixer("audit", run)
    assert "3 pictures" in mixer("picture", run)
    assert (run / "pictures" / "step-00000004" / "stem.png").exists()
    assert "8x8 tokens" in mixer("picture", run, "--layers", "2", "--out", tmp_path / "pictures")
    assert "To load:" in mixer("export", run, tmp_path / "again.npz", "--format", "npz")
    with np.load(tmp_path / "again.npz", allow_pickle=False) as arrays:
        assert arrays["MixerBlock_1/token_mixing/Dense_0/kernel"].shape == (64, 32)


def test_what_does_not_fit_is_told_in_a_few_lines(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    command = [sys.executable, "-m", "launch.cli", "import", str(tmp_path / "w.pt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "pickles" in done.stderr and "Traceback" not in done.stderr
