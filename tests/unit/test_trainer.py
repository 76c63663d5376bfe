"""Whole trainings of one rank: what a crash, a signal, a resume or another setting does to losses and weights."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, TINY_MODEL, Member, as_before, members, script, shards_of, train, write_dataset

from data_tools.errors import UserError
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import best_step, choose, committed_steps, step_folder
from pipeline.cli import EXIT_SAVED, run_smoke
from pipeline.cli_eval import run_eval
from pipeline.config import load_config
from pipeline.ledger import LedgerReader
from pipeline.model import create_model
from pipeline.parallel.engine import EMA, WEIGHT
from pipeline.run import read_digests, read_lines, read_metrics
from pipeline.trainer import Trainer

SAVE_NOW = "checkpoint.background=false"  # so that a "crash" finds the checkpoint that it expects


class Crash(Exception):
    """Stands for the end of a process: nothing is tidied up after it."""


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Has `action` called when step number `step` is done and booked, before anything is saved."""
    original = Trainer._complete_step

    def complete(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.step == step:
            action()

    monkeypatch.setattr(Trainer, "_complete_step", complete)


def crash() -> None:
    raise Crash


def train_and_crash(run: Path, step: int, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as m, pytest.raises(Crash):
        at_step(m, step, crash)
        train(run, SAVE_NOW, *overrides)


def checkpoint(run: Path, which: str = "last") -> CheckpointReader:
    return CheckpointReader(choose(run / "checkpoints", which))


def losses(run: Path) -> dict[int, tuple[float, float]]:
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in read_metrics(run)}


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] in names]


def assert_same_run(run: Path, reference: Path) -> None:
    """Bit for bit: samples of every step, losses and gradient norms, all weights and moments, the state."""
    assert losses(run) == losses(reference)
    assert read_digests(run) == read_digests(reference)
    ours, theirs = checkpoint(run), checkpoint(reference)
    assert ours.digest() == theirs.digest()
    whose = {"run_id": None}  # all else in the state is the same
    assert ours.state() | whose == theirs.state() | whose


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Eight steps, undisturbed."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert train(run) == 0
    assert list(losses(run)) == list(range(1, 9))
    return run


# ----------------------------------------------------------------------------------------- crash and resume


def test_a_finished_run(reference):
    assert committed_steps(reference / "checkpoints") == [4, 8]
    assert (reference / "FINISHED").read_text() == "step 8\n"
    assert json.loads((reference / "STATUS.json").read_text())["state"] == "finished"
    assert [e["event"] for e in events(reference, "start", "resume", "save", "finish")] == [
        "start",
        "save",
        "save",
        "finish",
    ]
    state = checkpoint(reference).state()
    assert (state["step"], state["samples"], state["optimizer_step"]) == (8, 128, 8)
    assert len({loss for loss, _ in losses(reference).values()}) == 8


@pytest.mark.parametrize("step, goes_on_from", [(2, None), (4, None), (6, 4), (7, 4)])
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(tmp_path, reference, step, goes_on_from):
    """Also where it crashes before the first save: then it begins anew."""
    train_and_crash(tmp_path / "run", step)
    assert not (tmp_path / "run" / "FINISHED").exists()
    assert train(tmp_path / "run") == 0
    assert [e["step"] for e in events(tmp_path / "run", "resume")] == ([goes_on_from] if goes_on_from else [])
    assert_same_run(tmp_path / "run", reference)


