"""`mixer compare throughput`: five families on a CPU; ratios of what was measured beside the paper's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import as_before
from PIL import Image
from typer.testing import CliRunner

from data_tools.errors import UserError
from pipeline.compare.published import COUNTERPART, PUBLISHED, published_note
from pipeline.compare.throughput import MODES, Bench, Candidate, Options, Timing, cost_of, measure
from pipeline.compare.throughput_report import report
from pipeline.model import ModelCost

TINY = "mixer_s16@32:hidden_dim=32,num_blocks=2,tokens_mlp_dim=16,channels_mlp_dim=64"
LARGER = "mixer_s16@32:hidden_dim=256,num_blocks=8,tokens_mlp_dim=128,channels_mlp_dim=1024"


@pytest.fixture(scope="module")
def timm():
    from pipeline.model.timm_compat import import_timm

    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm or torchvision is not installed: {error}")


def timing(name: str, inference: list[float], training: list[float]) -> Timing:
    candidate = Candidate.parse(name, 224)
    return Timing(
        candidate, ModelCost(10**6, 10**9), dict.fromkeys(MODES, 8), {"inference": inference, "training": training}
    )


@pytest.mark.slow
def test_a_model_a_hundred_times_larger_is_slower_and_training_slower_than_inference(world) -> None:
    candidates = [Candidate.parse(text, 224) for text in (TINY, LARGER)]
    told: list[str] = []
    tiny, larger = measure(candidates, Options([4, 16], "fp32", rounds=2, seconds=0.02), world, told.append)
    assert [len(t.rates[mode]) for t in (tiny, larger) for mode in MODES] == [2] * 4
    for mode in MODES:
        assert (ratio := tiny.ratio(larger, mode)) and ratio > 2
        assert tiny.batch_size[mode] in (4, 16)
    for t in (tiny, larger):
        inference, training = (t.rate(mode) or 0 for mode in MODES)
        assert 0 < training < inference
    assert any("batch size" in text for text in told) and "round 2 of 2" in told


def test_what_is_timed_is_the_model_with_its_values_and_a_training_step_that_learns(world) -> None:
    """Not the zeros which an engine begins with: a device may be faster at those."""
    bench = Bench(Candidate.parse(TINY, 224), Options([4], "fp32"), world)
    model = bench._engine.model
    before = [p.detach().clone() for p in model.parameters() if p.ndim == 2]
    assert sum(bool(p.any()) for p in before) == len(before) - 1  # all but the head
    bench.time("inference", 4, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.ndim == 2)))
    bench.time("training", 4, 0.0)
    assert any(not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.ndim == 2)))


def test_the_ratio_is_taken_within_rounds_and_stands_beside_the_papers(tmp_path: Path) -> None:
    """A machine that gets half as fast from round to round does not change it."""
    timings = [
        timing("mixer_b16", [300, 150, 75], [90, 45, 22.5]),
        timing("timm/vit_base_patch16_224", [200, 100, 50], [60, 30, 15]),
        timing("mixer_l16", [60, 30, 15], [20, 10, 5]),
        timing("timm/vit_large_patch16_224", [50, 25, 12.5], [16, 8, 4]),
        timing("timm/halonet_h1@256", [10, 5, 2.5], [4, 2, 1]),
    ]
    text = report(timings, Options([8]), torch.device("cpu"), tmp_path)
    assert "**mixer_b16 / vit_base_patch16_224: inference 1.50x, training 1.50x**; the paper's inference: 1.61x" in text
    assert (
        "**mixer_l16 / vit_large_patch16_224: inference 1.20x, training 1.25x**; the paper's inference: 1.50x" in text
    )
    halo = next(row for row in text.splitlines() if "halonet" in row)
    assert "0.05x" in halo and "120 (HaloNet-H4, table 2)" in halo
    facts = json.loads((tmp_path / "throughput.json").read_text())
    assert facts["ratios"][0]["paper_inference"] == pytest.approx(1384 / 861)
    assert facts["models"][0]["img_per_s"] == {"inference": 150, "training": 45}
    assert (tmp_path / "throughput.md").read_text() == text + "\n"
    with Image.open(tmp_path / "throughput.png") as picture:
        assert picture.width > 600 and picture.height > 400


def test_published_rates_are_the_papers() -> None:
    rates = [PUBLISHED[name][0].rate for name in ("mixer_h14", "timm/vit_huge_patch14_224")]
    assert rates == [194, 87]
    assert published_note("mixer_l16", 448) == "105"
    assert published_note("mixer_l16", 256) == "105 (448 px)"
    assert published_note("timm/vit_small_patch16_224", 224) == ""
    assert all(twin.startswith("timm/vit_") for twin in COUNTERPART.values())


@pytest.mark.compare
def test_what_a_model_does_not_take_is_said(timm) -> None:
    with pytest.raises(UserError, match=r"halonet_h1 does not take images of 224 px.*timm/halonet_h1@256"):
        cost_of(Candidate.parse("timm/halonet_h1", 224), 1000)
    with pytest.raises(UserError, match="did you mean 'mixer_b16'"):
        cost_of(Candidate.parse("mixer_b61", 224), 1000)
    with pytest.raises(UserError, match="no setting width; one of patch_size"):
        Candidate.parse("mixer_b16:width=3", 224)
    with pytest.raises(UserError, match="is no model: write NAME"):
        Candidate.parse("mixer_b16@large", 224)


@pytest.mark.slow
@pytest.mark.compare
def test_five_families_run_on_a_cpu(timm, tmp_path: Path) -> None:
    from launch.cli import app

    command = ["compare", "throughput", "--small", "--device", "cpu", "--rounds", "2", "--seconds", "0.1"]
    with as_before():
        done = CliRunner().invoke(app, [*command, "--batch-size", "4", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "throughput.json").read_text())
    families = ("mixer_", "timm/vit_", "timm/resnetv2_", "timm/halonet", "timm/test_nfnet")
    assert len(facts["models"]) == len(families)
    for model, family in zip(facts["models"], families):
        assert model["model"].startswith(family)
        assert model["img_per_s"]["inference"] > model["img_per_s"]["training"] > 0
    assert facts["ratios"][0]["inference"] > 0.3
    assert "**mixer_s16" in done.output and (tmp_path / "throughput.png").exists()
