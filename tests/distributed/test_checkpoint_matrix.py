"""One checkpoint for every strategy: all write the same tensors, all read what any other wrote.

The canonical state is made up, every element another one, for a model with two parameter groups and with parameters
of fewer elements than there are ranks (so that some ranks hold nothing of them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import pytest
from engine_cases import BUFFER, EMA, MOMENTS, STRATEGIES, WEIGHT, Spec, canonical_state, plain_training, read_whole
from helpers import needs_compiler

from pipeline.checkpoint.layout import MANIFEST, CheckpointReader
from pipeline.checkpoint.manager import committed_steps

SIZES = (1, 2, 3, 4)
# hsdp: at 4 ranks two copies of two shards each; at fewer a copy a rank
LAYOUTS = [(strategy, size) for strategy in (*STRATEGIES, "hsdp") for size in SIZES]

# (written by, read by): every strategy on both sides, to more ranks, to fewer, and to as many
PAIRS = [
    (("ddp", 2), ("fsdp", 3)),
    (("ddp", 4), ("zero2", 1)),
    (("ddp", 1), ("zero3", 4)),
    (("fsdp", 4), ("ddp", 3)),
    (("fsdp", 2), ("zero1", 3)),
    (("fsdp", 3), ("zero3", 2)),
    (("fsdp", 3), ("fsdp", 4)),
    (("zero1", 2), ("ddp", 1)),
    (("zero1", 3), ("zero1", 2)),
    (("zero1", 4), ("zero3", 3)),
    (("zero2", 3), ("fsdp", 2)),
    (("zero2", 2), ("zero2", 4)),
    (("zero2", 1), ("ddp", 4)),
    (("zero3", 4), ("zero2", 3)),
    (("zero3", 2), ("fsdp", 1)),
    (("zero3", 3), ("zero3", 4)),
    (("hsdp", 4), ("fsdp", 3)),
    (("zero3", 2), ("hsdp", 4)),
]


BF16_TOLERANCE = 5e-3  # measured: 2.9e-3 at most; losses are about 2.3


def assert_canonical(folder: str, optimizer: str = "adamw") -> None:
    saved, wanted = read_whole(folder), canonical_state(optimizer)
    assert saved.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(saved[key], tensor.reshape(-1).numpy(), err_msg=str(key), strict=True)


@pytest.fixture(scope="module")
def canonical_checkpoint(ranks, tmp_path_factory: pytest.TempPathFactory) -> str:
    return ranks(1).run(cases.save_canonical, Spec("ddp"), str(tmp_path_factory.mktemp("canonical")))[0]


def test_the_problem_is_an_odd_one() -> None:
    state = canonical_state()
    assert {kind for _, kind in state} == {WEIGHT, *MOMENTS["adamw"], EMA, BUFFER}
    sizes = [t.numel() for (_, kind), t in state.items() if kind == WEIGHT]
    assert min(sizes) < max(SIZES), "some rank must hold nothing of some parameter"
    assert any(n % 2 and n % 3 for n in sizes)
    everything = np.concatenate([t.reshape(-1).numpy() for t in state.values()])
    assert len(np.unique(everything)) > 0.95 * len(everything), "a shifted tensor must not go unnoticed"


@pytest.mark.parametrize(("strategy", "size"), LAYOUTS)
def test_saves_the_canonical_state(ranks, tmp_path: Path, strategy: str, size: int) -> None:
    folder = ranks(size).run(cases.save_canonical, Spec(strategy), str(tmp_path))[0]
    assert_canonical(folder)
    assert CheckpointReader(Path(folder)).damage(CheckpointReader(Path(folder)).manifest.files) is None


@pytest.mark.parametrize(("strategy", "size"), LAYOUTS)
def test_loads_and_saves_again(ranks, tmp_path: Path, canonical_checkpoint: str, strategy: str, size: int) -> None:
    assert_canonical(ranks(size).run(cases.copy_checkpoint, Spec(strategy), canonical_checkpoint, str(tmp_path))[0])


@pytest.mark.parametrize(("strategy", "size"), [(s, 3) for s in STRATEGIES] + [("hsdp", 2)])
def test_a_save_beside_training_holds_the_state_of_its_moment(ranks, tmp_path: Path, strategy: str, size: int) -> None:
    assert_canonical(ranks(size).run(cases.save_beside_training, Spec(strategy), str(tmp_path))[0][0])


def variants() -> list[Any]:
    """(optimizer, offload, strategy, ranks): all of them; those that compile DeepSpeed's CPU Adam first are slow."""
    found = []
    for optimizer, offload in [("sgd", "none"), ("adamw", "optimizer"), ("sgd", "optimizer")]:
        for strategy, size in LAYOUTS:
            if strategy == "ddp" and offload != "none":
                continue  # refused: nothing to offload
            marks = [needs_compiler] if (optimizer, offload) == ("adamw", "optimizer") and "zero" in strategy else []
            quick = (size == 3 and optimizer == "sgd" and offload == "none") or (strategy, size) == ("hsdp", 2)
            marks += [] if quick else [pytest.mark.slow]
            found.append(pytest.param(optimizer, offload, strategy, size, marks=marks))
    return found


