"""Evaluation counts every sample of the split exactly once, on any number of ranks and under any engine."""

from __future__ import annotations

import engine_cases as cases
import pytest
import science_cases
import torch
from engine_cases import BUFFER, CLASSES, IMAGE, STRATEGIES, WEIGHT, Spec, build_model, canonical_state

from pipeline.data.synthetic import SyntheticSource

SAMPLES = 101  # a prime: no number of ranks or batch divides it


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    """top1, top5 and loss by sorting, sample by sample."""
    source = SyntheticSource("val", image_size=IMAGE, num_classes=CLASSES, samples=SAMPLES)
    model = build_model("cpu").eval()
    model.load_state_dict({n: t for (n, kind), t in canonical_state().items() if kind in (WEIGHT, BUFFER)})
    top1 = top5 = loss = 0.0
    for i in range(SAMPLES):
        pixels, label, _ = source.read(i, 3)
        # as the evaluation does: shorter side to 15 / 0.875 = 17 pixels, antialiased, then the centre
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        image = torch.nn.functional.interpolate(image, (17, 17), mode="bilinear", antialias=True)[..., 1:16, 1:16]
        with torch.no_grad():
            logits = model(image.float() / 127.5 - 1)[0]
        best = logits.argsort(descending=True).tolist()
        top1 += label == best[0]
        top5 += label in best[:5]
        loss -= float(logits.log_softmax(0)[label])
    return {"top1": top1 / SAMPLES, "top5": top5 / SAMPLES, "loss": loss / SAMPLES, "samples": SAMPLES, "bad": 0}


@pytest.mark.parametrize(
    ("spec", "size"),
    [*((None, size) for size in (1, 2, 3, 4)), *((Spec(strategy), 3) for strategy in STRATEGIES)],
    ids=lambda value: value.strategy if isinstance(value, Spec) else str(value),
)
def test_every_sample_once(ranks, counted: dict[str, float], spec: Spec | None, size: int) -> None:
    results = ranks(size).run(cases.evaluate_split, SAMPLES, 8, spec)
    assert all(r == results[0] for r in results)
    found = results[0]
    assert {k: found[k] for k in ("top1", "top5", "samples", "bad")} == {
        k: counted[k] for k in ("top1", "top5", "samples", "bad")
    }
    assert found["loss"] == pytest.approx(counted["loss"], abs=1e-6)


def test_real_labels_are_counted_once_and_missed_by_all_ranks_together(ranks) -> None:
    labels = {f"{i:08d}.png": [[], [i % 10], [0, 3]][i % 3] for i in range(97)}
    right = [(i % 10 in labels[f"{i:08d}.png"]) for i in range(97) if i % 3]
    for size in (1, 3):
        assert ranks(size).run(science_cases.real_accuracy, labels) == [(sum(right) / len(right), len(right))] * size
    del labels["00000090.png"]  # of the last rank
    assert ranks(3).run(science_cases.real_accuracy, labels) == ["the file of labels says nothing of 00000090.png"] * 3
