"""Weights in and out: every layout read, every round trip exact, every mistake told with the flag that mends it."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture

from data_tools.errors import UserError
from pipeline.model import create_model, list_models
from pipeline.weights.commands import run_export, run_import
from pipeline.weights.flax import flax_array, flax_name, our_name, our_tensor
from pipeline.weights.importing import import_weights, write_imported
from pipeline.weights.trained import TrainedModel

P, C, L, S, D_S, D_C, K = 4, 12, 3, 9, 5, 20, 7  # nothing alike, so that nothing can be mixed up unnoticed


def released_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """A Mixer in the released layout, written down by hand from the authors' module names."""
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / 3).astype(np.float32)

    arrays = {"stem/kernel": array(P, P, 3, C), "stem/bias": array(C)}
    for i in range(L):
        block = f"MixerBlock_{i}"
        for j in (0, 1):
            arrays[f"{block}/LayerNorm_{j}/scale"], arrays[f"{block}/LayerNorm_{j}/bias"] = 1 + array(C), array(C)
        for mixing, width, hidden in (("token_mixing", S, D_S), ("channel_mixing", C, D_C)):
            arrays[f"{block}/{mixing}/Dense_0/kernel"] = array(width, hidden)
            arrays[f"{block}/{mixing}/Dense_0/bias"] = array(hidden)
            arrays[f"{block}/{mixing}/Dense_1/kernel"] = array(hidden, width)
            arrays[f"{block}/{mixing}/Dense_1/bias"] = array(width)
    arrays |= {"pre_head_layer_norm/scale": 1 + array(C), "pre_head_layer_norm/bias": array(C)}
    return arrays | {"head/kernel": array(C, K), "head/bias": array(K)}


def older_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights in the older layout, whose kernels carry an axis of length 1."""
    old = {}
    for name, a in arrays.items():
        name = name.replace("stem/", "embedding/").replace("pre_head_layer_norm/", "Mixer/encoder_norm/")
        name = re.sub(r"MixerBlock_(\d+)", r"Mixer/encoderblock_\1", name)
        dense = re.search(r"_mixing/Dense_([01])/(kernel|bias)", name)
        if dense:
            name = name[: dense.start()] + f"_mixing_phase_0/{dense[2]}{int(dense[1]) + 1}"
            a = a[None]
        old[name] = a
    return old


def flax_forward(w: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The authors' network in numpy, channels last: images [B, H, W, 3] in [-1, 1] -> logits, fp64."""
    w = {n: a.astype(np.float64) for n, a in w.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}/scale"] + w[f"{name}/bias"]

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        h = x @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return h @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]

    b, height, width, _ = images.shape
    patches = images.reshape(b, height // P, P, width // P, P, 3)
    x = np.einsum("bipjqc,pqcd->bijd", patches, w["stem/kernel"]).reshape(b, -1, C) + w["stem/bias"]
    for i in range(L):
        block = f"MixerBlock_{i}"
        x = x + mlp(norm(x, f"{block}/LayerNorm_0").swapaxes(1, 2), f"{block}/token_mixing").swapaxes(1, 2)
        x = x + mlp(norm(x, f"{block}/LayerNorm_1"), f"{block}/channel_mixing")
    return norm(x, "pre_head_layer_norm").mean(1) @ w["head/kernel"] + w["head/bias"]


def network(folder: Path) -> torch.nn.Module:
    trained = TrainedModel.open(str(folder))
    model = trained.network("cpu")
    model.load_state_dict(dict(trained.tensors()))
    return model.eval()


def test_names_and_arrays_go_both_ways():
    for name, p in create_model("mixer_s32", hidden_dim=8, num_classes=3).named_parameters():
        assert our_name(flax_name(name)) == name
        assert torch.equal(our_tensor(flax_array(p.detach())), p.detach())
    assert our_name("opt/state/count") is None and our_name("MixerBlock_0/LayerNorm_2/scale") is None


@pytest.mark.parametrize("layout", ["released", "older", "training checkpoint", "bfloat16"])
def test_every_npz_layout_computes_what_the_authors_network_does(tmp_path, layout):
    arrays = released_arrays()
    if layout == "bfloat16":  # as numpy stores what it does not know
        arrays = {n: flax_like(a) for n, a in arrays.items()}
        stored = {n: torch.from_numpy(a).bfloat16().view(torch.int16).numpy().view("V2") for n, a in arrays.items()}
    elif layout == "older":
        stored = older_arrays(arrays)
    elif layout == "training checkpoint":
        stored = {f"params/{n}": a for n, a in arrays.items()} | {"opt/0/count": np.array(3)}
    else:
        stored = arrays
    np.savez(tmp_path / "w.npz", **stored)
    imported = import_weights(str(tmp_path / "w.npz"), tmp_path / "out")
    assert imported.what.endswith(f"at 12 pixels, {K} classes")
    images = picture(0, 2 * 12, 12).reshape(2, 12, 12, 3) / 127.5 - 1
    with torch.no_grad():
        logits = network(tmp_path / "out")(torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2))
    np.testing.assert_allclose(logits.numpy(), flax_forward(arrays, images), atol=1e-5)