@pytest.mark.parametrize(("optimizer", "offload", "strategy", "size"), variants())
def test_other_optimizers_and_offload(
    ranks, tmp_path: Path, optimizer: str, offload: str, strategy: str, size: int
) -> None:
    """SGD's momentum, and moments that live in host memory, take the same way there and back."""
    spec = Spec(strategy, optimizer=optimizer, offload=offload)
    folder = ranks(size).run(cases.save_canonical, spec, str(tmp_path / "a"), timeout=300)[0]
    assert_canonical(folder, optimizer)
    assert_canonical(ranks(size).run(cases.copy_checkpoint, spec, folder, str(tmp_path / "b"))[0], optimizer)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_loses_no_bit_of_the_state(ranks, tmp_path: Path, canonical_checkpoint: str, strategy: str) -> None:
    """bf16 is for computing; weights, moments and averages stay fp32 and pass through unchanged."""
    spec = Spec(strategy, "bf16")
    assert_canonical(ranks(3).run(cases.copy_checkpoint, spec, canonical_checkpoint, str(tmp_path))[0])


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def test_training_goes_on_under_another_layout(
    ranks, tmp_path: Path, writer: tuple[str, int], reader: tuple[str, int]
) -> None:
    """The steps after the change agree with a plain training that was never interrupted, moments and all."""
    folder = ranks(writer[1]).run(cases.train, Spec(writer[0]), str(tmp_path), 3)[0].folder
    outcome = ranks(reader[1]).run(cases.go_on, Spec(reader[0]), folder, None, range(3, 6))[0]
    np.testing.assert_allclose(outcome.losses, plain_training(range(6)).losses[3:], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda layout: f"{layout[0]}-{layout[1]}")
def test_bf16_training_goes_on_under_another_layout(
    ranks, tmp_path: Path, writer: tuple[str, int], reader: tuple[str, int]
) -> None:
    """The same state to the bit; the losses differ by what bf16 rounds away in sums of another order."""
    folder = ranks(writer[1]).run(cases.train, Spec(writer[0], "bf16"), str(tmp_path / "a"), 3)[0].folder
    empty = ranks(reader[1]).run(cases.go_on, Spec(reader[0], "bf16"), folder, str(tmp_path / "b"), range(3, 3))[0]
    assert CheckpointReader(Path(empty.folder)).digest() == CheckpointReader(Path(folder)).digest()
    stayed = ranks(writer[1]).run(cases.go_on, Spec(writer[0], "bf16"), folder, None, range(3, 6))[0]
    outcome = ranks(reader[1]).run(cases.go_on, Spec(reader[0], "bf16"), folder, None, range(3, 6))[0]
    print("bf16 loss differs by", max(abs(a - b) for a, b in zip(outcome.losses, stayed.losses)))
    np.testing.assert_allclose(outcome.losses, stayed.losses, rtol=0, atol=BF16_TOLERANCE)


