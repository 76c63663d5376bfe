"""train.micro_batch_size=auto: found by running out of memory for real (an address-space limit), agreed over ranks."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import TINY, script, train

from pipeline import micro_batch
from pipeline.config import load_config
from pipeline.micro_batch import is_out_of_memory, out_of_memory_message, saved_bytes
from pipeline.model import create_model
from pipeline.parallel.world import free_port
from pipeline.run import read_digests, read_lines, read_metrics

# About 2.4 MB of activations an image and hardly any arithmetic
THIN = [
    "model.image_size=64", "model.hidden_dim=32", "model.num_blocks=4", "model.tokens_mlp_dim=32",
    "model.channels_mlp_dim=128", "train.global_batch_size=256", "train.duration=1 steps",
    "checkpoint.every=1 steps", "optimizer.eps=1e-4",
]  # fmt: skip
# A training of one rank that may take so many MB more address space than it has when it begins
LIMITED = """
import resource, psutil, torch
from pathlib import Path
from helpers import train
import pipeline.build, pipeline.trainer
size = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]) * 10**6, resource.RLIM_INFINITY))
sys.exit(train(Path(sys.argv[1]), *sys.argv[3:]))
"""


def limited(run: Path, megabytes: int, *settings: str, **env: str) -> list[str]:
    return script(LIMITED, run, megabytes, *THIN, *settings, **env)


def found(run: Path) -> list[int]:
    return [e["size"] for e in read_lines(run / "events.jsonl") if e["event"] == "micro_batch"]


def test_small_models_are_not_tried(tmp_path):
    assert train(tmp_path / "run", "train.duration=1 steps") == 0
    assert found(tmp_path / "run") == []


@pytest.mark.slow
def test_the_largest_that_fits_is_found_and_remembered(tmp_path):
    run = tmp_path / "run"
    first = subprocess.run(limited(run, 700), capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "trying which micro-batch fits" in first.stdout
    [size] = found(run)
    assert 8 <= size <= 128 and 256 % size == 0
    assert f"256 = {size} x 1 ranks x {256 // size} accumulated" in first.stdout
    again = subprocess.run(limited(run, 700, "train.duration=2 steps"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trying" not in again.stdout and f"256 = {size} x 1 ranks" in again.stdout
    # and it is the training that any other micro-batch is
    assert train(tmp_path / "fixed", *THIN, "train.micro_batch_size=32", "train.duration=2 steps") == 0
    assert read_digests(run) == read_digests(tmp_path / "fixed")
    for ours, theirs in zip(read_metrics(run), read_metrics(tmp_path / "fixed")):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


@pytest.mark.slow
def test_ranks_agree_on_what_fits_the_smallest(tmp_path):
    run, port = tmp_path / "run", str(free_port())
    ranks = [
        subprocess.Popen(
            limited(run, megabytes, "train.strategy=fsdp", RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2",
                    LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ),
        )
        for r, megabytes in enumerate((8000, 500))
    ]  # fmt: skip
    outputs = [r.communicate(timeout=300)[0] for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], "\n".join(outputs)
    [size] = found(run)
    assert size <= 64, "the second rank has no room for 128 images"
    assert f"256 = {size} x 2 ranks x {-(-128 // size)} accumulated" in outputs[0]


def test_another_size_of_memory_is_tried_again(world, monkeypatch):
    config = load_config(None, TINY).config
    here = micro_batch._facts(config, world, 16)
    assert micro_batch._facts(config, world, 16) == here
    monkeypatch.setattr(micro_batch, "total_memory", lambda world: 3 * 2**30)
    assert micro_batch._facts(config, world, 16) == here | {"memory_gib": 3}


@pytest.mark.slow
def test_a_trial_ends_with_its_training(tmp_path):
    """Also one that stands still, as in a collective."""
    command = limited(tmp_path / "run", 700, TMPDIR=str(tmp_path))
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trial = None
    try:
        while not any("fits" in f.read_text() for f in tmp_path.glob("mixer-trial-*/output")):
            assert training.poll() is None
            time.sleep(0.02)
        [trial] = (p for p in psutil.Process(training.pid).children() if "pipeline.micro_batch" in p.cmdline())
        trial.suspend()
        training.kill()
        training.wait()
        trial.wait(30)
    finally:
        training.kill()
        if trial and trial.is_running():
            trial.kill()


def test_nothing_fits(tmp_path):
    big = ("model.hidden_dim=1024", "model.num_blocks=24")
    done = subprocess.run(limited(tmp_path / "run", 400, *big), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "not even one image at a time fits" in done.stderr


LATER = """
import resource, psutil
from pathlib import Path
from helpers import train
from pipeline import trainer
original = trainer.Trainer._complete_step
def complete(self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.step == 1:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms, resource.RLIM_INFINITY))
trainer.Trainer._complete_step = complete
train(Path(sys.argv[1]), *sys.argv[2:])
"""


def test_out_of_memory_later_says_what_to_lower(tmp_path):
    settings = (*THIN, "train.duration=3 steps", "train.micro_batch_size=64", "checkpoint.every=9 steps")
    done = subprocess.run(script(LATER, tmp_path / "run", *settings), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "UserError: rank 0: out of memory in step 2: lower train.micro_batch_size (it is 64)" in done.stderr


def test_what_can_be_done_is_what_is_not_done_yet():
    def message(*settings: str, micro: int = 8) -> str:
        return out_of_memory_message(load_config(None, [*TINY, *settings]).config, 6, micro)

    assert "step 7" in message() and "activation_checkpointing=block or train.strategy=fsdp" in message()
    done = ("train.strategy=fsdp", "train.offload=optimizer", "train.activation_checkpointing=block")
    assert "set " not in message(*done) and "micro_batch_size (it is 8)" in message(*done)
    assert "micro_batch_size" not in message(micro=1)


def test_the_errors_of_an_allocator_are_told_from_others():
    with pytest.raises(RuntimeError) as e:
        torch.empty(1 << 60)
    assert is_out_of_memory(e.value)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes do not match"))


def test_what_a_forward_pass_keeps_is_counted_on_meta():
    model = create_model("mixer_s16", 10, 32, device="meta")
    small = saved_bytes(model, 3, 32)
    # what every block keeps at least: both hidden layers, before and after GELU; C 512, D_S 256, S 4, D_C 2048
    hidden = 8 * 4 * (2 * 512 * 256 + 2 * 4 * 2048)
    assert hidden < small < 1.2 * hidden
    assert saved_bytes(create_model("mixer_s16", 10, 64, device="meta"), 3, 64) > small
