"""Exports: the same numbers under other names, loadable by those they are meant for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import script, train

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose
from pipeline.weights.commands import run_export
from pipeline.weights.flax import flax_name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    assert train(folder, "train.ema_decay=0.5", "model.image_size=12", "train.duration=3 steps") == 0
    return folder


@pytest.fixture
def reader(run) -> CheckpointReader:
    return CheckpointReader(choose(run / "checkpoints", "last"))


@pytest.mark.parametrize("ema", [False, True])
def test_safetensors_and_torch_hold_the_checkpoints_bits(run, reader, tmp_path, ema, capsys):
    from safetensors.torch import load_file

    kind = "ema" if ema else "weight"
    assert run_export(str(run), tmp_path / "w.safetensors", "safetensors", "last", ema, "float32") == 0
    assert run_export(str(run), tmp_path / "w.pt", "torch", "last", ema, "float32") == 0
    assert "load_file" in capsys.readouterr().out
    for weights in (load_file(tmp_path / "w.safetensors"), torch.load(tmp_path / "w.pt", weights_only=True)):
        assert set(weights) == {n for n, k in reader.manifest.tensors if k == kind}
        for name, tensor in weights.items():
            assert torch.equal(tensor, reader.tensor(name, kind)), name


def test_npz_has_the_released_layout(run, reader, tmp_path):
    run_export(str(run), tmp_path / "w.npz", "npz", "last", False, "float32")
    arrays = np.load(tmp_path / "w.npz", allow_pickle=False)
    blocks = 2
    assert len(arrays) == 6 + 12 * blocks
    assert arrays["stem/kernel"].shape == (4, 4, 3, 16)
    assert arrays["MixerBlock_1/token_mixing/Dense_0/kernel"].shape == (9, 8)
    assert arrays["MixerBlock_0/LayerNorm_1/scale"].shape == (16,)
    assert arrays["head/kernel"].shape == (16, 4)
    for name, kind in reader.manifest.tensors:
        if kind == "weight":
            ours, theirs = reader.tensor(name).numpy(), arrays[flax_name(name)]
            back = theirs.transpose(3, 2, 0, 1) if theirs.ndim == 4 else theirs.T
            assert np.array_equal(ours, back), name


@pytest.mark.compare
def test_timm_loads_the_export_and_computes_the_same(run, reader, tmp_path):
    from pipeline.model import create_model
    from pipeline.model.timm_compat import import_timm

    try:
        import_timm()
    except ImportError:
        pytest.skip("timm is not installed")
    from safetensors.torch import load_file
    from timm.layers.create_act import get_act_layer
    from timm.models.mlp_mixer import MlpMixer as TimmMixer

    run_export(str(run), tmp_path / "timm", "timm", "last", False, "float32")
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    theirs = TimmMixer(**described["model_args"], act_layer=get_act_layer(described["act_layer"]))
    theirs.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"))
    ours = create_model("mixer_s16", 4, 12, patch_size=4, hidden_dim=16, num_blocks=2, tokens_mlp_dim=8,
                        channels_mlp_dim=32)  # fmt: skip
    ours.load_state_dict({n: reader.tensor(n) for n, k in reader.manifest.tensors if k == "weight"})
    images = torch.rand(3, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs.eval()(images), atol=1e-5)


def test_a_damaged_checkpoint_and_a_wrong_format_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="safetensors, timm, npz, torch"):
        run_export(str(run), tmp_path / "x", "onnx", "last", False, "float32")
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    victim = next((copy / "checkpoints").glob("step-00000003/*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match="hash"):
        run_export(str(copy), tmp_path / "x", "safetensors", "last", False, "float32")


MEMORY = """
from pathlib import Path
from pipeline.weights.commands import run_export
def memory(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
tiny, run, form, out = sys.argv[1:]
run_export(tiny, Path(out + ".tiny"), form, "last", False, "float32")  # whatever is imported late, is now
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
run_export(run, Path(out), form, "last", False, "float32")
print("peak", memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_an_export_takes_about_one_copy_of_the_weights(tmp_path, run):
    wide = ("model.hidden_dim=1024", "model.channels_mlp_dim=4096", "model.num_blocks=5", "train.duration=1 steps")
    assert train(tmp_path / "run", *wide) == 0
    reader = CheckpointReader(choose(tmp_path / "run" / "checkpoints", "last"))
    size = sum(4 * reader.tensor(n, k).numel() for n, k in reader.manifest.tensors if k == "weight")
    assert size > 160 << 20
    copies = {}
    for form in ("npz", "safetensors", "timm", "torch"):
        command = script(MEMORY, run, tmp_path / "run", form, tmp_path / form)
        out = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr
        copies[form] = round(int(out.stdout.split()[-1]) / size, 2)
    print(copies, "copies of the weights")
    assert all(n < 1.3 for n in copies.values()), copies