@pytest.mark.parametrize(
    ("writer", "reader", "offload"),
    [
        (("ddp", 2), ("zero3", 3), "none"),
        (("zero2", 3), ("fsdp", 2), "none"),
        (("fsdp", 3), ("zero1", 4), "none"),
        (("zero1", 2), ("hsdp", 4), "none"),
        (("hsdp", 2), ("ddp", 3), "none"),
        (("zero3", 3), ("zero2", 2), "none"),
        (("ddp", 3), ("fsdp", 2), "optimizer"),
    ],
    ids=str,
)
def test_sgd_goes_on_under_another_layout(
    ranks, tmp_path: Path, writer: tuple[str, int], reader: tuple[str, int], offload: str
) -> None:
    spec = Spec(writer[0], optimizer="sgd")
    folder = ranks(writer[1]).run(cases.train, spec, str(tmp_path), 3)[0].folder
    spec = Spec(reader[0], optimizer="sgd", offload=offload)
    outcome = ranks(reader[1]).run(cases.go_on, spec, folder, None, range(3, 6))[0]
    np.testing.assert_allclose(outcome.losses, plain_training(range(6), optimizer="sgd").losses[3:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (("fsdp", 2), ("fsdp", 3)),
        (("hsdp", 4), ("fsdp", 2)),
        *(
            pytest.param(*pair, marks=[pytest.mark.slow, needs_compiler])
            for pair in [
                (("fsdp", 3), ("zero1", 2)),
                (("zero1", 2), ("zero2", 3)),
                (("zero2", 3), ("zero3", 2)),
                (("zero3", 2), ("hsdp", 4)),
            ]
        ),
    ],
    ids=lambda layout: f"{layout[0]}-{layout[1]}",
)
def test_offloaded_moments_go_on_under_another_layout(
    ranks, tmp_path: Path, writer: tuple[str, int], reader: tuple[str, int]
) -> None:
    spec = Spec(writer[0], offload="optimizer")
    folder = ranks(writer[1]).run(cases.train, spec, str(tmp_path), 3, timeout=300)[0].folder
    spec = Spec(reader[0], offload="optimizer")
    outcome = ranks(reader[1]).run(cases.go_on, spec, folder, None, range(3, 6), timeout=300)[0]
    np.testing.assert_allclose(outcome.losses, plain_training(range(6)).losses[3:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_moments_and_step_number_are_used(ranks, canonical_checkpoint: str, strategy: str) -> None:
    """From made-up moments: had they been left out, or Adam's count, the next losses would be others."""
    outcome = ranks(3).run(cases.go_on, Spec(strategy), canonical_checkpoint, None, range(7, 10))[0]
    state = canonical_state()
    np.testing.assert_allclose(outcome.losses, plain_training(range(7, 10), state).losses, rtol=0, atol=1e-6)
    forgetful = {**state, **{key: t * 0 for key, t in state.items() if key[1] in MOMENTS["adamw"]}}
    assert abs(plain_training(range(7, 10), forgetful).losses[-1] - outcome.losses[-1]) > 1e-4


@pytest.mark.parametrize(
    ("strategy", "fault", "words"),
    [
        ("fsdp", "missing", "elements"), ("fsdp", "twice", "written twice"),
        ("fsdp", "unknown", "not part of the state"), ("fsdp", "disk", "rank 2"),
        ("zero1", "missing", "elements"), ("zero3", "missing", "elements"),
    ],
)  # fmt: skip
def test_a_fault_on_one_rank_commits_nothing_anywhere(
    ranks, tmp_path: Path, strategy: str, fault: str, words: str
) -> None:
    errors = ranks(3).run(cases.save_with_fault, Spec(strategy), str(tmp_path), fault)
    assert all(e.startswith("CheckpointError") and words in e for e in errors), errors
    assert committed_steps(tmp_path) == []
    assert not list(tmp_path.rglob(MANIFEST))
