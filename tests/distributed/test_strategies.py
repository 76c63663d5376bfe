"""Every strategy at 1 to 4 ranks trains the same function as a few lines of plain torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest
from engine_cases import BATCH, STRATEGIES, Spec, Trained, plain_training, read_whole
from helpers import needs_compiler
from rank_pool import RANK_TIMEOUT

from pipeline.checkpoint.layout import CheckpointReader

SIZES = (1, 2, 3, 4)
STEPS = 6
# What `verify` must have found, by strategy and by whether there is more than one rank
RUNNING = {
    "hsdp": "HSDP, 2 copies",
    "ddp": "DDP",
    "fsdp": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
FP32_TOLERANCE = 1e-6  # measured: 4.1e-7 at most over 6 steps, all strategies, 1 to 4 ranks; losses are about 2.3
BF16_TOLERANCE = 5e-3  # measured: 1.7e-3 at most, likewise


@cache
def reference() -> Trained:
    return plain_training(range(STEPS))


@pytest.mark.parametrize(("strategy", "size"), [(s, n) for s in STRATEGIES for n in SIZES] + [("hsdp", 4)])
def test_agrees_with_plain_torch(ranks, tmp_path: Path, strategy: str, size: int) -> None:
    outcomes = ranks(size).run(cases.train, Spec(strategy), str(tmp_path), STEPS)

    assert all(o.running.startswith(RUNNING[strategy]) for o in outcomes)
    assert all(o.losses == outcomes[0].losses for o in outcomes)
    np.testing.assert_allclose(outcomes[0].losses, reference().losses, rtol=0, atol=FP32_TOLERANCE)
    for o in outcomes:  # every rank knows the norm of the whole gradient
        np.testing.assert_allclose(o.norms, reference().norms, rtol=1e-5)
    assert max(reference().norms) > cases.CLIP, "the problem must be one that is clipped"

    saved = read_whole(outcomes[0].folder)
    for (name, kind), tensor in reference().tensors.items():
        if name.endswith("mlp_tokens.fc2.bias") and kind == "weight":
            # It adds the same to all channels, which every LayerNorm after it takes away: its gradient is rounding
            # noise around 0, and Adam scales noise to the size of any other gradient.
            continue
        np.testing.assert_allclose(
            saved[name, kind], tensor.reshape(-1).numpy(), rtol=1e-3, atol=2e-6, err_msg=f"{kind} of {name}"
        )


@pytest.mark.parametrize("strategy", [*STRATEGIES, "hsdp"])
def test_sgd_agrees_with_plain_torch(ranks, tmp_path: Path, strategy: str) -> None:
    plain = plain_training(range(STEPS), optimizer="sgd")
    size = 4 if strategy == "hsdp" else 3
    outcome = ranks(size).run(cases.train, Spec(strategy, optimizer="sgd"), str(tmp_path), STEPS)[0]
    np.testing.assert_allclose(outcome.losses, plain.losses, rtol=0, atol=FP32_TOLERANCE)
    saved = read_whole(outcome.folder)
    for (name, kind), tensor in plain.tensors.items():
        np.testing.assert_allclose(
            saved[name, kind], tensor.reshape(-1).numpy(), rtol=1e-3, atol=2e-6, err_msg=f"{kind} of {name}"
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_weights_stay_and_statistics_move(ranks, tmp_path: Path, strategy: str) -> None:
    saved = read_whole(ranks(2).run(cases.train, Spec(strategy), str(tmp_path), 2)[0].folder)
    for name in cases.FROZEN:
        wanted = cases.initial_value(name, tuple(cases.build_model().get_parameter(name).shape))
        np.testing.assert_array_equal(saved[name, "weight"], wanted.reshape(-1).numpy())
        assert (name, "exp_avg") not in saved
    assert saved["watch.num_batches_tracked", "buffer"] == 2 * 3  # 7 slots in micro-batches of 3, twice
    assert (saved["watch.running_mean", "buffer"] != 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", ["gradient", "loss"])
def test_a_sick_step_on_one_rank_is_skipped_on_all(ranks, tmp_path: Path, strategy: str, fault: str) -> None:
    """Weights, moments, averages, BatchNorm's statistics and the count of updates stay; also where only the loss is
    not finite."""
    outcomes = ranks(3).run(cases.sick_step, Spec(strategy), str(tmp_path), fault)
    assert [counts for _, _, counts in outcomes] == [(2, 2, 3)] * 3
    before, after = (read_whole(folder) for folder in outcomes[0][:2])
    for (name, kind), tensor in before.items():
        np.testing.assert_array_equal(after[name, kind], tensor, err_msg=f"{kind} of {name}")


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("hsdp", 4), ("zero1", 2), ("zero3", 2)])
def test_every_group_has_the_timeout_of_the_world(ranks, tmp_path: Path, strategy: str, size: int) -> None:
    """Also those that the saver, a 2-D mesh and DeepSpeed make: else a slow rank would end at torch's own."""
    found = ranks(size).run(cases.group_timeouts, Spec(strategy), str(tmp_path))
    assert found == [{RANK_TIMEOUT}] * size


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 3), ("fsdp", 3), ("hsdp", 4), ("zero1", 3)])
def test_accumulation_reduces_gradients_once(ranks, strategy: str, size: int) -> None:
    """One micro-batch or four: as many reductions. (zero2 and zero3 hold gradients sharded and must reduce each.)"""
    once = ranks(size).run(cases.count_collectives, Spec(strategy), 1)[0]
    often = ranks(size).run(cases.count_collectives, Spec(strategy), 4)[0]
    reductions = [kind for kind in {*once, *often} if "reduce" in kind]
    assert reductions, once
    assert {k: once.get(k) for k in reductions} == {k: often.get(k) for k in reductions}


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_close(ranks, strategy: str, size: int) -> None:
    """bf16 computation, fp32 weights and reduction: near the fp32 losses, and the same on every strategy."""
    losses = ranks(size).run(cases.train, Spec(strategy, "bf16"), None, STEPS)[0].losses
    np.testing.assert_allclose(losses, reference().losses, rtol=0, atol=BF16_TOLERANCE)
    assert losses != reference().losses, "nothing was computed in bf16"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_clipping_and_accumulation(ranks, strategy: str) -> None:
    """clip 0 is no clipping (DeepSpeed's plugin would make it 1.0); one micro-batch holds a rank's whole share."""
    plain = plain_training(range(STEPS), clip=0)
    outcome = ranks(2).run(cases.train, Spec(strategy, micro_batch_size=BATCH, clip=0.0), None, STEPS)[0]
    np.testing.assert_allclose(outcome.losses, plain.losses, rtol=0, atol=FP32_TOLERANCE)
    assert abs(plain.losses[-1] - reference().losses[-1]) > 1e-4, "clipping made no difference to be seen"


