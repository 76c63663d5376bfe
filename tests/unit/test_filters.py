"""Pictures of weights: planted frequencies and inverses come out in order, and every pixel is the weight's."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import train
from PIL import Image

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.model import create_model
from pipeline.parallel.engine import EMA, WEIGHT
from pipeline.weights.commands import run_export, run_picture
from pipeline.weights.filters import (
    inverse_pairs,
    layer_name,
    mean_frequency,
    parse_layers,
    sort_units,
    stem_picture,
    token_grid,
    token_mixing_picture,
    training_pictures,
)


def wave(rows: int, cols: int, u: int, v: int, phase: float = 0.0) -> np.ndarray:
    """u and v periods along the rows and columns of a grid [rows, cols]."""
    y, x = np.mgrid[:rows, :cols]
    return np.cos(2 * np.pi * (u * y / rows + v * x / cols) + phase)


@pytest.mark.parametrize(("rows", "cols"), [(14, 14), (7, 7), (4, 10)])
def test_a_plane_wave_has_its_own_frequency(rows, cols):
    for u, v in [(0, 0), (0, 1), (1, 0), (1, 2), (rows // 2, 0), (1, cols // 2)]:
        filters = np.stack([wave(rows, cols, u, v), 1e-3 * wave(rows, cols, u, v, phase=1.0)])
        assert mean_frequency(filters) == pytest.approx([np.hypot(u / rows, v / cols)] * 2, abs=1e-12)
    two = wave(rows, cols, 1, 0) + wave(rows, cols, 0, 2)  # of equal power: the mean
    assert mean_frequency(two[None]) == pytest.approx([(1 / rows + 2 / cols) / 2])
    assert mean_frequency(np.zeros((1, rows, cols))) == [0]


def test_the_channels_of_a_filter_count_by_their_power():
    red = np.stack([2 * wave(8, 8, 0, 1), np.zeros((8, 8)), wave(8, 8, 0, 3)])
    assert mean_frequency(red[None]) == pytest.approx([(4 * 1 / 8 + 1 * 3 / 8) / 5])


def test_planted_inverses_find_each_other_whatever_their_size():
    rng = np.random.default_rng(0)
    units = np.concatenate([base := rng.normal(size=(20, 49)), -base * rng.uniform(0.01, 9, (20, 1))])
    units = np.concatenate([units, np.zeros((2, 49))])  # dead ones are nobody's inverse
    shuffled = rng.permutation(42)
    pairs = inverse_pairs(units[shuffled])
    found = {frozenset((int(shuffled[i]), int(shuffled[j]))): cosine for i, j, cosine in pairs}
    assert set(found) == {frozenset((k, k + 20)) for k in range(20)} | {frozenset((40, 41))}
    assert all(c == pytest.approx(-1) for pair, c in found.items() if 40 not in pair)


def test_units_are_shown_from_low_to_high_frequency_each_beside_its_inverse():
    rows, cols = 6, 10
    planted = [(0, 0), (0, 1), (1, 0), (1, 3), (2, 2), (3, 4)]  # ever higher
    units = np.stack([s * wave(rows, cols, u, v, 0.3) for u, v in planted for s in (1, -2)]).reshape(12, -1)
    place = np.random.default_rng(1).permutation(13)
    units = np.concatenate([units, 1e-3 * wave(rows, cols, 0, 2).reshape(1, -1)])  # has no inverse: comes last
    order, frequency, cosines = sort_units(units[place], rows, cols)
    shown = place[order]
    assert (shown[:12] // 2).tolist() == [k for k in range(6) for _ in range(2)] and shown[12] == 12
    assert np.all(np.diff(frequency[order][:12]) > -1e-12) and cosines == pytest.approx([-1] * 6)


def tiles(picture: np.ndarray, height: int, width: int, count: int, columns: int) -> list[np.ndarray]:
    """The tiles of a grid with margins of two pixels; what lies between them must be white."""
    rest, found = picture.astype(int), []
    for i in range(count):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        found.append(rest[top : top + height, left : left + width].copy())
        rest[top : top + height, left : left + width] = 255
    assert (rest == 255).all()
    return found


def test_every_pixel_of_a_token_mixing_picture():
    units = np.array([[0, 1, -1, 0.5, 0, 0], [4, 0, 0, 0, -2, 0], [0, 0, 0, 0, 0, 0]], dtype=np.float32)
    picture = token_mixing_picture(units, 2, 3, [1, 0, 2])
    grey = {1: [255, 128, 128, 128, 64, 128], 0: [128, 255, 0, 191, 128, 128], 2: [128] * 6}
    assert picture.shape == (20 + 2, 3 * 29 + 2, 3) and picture.dtype == np.uint8  # 28 // 3 = 9 pixels a token
    for unit, tile in zip([1, 0, 2], tiles(picture, 18, 27, 3, 3)):
        wanted = np.array(grey[unit]).reshape(2, 3).repeat(9, 0).repeat(9, 1)
        assert (tile == wanted[..., None]).all(), unit


def test_every_pixel_of_a_stem_picture():
    high = np.zeros((3, 2, 2))
    high[0] = [[1, -1], [-1, 1]]  # a red checkerboard
    low = np.broadcast_to(np.array([0.2, 0.1, -0.2])[:, None, None], (3, 2, 2))
    picture = stem_picture(np.stack([high, low]))
    first, second = tiles(picture, 28, 28, 2, 2)
    assert (first == [255, 191, 0]).all()
    red = np.array([[255, 0], [0, 255]]).repeat(14, 0).repeat(14, 1)
    assert (second[..., 0] == red).all() and (second[..., 1:] == 128).all()
    grey = stem_picture(np.ones((5, 1, 32, 32)))
    assert grey.shape == (2 * 34 + 2, 4 * 34 + 2, 3)
    with pytest.raises(UserError, match="4 channels"):
        stem_picture(np.ones((5, 4, 2, 2)))


def test_the_b16_of_the_paper_has_24_units_a_row():
    units = np.random.default_rng(0).normal(size=(384, 196))
    order, _, cosines = sort_units(units, 14, 14)
    assert sorted(order) == list(range(384)) and len(cosines) == 192
    assert token_mixing_picture(units, 14, 14, order).shape == (16 * 30 + 2, 24 * 30 + 2, 3)


@pytest.mark.parametrize("text", ["4x5", "6", "2x", "0x0", "-2x-3"])
def test_a_grid_that_does_not_fit_is_refused(text):
    assert token_grid(6, "2x3") == (2, 3) and token_grid(9) == (3, 3)
    with pytest.raises(UserError, match="--grid"):
        token_grid(6, text)
    with pytest.raises(UserError, match=r"6 tokens are no square.*--grid ROWSxCOLS"):
        token_grid(6)


def test_layers_are_counted_from_1():
    assert parse_layers("1-3,2,5", 5) == [1, 2, 3, 5] and parse_layers("all", 2) == [1, 2]
    for text in ("0", "6", "3-2", "2-9", "", "a"):
        with pytest.raises(UserError, match="of 1 to 5"):
            parse_layers(text, 5)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "run"
    assert train(folder, "train.ema_decay=0.5", "model.image_size=12") == 0  # 3x3 tokens
    return folder


def draw(source: Path, out: Path, which: str = "last", *, ema: bool = False, layers: str = "all") -> dict[str, bytes]:
    assert run_picture(str(source), out, which, ema, layers, None) == 0
    return {p.name: p.read_bytes() for p in out.iterdir()}


def shown_units(path: Path, count: int, columns: int, side: int, factor: int) -> np.ndarray:
    """The grey of each unit's tokens, read off a picture: [count, S]."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    found = tiles(picture, side * factor, side * factor, count, columns)
    return np.stack([t[::factor, ::factor, 0].reshape(-1) for t in found])


