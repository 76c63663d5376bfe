"""The plan against what is really there: saved activations, the peak of a real step, the state that engines hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker

from pipeline.data.loader import PADDING, Batch
from pipeline.losses import make_loss
from pipeline.model import create_model, model_cost
from pipeline.model.variants import resolve
from pipeline.optim import param_groups
from pipeline.parallel.blocks import prepare_blocks
from pipeline.parallel.engine import EngineOptions, make_engine
from pipeline.plan import (
    DEVICES,
    STRATEGIES,
    Assumptions,
    Setting,
    activation_bytes,
    best_save_interval,
    largest_micro_batch,
    memory,
    outlook,
    speed,
)

SMALL = {"patch_size": 16, "hidden_dim": 256, "num_blocks": 4}
ASSUMED = Assumptions()


def setting(name: str = "mixer_s16", size: int = 112, **more: object) -> Setting:
    overrides = SMALL if name == "mixer_s16" else {}
    base = Setting(
        resolve(name, **overrides), (size, size), 1000, model_cost(name, 1000, size, **overrides), "ddp", 8, 8, 1, 1
    )
    return replace(base, **more)  # type: ignore[arg-type]


def saved_bytes(s: Setting, images: int) -> int:
    """What autograd really keeps of a forward pass, without the parameters."""
    model = create_model("mixer_s16", 1000, s.image_size[0], **SMALL)
    prepare_blocks(model, s.activation_checkpointing, "none")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = t
        return t

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=s.precision == "bf16", cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), bf16:
        out = model(torch.rand(images, 3, *s.image_size), None)
        make_loss("softmax_xent", 0.0)(out.float(), torch.zeros(images, dtype=torch.int64)).sum()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_activations_are_what_autograd_keeps(precision: str, checkpointing: str) -> None:
    s = setting(precision=precision, activation_checkpointing=checkpointing, cuda=False)
    an_image = (saved_bytes(s, 12) - saved_bytes(s, 4)) / 8
    assert activation_bytes(s) == pytest.approx(an_image, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_peak_of_a_real_step(world, precision: str, checkpointing: str) -> None:
    """Everything that is allocated during a step on one rank: state, activations, work."""
    s = setting(precision=precision, activation_checkpointing=checkpointing, cuda=False, micro_batch_size=32)
    model = create_model("mixer_s16", 1000, s.image_size[0], device="meta", **SMALL)
    options = EngineOptions(
        "ddp", precision, 32, 32, 1, (0.9, 0.999), 1e-8, 1.0, activation_checkpointing=checkpointing
    )
    engine = make_engine(model, param_groups(model, 0.1), make_loss("softmax_xent", 0.0), options, world)
    images = torch.zeros(32, 3, *s.image_size, dtype=torch.uint8)
    batch = Batch(
        images,
        torch.zeros(32, dtype=torch.int64),
        torch.ones(32),
        torch.ones(32, 0),
        torch.full((32,), PADDING),
        torch.zeros(32, dtype=torch.int64),
        [],
    )
    engine.warm_up(batch)
    tracker = MemTracker()
    tracker.track_external(engine.model, engine._inner_optimizer())
    with tracker:
        engine.train_step([batch], 1e-3)
    [peak] = tracker.get_tracker_snapshot("peak").values()
    assert memory(s).total == pytest.approx(peak["Total"], rel=0.12)


CLUSTERS = st.builds(
    setting,
    name=st.sampled_from(["mixer_s32", "mixer_b16", "mixer_l16", "mixer_h14"]),
    size=st.just(224),
    strategy=st.sampled_from(STRATEGIES),
    global_batch_size=st.integers(1, 64).map(lambda k: k * 4096),
    micro_batch_size=st.integers(1, 256),
    nodes=st.integers(1, 64),
    gpus_per_node=st.sampled_from([1, 2, 4, 8]),
    precision=st.sampled_from(["bf16", "fp32"]),
    compile=st.sampled_from(["none", "block"]),
    activation_checkpointing=st.sampled_from(["none", "block", "selective"]),
)


@given(CLUSTERS, st.sampled_from(sorted(DEVICES)))
def test_the_largest_micro_batch_fits_and_one_more_does_not(s: Setting, gpu: str) -> None:
    device = DEVICES[gpu]
    free = device.memory * ASSUMED.usable - ASSUMED.context
    micro = largest_micro_batch(s, device, ASSUMED)
    share = -(-s.global_batch_size // s.ranks)
    assert 0 <= micro <= share
    if micro:
        assert memory(replace(s, micro_batch_size=micro)).total <= free * (1 + 1e-9)
    if micro < share:
        assert memory(replace(s, micro_batch_size=micro + 1)).total > free * (1 - 1e-9)


@given(CLUSTERS)
def test_more_of_what_costs_costs_more(s: Setting) -> None:
    device = DEVICES["h100"]
    pace = speed(s, device, ASSUMED)
    assert 0 < pace.mfu <= ASSUMED.mfu_compiled
    assert pace.img_per_s == pytest.approx(s.global_batch_size / pace.step_s)
    run = outlook(s, pace, 10_000, 900.0, ASSUMED)
    fragile = outlook(s, pace, 10_000, 900.0, replace(ASSUMED, gpu_hours_a_failure=500.0))
    assert fragile.goodput < run.goodput < 1 and fragile.wall_h > run.wall_h > run.compute_h
    assert run.gpu_hours == pytest.approx(run.wall_h * s.ranks)
    assert memory(replace(s, micro_batch_size=s.micro_batch_size + 1)).total > memory(s).total
    kept = [activation_bytes(replace(s, activation_checkpointing=c)) for c in ("block", "selective", "none")]
    assert kept[0] < kept[1] <= kept[2] or s.compile == "block"
    best = best_save_interval(s, ASSUMED)

    def lost(every: float) -> float:
        calm = replace(ASSUMED, down_s=0.0)
        return 1 / outlook(s, pace, 10_000, every, calm).goodput

    assert lost(best) <= min(lost(best * 0.8), lost(best * 1.25))


def test_h14_costs_what_the_paper_implies() -> None:
    """14 epochs of 300M images at batch 4096: 1.03M steps and 3,050 EFLOP by 6 FLOP a MAC."""
    s = setting(
        "mixer_h14", 224, num_classes=18000, nodes=16, gpus_per_node=8, global_batch_size=4096, micro_batch_size=32
    )
    s = replace(s, cost=model_cost("mixer_h14", 18000, 224))
    run = outlook(s, speed(s, DEVICES["h100"], ASSUMED), 1_025_390, 900.0, ASSUMED)
    assert run.exaflop == pytest.approx(3050, rel=0.01)


def test_the_command_speaks_to_people_and_programs_without_torch() -> None:
    code = "import sys; from launch.cli import main\n"
    code += "sys.argv = ['mixer', 'plan', 'mixer_b16_i1k', *sys.argv[1:]]\n"
    code += "try: main()\nexcept SystemExit as e: code = e.code\n"
    code += "assert 'torch' not in sys.modules\nsys.exit(code)"

    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)

    text = plan("--samples", "1281167").stdout
    assert "59.88M parameters, 75.6 GFLOP" in text and "GPU hours" in text and "assumed: mfu_eager" in text
    facts = json.loads(plan("--samples", "1281167", "train.strategy=zero3", "--nodes", "4", "--json").stdout)
    assert facts["chosen"] == "zero3" and facts["gpus"] == 32 and facts["run"]["steps"] == 93_600
    assert [r["strategy"] for r in facts["strategies"]] == list(STRATEGIES)
    no_epoch = plan()
    assert no_epoch.returncode == 1 and "--samples N" in no_epoch.stderr
    too_big = plan("--samples", "1281167", "--gpu", "a10", "model.hidden_dim=16384", "--gpus-per-node", "1")
    assert too_big.returncode == 1 and "does not fit NVIDIA A10" in too_big.stderr
