"""The loss-spike detector in a whole run of several ranks: back to the last good checkpoint, past the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elastic_cases as cases
import pytest
from helpers import TINY_MODEL, members, shards_of, write_dataset

from pipeline.audit import audit
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose
from pipeline.config import load_config, to_yaml
from pipeline.run import RunFolder, read_digests, read_lines, read_metrics

BATCH, STEPS = 16, 12
BAD = (80, 96)  # positions of steps 6 and 7


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_a_spike_is_undone_and_its_samples_passed_over(ranks, tmp_path: Path, strategy: str) -> None:
    """The spike is on one rank alone, and finite: its updates were made, so it is the checkpoint that undoes them."""
    run = tmp_path / "run"
    data = write_dataset(tmp_path / "set", {"train": shards_of(members(300), [160, 140])})
    settings = [
        f"data.train={data}", "data.val=none", "data.num_workers=0", *TINY_MODEL[:-1], "model.num_classes=3",
        f"train.global_batch_size={BATCH}", f"train.duration={STEPS} steps", "train.precision=fp32",
        f"train.strategy={strategy}", "train.ema_decay=0.9", "optimizer.lr=0.003", "checkpoint.every=4 steps",
        "health.spike_factor=4", "health.max_skipped=2", "logging.every=1 steps", "logging.to=[]",
    ]  # fmt: skip
    ranks(2).run(cases.train_with_spikes, str(run), settings, BAD)

    config = load_config(None, [*settings, f"run.dir={run}"]).config
    RunFolder(run).config.write_text(to_yaml(config))  # in a pool nobody takes over the run folder
    events = list(read_lines(run / "events.jsonl"))
    assert [e["step"] for e in events if e["event"] == "sick"] == [6, 7]
    assert all("its running mean" in e["why"] for e in events if e["event"] == "sick")
    [rollback] = [e for e in events if e["event"] == "rollback"]
    jumped = [[0, p, p + BATCH] for p in BAD]
    assert (rollback["step"], rollback["sick"], rollback["skipped"]) == (4, [6, 7], jumped)

    rows: list[dict[str, Any]] = list(read_lines(run / "metrics.jsonl"))
    fifth = [r["loss"] for r in rows if r["step"] == 5]
    assert len(fifth) == 2 and fifth[0] == fifth[1], "the same weights and samples again, to the bit"
    assert max(r["loss"] for r in rows if r["attempt"] == 0) > 4 * max(fifth), "there was a spike"
    assert [r["step"] for r in read_metrics(run)] == list(range(1, STEPS + 1))
    assert max(r["loss"] for r in read_metrics(run)) < 2 * max(fifth), "nothing is left of it"

    # The ledger and the state of the order tell the same story
    positions = [position for _, position, _ in read_digests(run).values()]
    assert positions == [p for p in range(0, BATCH * (STEPS + len(BAD)), BATCH) if p not in BAD]
    state = CheckpointReader(choose(run / "checkpoints", "last")).state()
    assert (state["step"], state["optimizer_step"], state["order"]["skips"]) == (STEPS, STEPS, jumped)
    report = audit(config, RunFolder(run))
    assert (report.faults, report.steps, report.skipped) == ([], STEPS, BATCH * len(BAD))
