"""The evaluations in the middle and at the end of a training: on the val split, with the few-shot probe beside it."""

from __future__ import annotations

import time
from collections.abc import Callable

from data_tools.errors import UserError
from pipeline.data.loader import eval_batches
from pipeline.evaluate import evaluate
from pipeline.health import Watchdog
from pipeline.parts import Parts
from pipeline.report import Report
from pipeline.weights.trained import features_of


def validate(
    parts: Parts, report: Report, watchdog: Watchdog, step: int, wait_for_data: Callable[[], None]
) -> dict[str, float] | None:
    """Metrics of the weights as they are now, after `step`; None where there is no val split, or no data.

    Collective. `wait_for_data` is called before each wait for a batch.
    """
    if parts.val_samples is None:
        return None
    started = time.perf_counter()
    batches = eval_batches(
        parts.val_samples,
        rank=parts.world.rank,
        world_size=parts.world.size,
        batch_size=parts.config.eval.batch_size or parts.share.micro_batch_size,
        num_workers=parts.config.data.num_workers,
    )
    with watchdog.busy("evaluating"):
        wait_for_data()
        parts.engine.share_buffers()
        try:
            result = evaluate(parts.engine.predict, batches, parts.loss_fn, parts.world, on_batch=wait_for_data)
            few = _few_shot(parts, wait_for_data)
        except UserError as e:  # training needs no evaluation; if its data is out of reach too, it says so itself
            report.record("eval_failed", step=step, why=str(e))
            report.say(f"warning: no evaluation at step {step}: {e}")
            return None
    report.clock.since += time.perf_counter() - started  # not computation of the loop: leave it out of img/s
    return result.to_dict() | few


def _few_shot(parts: Parts, wait_for_data: Callable[[], None]) -> dict[str, float]:
    """`fewshot_5` and the like: top-1 of probes on the features as they are now."""
    if parts.fewshot is None:
        return {}
    result = parts.fewshot.run(features_of(parts.engine.model, parts.engine.predict), parts.world, wait_for_data)
    return {f"fewshot_{n}": result.mean(n) for n in result.shots()}