@pytest.mark.parametrize("kind", [WEIGHT, EMA])
def test_the_pictures_of_a_run_are_its_weights(run, tmp_path, capsys, kind):
    names = draw(run, tmp_path, "step-4", ema=kind == EMA)
    assert sorted(names) == ["stem.png", "token-mixing-layer01.png", "token-mixing-layer02.png"]
    reader = CheckpointReader(run / "checkpoints" / "step-00000004")
    for layer in (1, 2):
        units = reader.tensor(layer_name(layer), kind).numpy()
        shown = shown_units(tmp_path / f"token-mixing-layer{layer:02d}.png", 8, 4, 3, 9)
        grey = np.rint(127.5 + 127.5 * units / np.abs(units).max(1, keepdims=True)).astype(int)
        assert sorted(shown.tolist()) == sorted(grey.tolist())
        order, _, _ = sort_units(units, 3, 3)
        assert (shown == grey[order]).all()
    said = capsys.readouterr().out
    assert "layer 2: 8 units over 3x3 tokens" in said and "3 pictures" in said


def test_where_the_pictures_of_a_run_go(run, tmp_path):
    assert run_picture(str(run / "checkpoints" / "step-00000008"), None, "last", True, "2", None) == 0
    found = run / "pictures" / "step-00000008-ema"
    assert sorted(p.name for p in found.iterdir()) == ["stem.png", "token-mixing-layer02.png"]
    assert draw(run, tmp_path, ema=True, layers="2") == {p.name: p.read_bytes() for p in found.iterdir()}


