"""Every strategy on one GPU: it runs, agrees with plain torch on the CPU, and resumes bit for bit.

One rank exercises the CUDA side of every engine (devices, streams, autocast, fused AdamW, NCCL's start); several
ranks over NCCL need several GPUs and are not covered here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest
from engine_cases import STRATEGIES, Spec, plain_training

from pipeline.checkpoint.layout import CheckpointReader

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
