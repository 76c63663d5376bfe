"""Fine-tuning: growth to a higher resolution exactly as the paper's appendix C, new heads, folders as targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_MODEL, as_before, picture, png, train, write_dataset
from PIL import Image

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose
from pipeline.cli import run_training
from pipeline.config import load_config
from pipeline.data.folder import FolderSource
from pipeline.data.source import open_source
from pipeline.model import create_model
from pipeline.weights.begin import grow, growth
from pipeline.weights.finetune import finetune_settings
from pipeline.weights.trained import TrainedModel

SHAPE = {"patch_size": 4, "hidden_dim": 16, "num_blocks": 3, "channels_mlp_dim": 24}


def mixer(image_size: int, tokens_mlp_dim: int) -> torch.nn.Module:
    model = create_model("mixer_s16", 5, image_size, tokens_mlp_dim=tokens_mlp_dim, **SHAPE).double()
    g = torch.Generator().manual_seed(3)
    for p in model.parameters():  # every bias and norm away from its start
        p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model


@pytest.mark.parametrize("tiles", [2, 3])
def test_features_of_a_large_image_are_the_mean_over_its_tiles(tiles):
    small, side = mixer(12, 7), 3
    large = create_model("mixer_s16", 5, 12 * tiles, tokens_mlp_dim=7 * tiles**2, **SHAPE).double()
    large.load_state_dict({n: grow(n, p.detach(), side, tiles) for n, p in small.named_parameters()})
    images = torch.randn(4, 3, 12 * tiles, 12 * tiles, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [t for row in images.chunk(tiles, 2) for t in row.chunk(tiles, 3)]
    with torch.no_grad():
        mean = torch.stack([small.forward_features(t) for t in parts]).mean(0)
        assert (large.forward_features(images) - mean).abs().max() <= 1e-14
        # Without the permutation from tile order to raster order it would not be so
        name = "blocks.0.mlp_tokens.fc1.weight"
        wrong = torch.block_diag(*[small.get_parameter(name).detach()] * tiles**2)
        large.get_parameter(name).copy_(wrong)
        assert (large.forward_features(images) - mean).abs().max() > 1e-3


def test_a_size_that_is_no_multiple_says_which_are():
    with pytest.raises(UserError, match=r"384 is not a multiple of the 224 pixels .*224, 448, 672 are"):
        growth(224, 384, "runs/b16")
    assert growth(224, 448, "") == 2


# ---- whole runs


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finetune") / "source"
    assert train(run, "train.duration=3 steps", "train.ema_decay=0.5") == 0
    return run


def image_folder(root: Path, classes: int = 3, each: int = 8) -> Path:
    for i in range(classes * each):
        path = root / f"class{i % classes}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(i, 9, 11)))
    return root


SMALL = [
    "train.duration=2 steps",
    "train.global_batch_size=8",
    "train.precision=fp32",
    "train.strategy=ddp",
    "scheduler.warmup=1 steps",
    "data.num_workers=0",
    "logging.to=[]",
    "eval.every=null",
]


def finetune(source: Path, out: Path, *overrides: str, **options) -> CheckpointReader:
    recipe, settings = finetune_settings(str(source), "finetune", [*SMALL, f"run.dir={out}", *overrides], **options)
    with as_before():
        assert run_training(load_config(recipe, settings).config, set()) == 0
    return CheckpointReader(choose(out / "checkpoints", "last"))


def test_the_recipe_is_the_papers(source):
    recipe, settings = finetune_settings(str(source), "finetune", ["data.train=x"])
    c = load_config(recipe, settings).config
    assert (c.optimizer.name, c.optimizer.momentum, c.optimizer.weight_decay) == ("sgd", 0.9, 0)
    assert (c.optimizer.clip_grad_norm, c.scheduler.name, c.train.global_batch_size) == (1.0, "cosine", 512)
    assert (c.model.hidden_dim, c.model.tokens_mlp_dim, c.run.init_head) == (16, 8, "zero")
    assert c.scheduler.warmup == "500 steps" and c.model.num_classes is None


@pytest.mark.parametrize("ema", [False, True])
def test_a_folder_of_images_with_other_classes_is_a_target(source, tmp_path, ema):
    """The first update has learning rate 0 (the count starts at 0): after it the weights are the source's."""
    folder = image_folder(tmp_path / "images")
    reader = finetune(source, tmp_path / "run", f"data.train={folder}", "train.duration=1 steps",
                      "scheduler.warmup=0 steps", "optimizer.lr=1e-20", ema=ema)  # fmt: skip
    before = CheckpointReader(choose(source / "checkpoints", "last"))
    for name, kind in reader.manifest.tensors:
        if kind == "weight" and not name.startswith("head"):
            assert torch.equal(reader.tensor(name), before.tensor(name, "ema" if ema else "weight")), name
    assert reader.shape("head.weight") == (3, 16)
    assert reader.tensor("head.weight").abs().max() < 1e-18  # a zero head, and an update of next to nothing
    moments = {k for _, k in reader.manifest.tensors}
    assert moments == {"weight", "momentum_buffer"}


