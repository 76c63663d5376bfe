"""Every strategy on one GPU: it runs, agrees with plain torch on the CPU, and resumes bit for bit.

Also offloaded and SGD state, compiled and recomputed blocks, deterministic algorithms, saving beside training from
pinned memory, and the micro-batch found by trying. One rank exercises the CUDA side of every engine (devices, streams,
autocast, fused AdamW, NCCL's start); several ranks over NCCL need several GPUs and are not covered here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest
from engine_cases import STRATEGIES, Spec, plain_training

from pipeline.checkpoint.layout import CheckpointReader
from pipeline.run import read_lines, read_metrics

pytestmark = pytest.mark.gpu
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of losses near 2.3, against fp32 on the CPU
needs_compiler = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="Triton needs a C compiler")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_and_resumes_bit_for_bit(gpu, tmp_path: Path, strategy: str, precision: str) -> None:
    whole, resumed = gpu.run(cases.interrupted, Spec(strategy, precision), str(tmp_path), 3, 6)[0]
    np.testing.assert_allclose(whole.losses, plain_training(range(6)).losses, rtol=0, atol=TOLERANCE[precision])
    assert resumed.losses == whole.losses[3:]
    assert CheckpointReader(Path(resumed.folder)).digest() == CheckpointReader(Path(whole.folder)).digest()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_are_those_of_a_cpu(gpu, tmp_path: Path, strategy: str) -> None:
    folder = gpu.run(cases.save_canonical, Spec(strategy), str(tmp_path))[0]
    saved = cases.read_whole(folder)
    for key, tensor in cases.canonical_state().items():
        np.testing.assert_array_equal(saved[key], tensor.reshape(-1).numpy(), err_msg=str(key))


@needs_compiler
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_blocks(gpu, tmp_path: Path, strategy: str) -> None:
    spec = Spec(strategy, compile="block")
    losses = gpu.run(cases.train, spec, None, 6, timeout=500)[0].losses
    np.testing.assert_allclose(losses, plain_training(range(6)).losses, rtol=0, atol=TOLERANCE["fp32"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_activation_checkpointing(gpu, strategy: str, precision: str) -> None:
    plain = gpu.run(cases.train, Spec(strategy, precision), None, 6)[0]
    recomputed = gpu.run(cases.train, Spec(strategy, precision, activation_checkpointing="block"), None, 6)[0]
    np.testing.assert_allclose(recomputed.losses, plain.losses, rtol=0, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_offloaded_moments(gpu, tmp_path: Path, strategy: str) -> None:
    """fsdp: torch's CPU offload; zero: DeepSpeed's CPU Adam, compiled at first use."""
    spec = Spec(strategy, offload="optimizer")
    whole, resumed = gpu.run(cases.interrupted, spec, str(tmp_path), 3, 6, timeout=500)[0]
    np.testing.assert_allclose(whole.losses, plain_training(range(6)).losses, rtol=0, atol=TOLERANCE["fp32"])
    assert resumed.losses == whole.losses[3:]
    assert CheckpointReader(Path(resumed.folder)).digest() == CheckpointReader(Path(whole.folder)).digest()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sgd(gpu, tmp_path: Path, strategy: str) -> None:
    spec = Spec(strategy, optimizer="sgd")
    whole, resumed = gpu.run(cases.interrupted, spec, str(tmp_path), 3, 6)[0]
    plain = plain_training(range(6), optimizer="sgd")
    np.testing.assert_allclose(whole.losses, plain.losses, rtol=0, atol=TOLERANCE["fp32"])
    assert resumed.losses == whole.losses[3:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_save_beside_training_is_staged_in_pinned_memory(gpu, tmp_path: Path, strategy: str) -> None:
    folder, pinned = gpu.run(cases.save_beside_training, Spec(strategy), str(tmp_path))[0]
    saved = cases.read_whole(folder)
    for key, tensor in cases.canonical_state().items():
        np.testing.assert_array_equal(saved[key], tensor.reshape(-1).numpy(), err_msg=str(key))
    assert pinned


@pytest.mark.parametrize("fault", ["gradient", "loss"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sick_step_changes_nothing(gpu, tmp_path: Path, strategy: str, fault: str) -> None:
    before, after, counts = gpu.run(cases.sick_step, Spec(strategy), str(tmp_path), fault)[0]
    assert counts == (2, 2, 3)
    saved = cases.read_whole(after)
    for key, tensor in cases.read_whole(before).items():
        np.testing.assert_array_equal(saved[key], tensor, err_msg=str(key))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_runs_give_the_same_bits(gpu, tmp_path: Path, strategy: str, precision: str) -> None:
    first, second = gpu.run(cases.train_twice, Spec(strategy, precision), str(tmp_path), 6)[0]
    assert first.losses == second.losses
    assert CheckpointReader(Path(first.folder)).digest() == CheckpointReader(Path(second.folder)).digest()


def test_the_micro_batch_that_fits_is_found(gpu, tmp_path: Path) -> None:
    """A Mixer-B/16 with 4,096 images at once needs several times the memory of any GPU there is."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: mixer_b16, num_classes: 10}\n")
    settings = [
        "data.train=synthetic", "data.val=none", "data.num_workers=8", "train.global_batch_size=4096",
        "train.strategy=fsdp", "train.duration=2 steps", "logging.every=1 steps", "logging.to=[]",
        f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "launch.cli", "train", str(recipe), *settings], timeout=540)
    assert done.returncode == 0
    [found] = [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == "micro_batch"]
    assert 16 <= found["size"] < 4096
    assert len(read_metrics(tmp_path / "run")) == 2