def flax_like(a: np.ndarray) -> np.ndarray:
    return torch.from_numpy(a).bfloat16().float().numpy()


@pytest.mark.parametrize("form", ["npz", "safetensors", "timm", "checkpoint"])
def test_round_trips_are_bit_exact(tmp_path, form, capsys):
    arrays = released_arrays()
    np.savez(tmp_path / "w.npz", **arrays)
    assert run_import(str(tmp_path / "w.npz"), tmp_path / "a", None, None, None) == 0
    middle = tmp_path / "a"
    if form != "checkpoint":
        middle = tmp_path / ("m" if form == "timm" else f"m.{form}")
        assert run_export(str(tmp_path / "a"), middle, form, "last", False, "float32") == 0
    assert run_import(str(middle), tmp_path / "b", None, None, None) == 0
    assert run_export(str(tmp_path / "b"), tmp_path / "again.npz", "npz", "last", False, "float32") == 0
    with np.load(tmp_path / "again.npz", allow_pickle=False) as again:
        assert set(again.files) == set(arrays)
        assert all(np.array_equal(again[n], a) for n, a in arrays.items())


@pytest.fixture(scope="module")
def b32(tmp_path_factory) -> Path:
    """A Mixer of a named variant, shrunk in nothing but its blocks' number: as a safetensors file."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("b32") / "w.safetensors"
    save_file(dict(create_model("mixer_s32", 10, 64).state_dict()), path)
    return path


def test_wrong_expectations_name_every_mismatch_and_the_flag(tmp_path, b32):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"(?s)head.weight is \[10, 512\], wanted \[1000, 512\].*--num-classes 10 "):
        import_weights(str(b32), out, num_classes=1000)
    with pytest.raises(UserError, match=r"(?s)fc2.weight \(and 7 more.*blocks.7.*--image-size 64 ") as error:
        import_weights(str(b32), out, image_size=128)
    assert len(str(error.value).splitlines()) == 1 + 3 + 1  # fc1.weight, fc2.weight and fc2.bias
    with pytest.raises(UserError, match=r"(?s)stem.proj.weight is .*--model mixer_s32"):
        import_weights(str(b32), out, model="mixer_s16")
    assert not out.exists()
    imported = import_weights(str(b32), out, model="mixer_s32", image_size=64, num_classes=10)
    assert imported.shape is not None and imported.shape.overrides() == {}
    with pytest.raises(UserError, match="not empty"):
        import_weights(str(b32), out)


def test_missing_and_unknown_tensors_are_named(tmp_path):
    from safetensors.torch import save_file

    state = dict(create_model("mixer_s32", 10, 64, hidden_dim=8, num_blocks=1).state_dict())
    del state["blocks.0.norm2.bias"]
    state["pos_embed"] = torch.zeros(3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"(?s)blocks.0.norm2.bias is missing.*pos_embed \[3\] has no place"):
        import_weights(str(tmp_path / "w.safetensors"), tmp_path / "out")


def test_a_source_without_head_gets_one_on_request(tmp_path):
    from safetensors.torch import save_file

    save_file(
        dict(create_model("mixer_s32", 0, 64, hidden_dim=8, num_blocks=1).state_dict()), tmp_path / "w.safetensors"
    )
    with pytest.raises(UserError, match="--num-classes"):
        import_weights(str(tmp_path / "w.safetensors"), tmp_path / "out")
    import_weights(str(tmp_path / "w.safetensors"), tmp_path / "out", num_classes=3)
    assert TrainedModel.open(str(tmp_path / "out")).num_classes == 3


def test_nothing_is_unpickled(tmp_path):
    for name in ("w.pt", "w.pth", "w.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({}))
        with pytest.raises(UserError, match="pickle"):
            import_weights(str(tmp_path / name), tmp_path / "out")
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="plain arrays"):
        import_weights(str(tmp_path / "w.npz"), tmp_path / "out")
    whole = (tmp_path / "w.npz").read_bytes()
    for name, damaged in (("cut.npz", whole[:-40]), ("other.npz", b"no npz at all"), ("pickle.npz", pickle.dumps({}))):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=r"is no npz file: damaged, cut short") as e:
            import_weights(str(tmp_path / name), tmp_path / "out")
        assert "allow_pickle" not in str(e.value)
    np.savez(tmp_path / "resnet.npz", **{"conv_root/kernel": np.zeros(3)})
    with pytest.raises(UserError, match=r"holds no Mixer.*conv_root"):
        import_weights(str(tmp_path / "resnet.npz"), tmp_path / "out")
    with pytest.raises(UserError, match=r"give an \.npz"):
        import_weights(str(tmp_path / "nothing"), tmp_path / "out")


def test_notes_on_what_timm_says_of_the_weights(tmp_path, b32):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(load_file(b32), folder / "model.safetensors")
    described = {"architecture": "mixer_b16_224", "pretrained_cfg": {"tag": "goog_in21k_ft_in1k", "mean": [0.485] * 3}}
    (folder / "config.json").write_text(json.dumps(described))
    notes = import_weights(str(folder), tmp_path / "out").notes
    assert any("0.485" in n for n in notes) and any("ImageNet-1k alone" in n for n in notes)


# ---- timm


@pytest.fixture
def timm():
    from pipeline.model.timm_compat import import_timm

    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm or torchvision is not installed: {error}")


def printed_lines(folder: Path, out: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run_export(str(folder), out, "timm", "last", False, "float32") == 0
    return "\n".join(line.strip() for line in said.getvalue().splitlines()[1:])


@pytest.mark.compare
def test_timm_loads_with_the_printed_lines_and_computes_the_same(timm, tmp_path):
    """Logits and gradients, of a model that timm has no name for."""
    np.savez(tmp_path / "w.npz", **released_arrays())
    import_weights(str(tmp_path / "w.npz"), tmp_path / "run")
    (tmp_path / "run" / "classes.json").write_text(json.dumps([f"ä{i}" for i in range(K)]))
    scope: dict = {}
    exec(printed_lines(tmp_path / "run", tmp_path / "timm"), scope)
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert described["label_names"][1] == "ä1"
    assert described["pretrained_cfg"]["mean"] == described["pretrained_cfg"]["std"] == [0.5] * 3
    theirs, ours = scope["model"].eval(), network(tmp_path / "run")
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    a, b = ours(images), theirs(images)
    assert (a - b).abs().max() <= 1e-5 and b.abs().max() > 0.1
    a.square().sum().backward()
    b.square().sum().backward()
    for name, p in theirs.named_parameters():
        if not name.endswith("mlp_tokens.fc2.bias"):  # its true gradient is 0
            ours_grad = ours.get_parameter(name).grad
            assert (ours_grad - p.grad).norm() <= 1e-4 * p.grad.norm(), name


@pytest.mark.compare
@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("mixer_")])
def test_the_arguments_written_for_timm_give_every_variant(timm, tmp_path, name):
    from timm.layers import get_act_layer
    from timm.models.mlp_mixer import MlpMixer

    from pipeline.export import write_timm

    model = create_model(name, 1000, device="meta")
    tiny = {"head.weight": torch.zeros(1000, model.norm.weight.shape[0]), "head.bias": torch.zeros(1000)}
    write_imported(tmp_path / "run", tiny, {"model.name": name}, None, {})
    write_timm(tmp_path / "timm", TrainedModel.open(str(tmp_path / "run")), torch.float32)
    c = json.loads((tmp_path / "timm" / "config.json").read_text())
    with torch.device("meta"):
        theirs = MlpMixer(**c["model_args"], act_layer=get_act_layer(c["act_layer"]))
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.compare
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixer_b16", "mixer_h14"])
def test_whole_models_load_in_timm_with_the_printed_lines(timm, tmp_path, name):
    """H/14 has no entry in timm."""
    model = create_model(name, 10)
    torch.nn.init.normal_(model.head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    write_imported(tmp_path / "run", dict(model.state_dict()), {"model.name": name}, None, {})
    scope: dict = {}
    exec(printed_lines(tmp_path / "run", tmp_path / "timm"), scope)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(images) - scope["model"].eval()(images)).abs().max() <= 1e-5