def test_a_higher_resolution_grows_the_run(source, tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    run = tmp_path / "run"
    reader = finetune(source, run, f"data.train={folder}", "model.image_size=16", "optimizer.lr=1e-20",
                      "scheduler.warmup=0 steps")  # fmt: skip
    assert "grown for 2x2 tiles" in capsys.readouterr().out
    before = CheckpointReader(choose(source / "checkpoints", "last"))
    for name in ("blocks.1.mlp_tokens.fc1.weight", "blocks.0.mlp_tokens.fc2.bias"):
        torch.testing.assert_close(reader.tensor(name), grow(name, before.tensor(name), 2, 2), rtol=0, atol=1e-18)
    again = TrainedModel.open(str(run))  # config.yaml knows the grown shape
    assert again.network("meta").get_parameter("blocks.0.mlp_tokens.fc1.weight").shape == (32, 16)
    with pytest.raises(UserError, match="12 is not a multiple of the 8 pixels"):
        finetune_settings(str(source), "finetune", ["model.image_size=12"])


def test_weights_that_do_not_fit_say_how_they_would(source, tmp_path):
    other = [o for o in TINY_MODEL if "num_classes" not in o]
    with pytest.raises(UserError, match=r"(?s)head.weight is \[4, 16\], wanted \[9, 16\].*run.init_head=zero"):
        train(tmp_path / "a", *other, "model.num_classes=9", f"run.init_from={source}")
    with pytest.raises(UserError, match=r"(?s)fc1.weight.*model.tokens_mlp_dim=32"):
        train(tmp_path / "b", *TINY_MODEL, "model.image_size=16", f"run.init_from={source}")


def test_imported_weights_are_no_run_to_resume(source, tmp_path):
    from pipeline.weights.importing import import_weights

    import_weights(str(source), tmp_path / "imported")
    config = load_config(str(tmp_path / "imported" / "config.yaml"), ["data.train=synthetic"]).config
    with as_before(), pytest.raises(UserError, match="mixer finetune"):
        run_training(config, set())
    assert finetune(tmp_path / "imported", tmp_path / "run", "data.train=synthetic").shape("head.weight") == (10, 16)


# ---- folders of images


def test_splits_classes_and_order_of_a_folder(tmp_path):
    image_folder(tmp_path / "train", classes=3, each=2)
    image_folder(tmp_path / "val", classes=2, each=2)  # one class has no image here
    (tmp_path / "val" / "class1" / ".hidden.png").write_bytes(b"")
    (tmp_path / "val" / "class1" / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path), "val", image_size=8, num_classes=None)
    assert isinstance(source, FolderSource)
    assert source.classes == ["class0", "class1", "class2"] and source.splits == ["train", "val"]
    assert source.labels().tolist() == [0, 0, 1, 1] and source.shard_sizes == [4]
    sample = source.read(2, 3)
    assert np.array_equal(sample.pixels, np.asarray(Image.open(tmp_path / "val" / "class1" / "001.png")))
    assert sample.label == 1 and source.sample_name(2) == "001.png"
    assert source.crc32(np.array([2]))[0] == sample.crc32
    digest = source.digest
    (tmp_path / "val" / "class1" / "009.png").write_bytes(png(picture(9)))
    assert open_source(str(tmp_path), "val", image_size=8, num_classes=None).digest != digest


def test_label_and_name_of_every_sample_without_reading_images(tmp_path):
    from helpers import members, shards_of

    write_dataset(tmp_path / "set", {"train": shards_of(members(7), [4, 3])})
    source = open_source(str(tmp_path / "set"), "train", image_size=8, num_classes=None)
    assert source.labels().tolist() == [m.label for m in members(7)]
    assert source.sample_name(5) == "00100001.png"
    synthetic = open_source("synthetic", "val", image_size=8, num_classes=4)
    assert synthetic.labels()[:5].tolist() == [synthetic.read(i, 3).label for i in range(5)]


def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "class0").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_source(str(tmp_path), "train", image_size=8, num_classes=None)