def test_a_run_that_crashes_again_and_again(tmp_path, reference):
    run = tmp_path / "run"
    for step in (3, 5, 6, 8):
        train_and_crash(run, step, "checkpoint.every=2 steps")
    assert train(run) == 0
    assert [e["attempt"] for e in events(run, "start", "resume")] == [0, 1, 2, 3, 4]
    assert_same_run(run, reference)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_saves_and_asks_to_be_called_again(tmp_path, reference, monkeypatch, capsys, name):
    with monkeypatch.context() as m:
        at_step(m, 3, lambda: signal.raise_signal(signal.Signals[name]))
        assert train(tmp_path / "run") == EXIT_SAVED == 75
    assert f"saved at step 3 after {name}" in capsys.readouterr().out
    assert committed_steps(tmp_path / "run" / "checkpoints") == [3]
    assert [e["name"] for e in events(tmp_path / "run", "signal")] == [name]
    assert json.loads((tmp_path / "run" / "STATUS.json").read_text())["state"] == "saved"
    assert train(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", reference)


def test_a_damaged_checkpoint_costs_its_steps_only(tmp_path, reference):
    run = tmp_path / "run"
    train_and_crash(run, 7, "checkpoint.every=2 steps")
    path = next(step_folder(run / "checkpoints", 6).glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    assert train(run) == 0
    assert [e["step"] for e in events(run, "resume")] == [4]
    assert len(events(run, "damaged")) == 1
    assert_same_run(run, reference)


SLEEPING = """
import time
from pathlib import Path
from helpers import train
from pipeline import trainer
original = trainer.Trainer._complete_step
def complete(self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.step == 6:
        print("asleep", flush=True)
        time.sleep(120)
trainer.Trainer._complete_step = complete
train(Path(sys.argv[1]), "data.num_workers=1", "checkpoint.background=false")
"""


def test_a_second_trainer_is_refused_until_the_first_is_gone(tmp_path, reference):
    """And the moment it is killed, with a data worker beside it, the next goes on."""
    run = tmp_path / "run"
    first = subprocess.Popen(script(SLEEPING, run), stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert any(line == "asleep\n" for line in first.stdout)
        with pytest.raises(UserError, match=rf"another training writes into this run folder \(pid {first.pid} "):
            train(run)
    finally:
        first.kill()
        first.wait()
    assert train(run) == 0
    assert [e["step"] for e in events(run, "start", "resume")] == [0, 4]
    assert_same_run(run, reference)


# ------------------------------------------------------------------------------------ settings and resuming


def test_the_stored_configuration_reproduces_the_run(tmp_path, reference):
    assert train(tmp_path / "again", recipe=reference / "config.yaml") == 0
    assert_same_run(tmp_path / "again", reference)


@pytest.mark.parametrize(
    "extra", [["data.num_workers=2"], ["train.activation_checkpointing=block"], ["train.deterministic=true"]]
)
def test_what_must_not_matter_does_not(tmp_path, reference, extra):
    assert train(tmp_path / "run", *extra) == 0
    assert_same_run(tmp_path / "run", reference)


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = checkpoint(run)
    return {name: reader.tensor(name) for name, kind in reader.manifest.tensors if kind == WEIGHT}


def test_accumulation_is_no_accumulation(tmp_path):
    """5 does not divide 16: the last micro-batch is padded with slots of weight 0.

    A larger epsilon, because Adam makes a whole step of a gradient that is zero but for rounding (the last bias of a
    token-mixing MLP is such: LayerNorm takes away what it adds).
    """
    whole = tmp_path / "16"
    for micro in (16, 1, 4, 5):
        run = tmp_path / str(micro)
        assert train(run, f"train.micro_batch_size={micro}", "optimizer.eps=1e-4") == 0
        assert read_digests(run) == read_digests(whole)
        for step, (loss, norm) in losses(run).items():
            assert loss == pytest.approx(losses(whole)[step][0], abs=1e-6)
            assert norm == pytest.approx(losses(whole)[step][1], rel=1e-5)
        expected = weights(whole)
        for name, value in weights(run).items():
            assert torch.allclose(value, expected[name], rtol=0, atol=1e-6), name


def test_changed_settings_are_free_declared_or_refused(tmp_path, capsys):
    run, more = tmp_path / "run", "train.duration=4 steps"
    assert train(run, "train.duration=2 steps") == 0
    for change in ("run.seed=1", "model.hidden_dim=32", "data.window=32"):
        with pytest.raises(UserError, match=f"(?s){change.split('=')[0]}.*new run with another run.dir"):
            train(run, more, change)
    with pytest.raises(UserError, match=r"optimizer.weight_decay.*--allow optimizer.weight_decay"):
        train(run, more, "optimizer.weight_decay=0.2")
    assert committed_steps(run / "checkpoints") == [2]
    assert json.loads(json.dumps(load_config(str(run / "config.yaml")).config.optimizer.weight_decay)) == 0.1
    capsys.readouterr()
    assert train(run, more, "optimizer.weight_decay=0.2", "optimizer.lr=0.001", allow=["optimizer.weight_decay"]) == 0
    text = capsys.readouterr().out
    assert "changed since the last start" in text and "optimizer.lr" in text
    changed = {c["key"]: (c["old"], c["new"]) for e in events(run, "config") for c in e["changes"]}
    assert changed["optimizer.weight_decay"] == (0.1, 0.2)
    assert changed["train.duration"] == ("2 steps", "4 steps")
    assert [e["step"] for e in events(run, "start", "resume")] == [0, 2]


def test_a_finished_run_can_be_extended(tmp_path):
    """With a constant rate the extended run is the longer one, bit for bit."""
    constant = "scheduler.name=constant"
    assert train(tmp_path / "long", constant) == 0
    assert train(tmp_path / "run", constant, "train.duration=5 steps") == 0
    assert train(tmp_path / "run", constant, "train.duration=5 steps") == 0  # nothing to do
    assert (tmp_path / "run" / "FINISHED").read_text() == "step 5\n"
    assert train(tmp_path / "run", constant) == 0
    assert (tmp_path / "run" / "FINISHED").read_text() == "step 8\n"
    assert_same_run(tmp_path / "run", tmp_path / "long")


def test_other_data_is_refused_and_a_moved_set_is_not(tmp_path):
    samples = [Member(m.data, i % 4) for i, m in enumerate(members(40))]
    for name, content in [("a", samples), ("moved", samples), ("other", samples[::-1])]:
        write_dataset(tmp_path / name, {"train": shards_of(content, [25, 15])}, classes=4)
    run, constant = tmp_path / "run", "scheduler.name=constant"
    assert train(run, constant, f"data.train={tmp_path / 'a'}", "train.duration=3 steps") == 0
    with pytest.raises(UserError, match=r"data.train has changed.*--allow data.train"):
        train(run, constant, f"data.train={tmp_path / 'other'}", "train.duration=5 steps")
    assert train(run, constant, f"data.train={tmp_path / 'moved'}", "train.duration=5 steps") == 0
    assert [(e, p) for e, p, _ in read_digests(run).values()] == [(0, 0), (0, 16), (1, 0), (1, 16), (2, 0)]
    assert train(run, constant, f"data.train={tmp_path / 'other'}", "train.duration=7 steps", allow=["data.train"]) == 0
    assert [e for e, _, _ in read_digests(run).values()] == [0, 0, 1, 1, 2, 3, 3]


def test_the_batch_may_grow_within_a_run(tmp_path):
    """40 samples: after one step of 16 the epoch has no room for one of 32, so the next epoch begins."""
    write_dataset(tmp_path / "set", {"train": [[Member(m.data, i % 4) for i, m in enumerate(members(40))]]}, classes=4)
    run, data = tmp_path / "run", f"data.train={tmp_path / 'set'}"
    assert train(run, data, "train.duration=3 steps") == 0
    bigger = [data, "train.duration=5 steps", "train.global_batch_size=32"]
    with pytest.raises(UserError, match=r"--allow train\.global_batch_size"):
        train(run, *bigger)
    assert train(run, *bigger, allow=["train.global_batch_size"]) == 0
    assert [(e, p) for e, p, _ in read_digests(run).values()] == [(0, 0), (0, 16), (1, 0), (2, 0), (3, 0)]
    assert checkpoint(run).state()["samples"] == 3 * 16 + 2 * 32


# -------------------------------------------------------------------------------------------- bad samples


def test_too_many_bad_samples_end_the_run_with_a_message(tmp_path, capsys):
    samples = [Member(m.data, i % 4, 1 if i % 8 == 0 else None) for i, m in enumerate(members(64))]
    write_dataset(tmp_path / "set", {"train": [samples]}, classes=4)
    data = f"data.train={tmp_path / 'set'}"
    with pytest.raises(UserError, match=r"(?s)data.max_bad_fraction=0.01 .*mixer data verify.*mixer resume"):
        train(tmp_path / "run", data, "data.max_bad_fraction=0.01")
    assert "bad sample, counted with weight 0" in capsys.readouterr().out
    # Saved first: with a higher limit it goes on
    assert len(committed_steps(tmp_path / "run" / "checkpoints")) == 1
    assert train(tmp_path / "run", data, "data.max_bad_fraction=0.2") == 0
    assert events(tmp_path / "run", "resume")
    masked = {step: m for s in LedgerReader(tmp_path / "run" / "ledger", 0) for step, m in s.masked.items()}
    assert sum(map(len, masked.values())) == 16  # two epochs
    assert all("crc32" in text for rows in masked.values() for _, _, text in rows)


def test_a_bad_sample_changes_the_gradient_by_its_own_share_only(tmp_path):
    """Of sixteen samples one is bad: the first loss is the mean of the others."""
    good = [Member(m.data, i % 4) for i, m in enumerate(members(16))]
    write_dataset(tmp_path / "set", {"train": [[good[0]._replace(crc32=1), *good[1:]]]}, classes=4)
    assert (
        train(tmp_path / "run", f"data.train={tmp_path / 'set'}", "data.max_bad_fraction=1", "train.duration=1 steps")
        == 0
    )
    assert losses(tmp_path / "run")[1][0] == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- EMA


def test_the_average_is_the_average_of_all_updates(tmp_path):
    run, decay = tmp_path / "run", 0.6
    extra = [f"train.ema_decay={decay}", "checkpoint.every=1 steps", "checkpoint.keep_last=99"]
    train_and_crash(run, 5, *extra)
    assert train(run, *extra) == 0
    assert committed_steps(run / "checkpoints") == list(range(1, 9))
    model = create_model(
        "mixer_s16", 4, 8, patch_size=4, hidden_dim=16, num_blocks=2, tokens_mlp_dim=8, channels_mlp_dim=32, seed=0
    )
    for name, value in model.named_parameters():
        average = value.detach().double()
        for step in range(1, 9):
            reader = checkpoint(run, f"step-{step}")
            average = decay * average + (1 - decay) * reader.tensor(name).double()
            assert torch.allclose(reader.tensor(name, EMA).double(), average, rtol=1e-5, atol=1e-6), (name, step)
    undisturbed = tmp_path / "undisturbed"
    assert train(undisturbed, *extra) == 0
    assert_same_run(run, undisturbed)


# ------------------------------------------------------------------------------------------------ watching


def test_curves_go_on_without_overlap(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, board = tmp_path / "run", "logging.to=[tensorboard]"
    train_and_crash(run, 7, board)
    assert train(run, board) == 0
    raw = [(line["step"], line["attempt"]) for line in read_lines(run / "metrics.jsonl")]
    assert raw[-4:] == [(5, 1), (6, 1), (7, 1), (8, 1)] and (6, 0) in raw
    shown = read_metrics(run)
    assert [m["step"] for m in shown] == list(range(1, 9))
    accumulator = EventAccumulator(str(run / "tb"), {"scalars": 0, "images": 0})
    accumulator.Reload()
    points = accumulator.Scalars("train/loss")
    assert [p.step for p in points] == list(range(1, 9))
    assert [p.value for p in points] == pytest.approx([m["loss"] for m in shown], rel=1e-6)
    assert {"train/lr", "train/grad_norm", "train/img_per_s", "train/data_wait"} <= set(accumulator.Tags()["scalars"])
    assert {"train/batch", "weights/stem", "weights/token_mixing_1", "weights/token_mixing_2"} <= set(
        accumulator.Tags()["images"]
    )


def test_the_best_checkpoint_is_the_one_that_was_evaluated_best(tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        train(
            run,
            "data.val=synthetic",
            "eval.every=2 steps",
            "eval.batch_size=500",
            "optimizer.lr=0.1",
            "scheduler.name=constant",
            "train.duration=10 steps",
            "checkpoint.keep_last=1",
        )
        == 0
    )
    scores = {line["step"]: line["top1"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "val"}
    assert list(scores) == [2, 4, 6, 8, 10] and len(set(scores.values())) > 1
    best = max(scores.values())
    found = best_step(run / "checkpoints")
    assert found is not None and scores[found] == best
    assert set(committed_steps(run / "checkpoints")) == {found, 10}
    capsys.readouterr()
    with as_before():
        assert run_eval(str(run), "best", False, []) == 0
    report = json.loads(next((run / "eval").glob("*.json")).read_text())
    assert (report["step"], report["top1"], report["samples"]) == (found, best, 1000)
    assert f"top-1 {best:.2%}" in capsys.readouterr().out
    with as_before(), pytest.raises(UserError, match="ema_decay"):
        run_eval(str(run), "last", True, [])


def test_the_best_by_loss_stays(tmp_path):
    run = tmp_path / "run"
    settings = ("data.val=synthetic", "eval.every=2 steps", "eval.batch_size=500", "optimizer.lr=0.1")
    settings += ("scheduler.name=constant", "train.duration=10 steps", "checkpoint.keep_last=1", "checkpoint.best=loss")
    assert train(run, *settings) == 0
    scores = {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl") if line["split"] == "val"}
    best = min(scores, key=lambda step: (scores[step], -step))
    assert best_step(run / "checkpoints") == best
    assert set(committed_steps(run / "checkpoints")) == {best, 10}


# ----------------------------------------------------------------------------------------------- failing saves


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_save_that_failed_is_tried_again_before_the_next_is_due(tmp_path, monkeypatch, reference, capsys, background):
    """The error of the thread that writes comes out in the loop, as a warning; training goes on with the same bits."""
    from pipeline import saving
    from pipeline.checkpoint import manager

    failures = ["No space left on device"]
    write = manager.write_pieces

    def write_pieces(*args: Any) -> Any:
        if failures:
            raise OSError(28, failures.pop())
        return write(*args)

    monkeypatch.setattr(manager, "write_pieces", write_pieces)
    monkeypatch.setattr(saving, "RETRY_SAVE_SECONDS", 0.0)
    assert train(tmp_path / "run", f"checkpoint.background={background}") == 0
    assert "checkpoint at step 4 failed, the previous one stays: rank 0" in capsys.readouterr().out
    [failed] = events(tmp_path / "run", "save_failed")
    assert failed["step"] == 4 and "No space left" in failed["why"]
    saved = [e["step"] for e in events(tmp_path / "run", "save")]
    assert saved[0] in (5, 6, 7) and saved[-1] == 8
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_save_that_is_too_slow_warns_and_the_next_one_waits(tmp_path, monkeypatch, reference, capsys):
    from pipeline.checkpoint import manager

    write = manager.write_pieces

    def write_pieces(*args: Any) -> Any:
        time.sleep(0.7)
        return write(*args)

    monkeypatch.setattr(manager, "write_pieces", write_pieces)
    assert train(tmp_path / "run", "checkpoint.every=1 steps", "checkpoint.keep_last=99") == 0
    assert "until after the next was due; training waited" in capsys.readouterr().out
    assert {e["step"] for e in events(tmp_path / "run", "slow_save")} <= set(range(1, 8))
    assert events(tmp_path / "run", "slow_save")
    assert committed_steps(tmp_path / "run" / "checkpoints") == list(range(1, 9)), "no save is left out, none overtakes"
    assert_same_run(tmp_path / "run", reference)


def test_checkpoints_out_of_reach_do_not_end_training(tmp_path, monkeypatch, capsys):
    from pipeline import saving

    def no_answer(*args: Any) -> Any:
        raise OSError(5, "no answer")

    monkeypatch.setattr(saving, "best_score", no_answer)
    assert train(tmp_path / "run", "data.val=synthetic", "eval.batch_size=500", "eval.every=3 steps") == 0
    assert "step 3 is not compared with the saved checkpoints: [Errno 5] no answer" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- smoke


def smoke(overrides: Sequence[str] = ()) -> int:
    with as_before():
        return run_smoke(load_config(None, [*TINY, "data.val=synthetic", "eval.batch_size=500", *overrides]).config)


def test_smoke_says_fit_to_submit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert smoke() == 0
    assert capsys.readouterr().out.rstrip().endswith("fit to submit")
    assert list(tmp_path.iterdir()) == []  # nothing of it stays, not even in run.dir


def test_smoke_notices_that_nothing_can_be_saved(tmp_path, monkeypatch, capsys):
    from pipeline.checkpoint import manager

    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manager, "write_pieces", failing)
    with pytest.raises(UserError):
        smoke()
    assert "fit to submit" not in capsys.readouterr().out


def test_a_model_of_the_wrong_shape_is_refused(tmp_path):
    """Where config.yaml was lost: the checkpoint itself says no."""
    assert train(tmp_path / "run", "train.duration=1 steps") == 0
    (tmp_path / "run" / "config.yaml").unlink()
    other = [x.replace("hidden_dim=16", "hidden_dim=24") for x in TINY_MODEL]
    with pytest.raises(UserError, match="is of another model"):
        train(tmp_path / "run", *other, "train.duration=2 steps")