@pytest.mark.parametrize(
    "strategy, kind",
    [
        ("ddp", "block"),
        ("fsdp", "block"),
        ("zero3", "block"),
        ("ddp", "selective"),
        ("fsdp", "selective"),
        ("zero2", "selective"),
    ],
)
def test_activation_checkpointing_changes_nothing(ranks, strategy: str, kind: str) -> None:
    plain = ranks(2).run(cases.train, Spec(strategy), None, STEPS)[0]
    recomputed = ranks(2).run(cases.train, Spec(strategy, activation_checkpointing=kind), None, STEPS)[0]
    assert recomputed.losses == plain.losses


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_runs_give_the_same_bits(ranks, tmp_path: Path, strategy: str) -> None:
    first, second = ranks(3).run(cases.train_twice, Spec(strategy), str(tmp_path), 3)[0]
    assert first.losses == second.losses
    assert CheckpointReader(Path(first.folder)).digest() == CheckpointReader(Path(second.folder)).digest()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["block", "model"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "hsdp"])
def test_compiled_training_is_the_same_training(ranks, tmp_path: Path, strategy: str, compiled: str) -> None:
    """Losses and gradient norms as in plain torch, and a checkpoint that shows nothing of the compiler."""
    spec = Spec(strategy, compile=compiled)
    outcome, graphs = ranks(2).run(cases.train_compiled, spec, str(tmp_path), STEPS, timeout=300)[0]
    assert graphs > 0
    np.testing.assert_allclose(outcome.losses, reference().losses, rtol=0, atol=FP32_TOLERANCE)
    np.testing.assert_allclose(outcome.norms, reference().norms, rtol=1e-5)
    assert read_whole(outcome.folder).keys() == cases.canonical_state().keys()
    resumed = ranks(2).run(cases.go_on, Spec("ddp"), outcome.folder, None, range(STEPS, STEPS + 2))[0]
    np.testing.assert_allclose(resumed.losses, plain_training(range(STEPS + 2)).losses[STEPS:], rtol=0, atol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_what_the_recipes_ask_for(ranks, tmp_path: Path, strategy: str, checkpointing: str) -> None:
    """bf16 and compiled blocks at once, also recomputed in the backward pass."""
    spec = Spec(strategy, "bf16", compile="block", activation_checkpointing=checkpointing)
    outcome, graphs = ranks(2).run(cases.train_compiled, spec, str(tmp_path), STEPS, timeout=300)[0]
    assert graphs > 0
    np.testing.assert_allclose(outcome.losses, reference().losses, rtol=0, atol=BF16_TOLERANCE)
    resumed = ranks(2).run(cases.go_on, Spec("ddp", "bf16"), outcome.folder, None, range(STEPS, STEPS + 2))[0]
    np.testing.assert_allclose(
        resumed.losses, plain_training(range(STEPS + 2)).losses[STEPS:], rtol=0, atol=BF16_TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_copies_of_a_sharded_state(ranks, tmp_path: Path, precision: str) -> None:
    """HSDP on 2 x 2 ranks: close to plain torch, bit-equal after a resume, a sick step skipped on all."""
    spec, tolerance = Spec("hsdp", precision), FP32_TOLERANCE if precision == "fp32" else BF16_TOLERANCE
    whole, resumed = ranks(4).run(cases.interrupted, spec, str(tmp_path / "a"), 3, STEPS)[0]
    assert resumed.losses == whole.losses[3:]
    assert CheckpointReader(Path(resumed.folder)).digest() == CheckpointReader(Path(whole.folder)).digest()
    np.testing.assert_allclose(whole.losses, reference().losses, rtol=0, atol=tolerance)
    for fault in ("gradient", "loss"):
        outcomes = ranks(4).run(cases.sick_step, spec, str(tmp_path / fault), fault)
        assert [counts for _, _, counts in outcomes] == [(2, 2, 3)] * 4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_dropout_is_keyed_and_resumes_bit_for_bit(ranks, tmp_path: Path, strategy: str) -> None:
    """Compared models may draw: by (seed, step, micro-step, rank), so that no generator's state is saved."""
    spec = Spec(strategy, dropout=0.3)
    whole, resumed = ranks(2).run(cases.interrupted, spec, str(tmp_path), 3, 6)[0]
    assert resumed.losses == whole.losses[3:]
    assert CheckpointReader(Path(resumed.folder)).digest() == CheckpointReader(Path(whole.folder)).digest()
    assert abs(whole.losses[0] - reference().losses[0]) > 1e-3, "nothing was dropped"
    draws = ranks(2).run(cases.first_draws, spec)
    assert len({d for rank in draws for d in rank}) == 2 * len(draws[0]), "every rank and micro-step draws its own"


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_resume_is_bit_identical(ranks, tmp_path: Path, precision: str, strategy: str, size: int) -> None:
    """Losses and a digest of all weights and moments, from a new engine that loads the checkpoint of the middle."""
    whole, resumed = ranks(size).run(cases.interrupted, Spec(strategy, precision), str(tmp_path), 3, 6)[0]
    assert resumed.losses == whole.losses[3:]
    assert CheckpointReader(Path(resumed.folder)).digest() == CheckpointReader(Path(whole.folder)).digest()
