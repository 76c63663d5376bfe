"""ViT, BiT, NFNet (gains without dimensions) and HaloNet (BatchNorm) under every strategy, tiny and real."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import science_cases as cases
import torch
from torch import nn

from pipeline.checkpoint.layout import CheckpointReader
from pipeline.optim import param_groups

pytestmark = pytest.mark.compare
MODELS = ("vit", "bit", "nfnet", "halonet")
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
QUICK = {("vit", "fsdp"), ("nfnet", "zero3"), ("halonet", "fsdp"), ("bit", "ddp")}
MATRIX = [
    pytest.param(m, s, marks=[] if (m, s) in QUICK else pytest.mark.slow, id=f"{m}-{s}")
    for m in MODELS
    for s in STRATEGIES
]


@pytest.fixture(scope="module", autouse=True)
def _timm():
    try:
        cases.import_timm()
    except ImportError as error:
        pytest.skip(f"timm or torchvision is not installed: {error}")


@cache
def plain(name: str) -> list[float]:
    """Four steps in plain torch: one process, the whole batch at once."""
    model = cases.timm_model(name, "cpu").train()
    session = cases.TimmSession.__new__(cases.TimmSession)
    session.name = name
    source = session.initial()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(source.read(n, "weight", 0, p.numel()).view(p.shape))
    groups = [{k: v for k, v in g.items() if k != "names"} for g in param_groups(model, 0.1)]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    losses = []
    for step in range(4):
        images, labels, keep = cases.timm_batch(name, step, model.drop_rates())
        loss = nn.functional.cross_entropy(model(images.float() / 127.5 - 1, keep), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "strategy"), MATRIX)
def test_trains_as_plain_torch_and_resumes_bit_for_bit(ranks, tmp_path: Path, name: str, strategy: str) -> None:
    """Masks are keyed by the sample, so that ranks and micro-batches change nothing; BatchNorm alone is another
    function there, and is only asked to resume."""
    results = ranks(2).run(cases.timm_interrupted, name, strategy, str(tmp_path))
    whole, resumed, end, again = results[0]
    assert all(r[0] == whole for r in results)
    assert resumed == whole[2:]
    a, b = (CheckpointReader(Path(f)) for f in (end, again))
    assert a.digest() == b.digest()
    if name != "halonet":
        np.testing.assert_allclose(whole, plain(name), rtol=1e-5, atol=2e-5)
    kinds = {k for _, k in a.manifest.tensors}
    assert ("buffer" in kinds) == (name == "halonet")
    if name == "nfnet":
        gains = [n for (n, k), s in a.manifest.tensors.items() if k == "weight" and s == ()]
        assert len(gains) == 4 and all(n.endswith("skipinit_gain") for n in gains)


@pytest.mark.parametrize("name", ["vit", "nfnet", pytest.param("halonet", marks=pytest.mark.slow)])
def test_another_strategy_and_world_size_go_on(ranks, tmp_path: Path, name: str) -> None:
    whole, *_ = ranks(2).run(cases.timm_interrupted, name, "zero1", str(tmp_path))[0]
    losses = ranks(3).run(cases.timm_go_on, name, "fsdp", str(tmp_path / "step-00000002"))[0]
    if name == "halonet":  # the data go on exactly; the statistics of other micro-batches are others
        assert np.isfinite(losses).all()
    else:
        np.testing.assert_allclose(losses, whole[2:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "strategy"), [("vit", "fsdp"), pytest.param("bit", "zero2", marks=pytest.mark.slow)])
def test_recomputed_blocks_see_the_same_masks(ranks, tmp_path: Path, name: str, strategy: str) -> None:
    plainly = ranks(2).run(cases.timm_interrupted, name, strategy, str(tmp_path / "a"))[0][0]
    recomputed = ranks(2).run(cases.timm_interrupted, name, strategy, str(tmp_path / "b"), 2, "block")[0][0]
    assert recomputed == plainly


def test_blocks_are_the_boundaries(ranks):
    assert {m: len(cases.timm_model(m, "meta").blocks) for m in MODELS} == {
        "vit": 2,
        "bit": 4,
        "nfnet": 4,
        "halonet": 3,
    }