@pytest.mark.parametrize("form", ["npz", "timm", "safetensors"])
def test_weights_from_elsewhere_give_the_same_pictures(run, tmp_path, form):
    target = tmp_path / ("timm" if form == "timm" else f"weights.{form}")
    assert run_export(str(run), target, form, "last", False, "float32") == 0
    assert draw(target, tmp_path / "a") == draw(run, tmp_path / "b")
    with pytest.raises(UserError, match="no run: --ema"):
        draw(target, tmp_path / "c", ema=True)


def test_tokens_that_are_no_square_need_a_grid(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    model = create_model("mixer_s16", 3, (8, 12), patch_size=4, hidden_dim=16, num_blocks=1)
    save_file(dict(model.state_dict()), tmp_path / "wide.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="6 tokens are no square"):
        run_picture("wide.safetensors", None, "last", False, "all", None)
    assert run_picture("wide.safetensors", None, "last", False, "all", "2x3") == 0
    picture = np.asarray(Image.open(tmp_path / "wide-pictures" / "token-mixing-layer01.png"))
    assert picture.shape == (2 * 20 + 2, 4 * 29 + 2, 3)


def test_what_is_no_mixer_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="no Mixer"):
        draw(tmp_path / "w.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(training_pictures(["head.weight"], lambda name: np.zeros((2, 2)))) == []


@pytest.mark.parametrize(("every", "steps"), [("3 steps", [2, 6, 7]), ("1 h", [2, 7]), ("null", [])])
def test_pictures_while_training(tmp_path, every, steps):
    """At saves, as far apart as asked for, and at the end; of a sharded model too, since they come from the files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ["train.strategy=fsdp", "train.duration=7 steps", "checkpoint.every=2 steps", "checkpoint.keep_last=9",
                "checkpoint.background=false", "logging.to=[tensorboard]"]  # fmt: skip
    assert train(tmp_path, *settings, f"logging.pictures_every={every}") == 0
    board = EventAccumulator(str(tmp_path / "tb"), {"images": 0})
    board.Reload()
    tags = [t for t in board.Tags()["images"] if t.startswith("weights/")]
    assert tags == (["weights/stem", "weights/token_mixing_1", "weights/token_mixing_2"] if steps else [])
    for tag in tags:
        assert [event.step for event in board.Images(tag)] == steps
        for event in board.Images(tag):
            reader = CheckpointReader(tmp_path / "checkpoints" / f"step-{event.step:08d}")
            names = [n for n, kind in reader.manifest.tensors if kind == WEIGHT]
            wanted = dict(training_pictures(names, lambda n, reader=reader: reader.tensor(n).numpy()))[tag]
            with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
                assert (np.asarray(shown) == wanted).all()
