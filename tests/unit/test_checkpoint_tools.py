"""`mixer checkpoint`, the mirror, other places for checkpoints, and starting from another run's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import TINY, train
from typer.testing import CliRunner

from data_tools.errors import UserError
from launch.checkpoints import checkpoint_app
from pipeline.checkpoint.layout import CheckpointReader
from pipeline.checkpoint.manager import choose, committed_steps
from pipeline.checkpoint.place import place
from pipeline.config import load_config, to_yaml
from pipeline.run import read_lines, read_metrics


def mixer_checkpoint(*args: object) -> str:
    result = CliRunner().invoke(checkpoint_app, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "run"
    assert train(folder, "checkpoint.every=2 steps", "checkpoint.keep_last=9", "data.val=null") == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def damage(folder: Path) -> None:
    victim = next(folder.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def test_list_verify_show_diff(run):
    lines = mixer_checkpoint("list", run).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["2", "4", "6", "8"] and "best" in lines[-1]
    assert mixer_checkpoint("verify", run).count("whole") == 4
    assert "digest" in mixer_checkpoint("show", run, "best", "--digest")
    assert "equal, bit for bit" in mixer_checkpoint("diff", run, "last", "step-8")
    assert "weight" in mixer_checkpoint("diff", run, "step-2", "step-4")
    damage(run / "checkpoints" / "step-00000004")
    with pytest.raises(UserError, match="1 of 4 checkpoints are damaged"):
        mixer_checkpoint("verify", run)


def test_prune_never_removes_the_newest_whole_one(run):
    damage(run / "checkpoints" / "step-00000008")
    assert "would remove" in mixer_checkpoint("prune", run, "--dry-run")
    assert committed_steps(run / "checkpoints") == [2, 4, 6, 8]
    mixer_checkpoint("prune", run)
    assert committed_steps(run / "checkpoints") == [6, 8]  # 8 is the best and the newest, 6 the newest whole one


def test_a_mirror_brings_back_what_the_fast_disk_lost(tmp_path):
    mirror, run = tmp_path / "mirror", tmp_path / "run"
    settings = (f"checkpoint.mirror={mirror}", "checkpoint.every=4 steps")
    assert train(run, *settings) == 0
    digest = CheckpointReader(choose(run / "checkpoints", "last")).digest()
    assert CheckpointReader(choose(mirror, "last")).digest() == digest
    shutil.rmtree(run / "checkpoints")
    assert train(run, *settings, "train.duration=10 steps") == 0
    resumed = [e for e in read_lines(run / "events.jsonl") if e["event"] == "resume"]
    assert resumed[-1]["step"] == 8


def test_an_unreachable_mirror_warns_and_nothing_more(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert train(tmp_path / "run", f"checkpoint.mirror={tmp_path}/file/mirror") == 0
    assert any(e["event"] == "mirror_failed" for e in read_lines(tmp_path / "run" / "events.jsonl"))
    assert committed_steps(tmp_path / "run" / "checkpoints")[-1] == 8


def test_checkpoints_in_an_object_store(tmp_path):
    """fsspec's in-memory store: the same bits as on disk, resumed from there, pruned there."""
    store = f"memory://{tmp_path.name}/run"
    assert train(tmp_path / "disk") == 0
    settings = (f"checkpoint.dir={store}", "checkpoint.keep_last=1", "checkpoint.every=2 steps")
    assert train(tmp_path / "remote", *settings, "train.duration=8 steps") == 0
    root = place(store)
    assert committed_steps(root) == [8]
    expected = CheckpointReader(choose(tmp_path / "disk" / "checkpoints", "last")).digest()
    assert CheckpointReader(choose(root, "last")).digest() == expected
    assert train(tmp_path / "remote", *settings, "train.duration=9 steps") == 0
    assert [e["step"] for e in read_lines(tmp_path / "remote" / "events.jsonl") if e["event"] == "resume"] == [8]


def test_checkpoints_written_while_the_loop_waits_are_the_same(tmp_path):
    assert train(tmp_path / "a") == 0
    assert train(tmp_path / "b", "checkpoint.background=false") == 0
    a, b = (CheckpointReader(choose(tmp_path / r / "checkpoints", "last")).digest() for r in "ab")
    assert a == b


def test_a_new_run_from_another_runs_weights(tmp_path, finished):
    frozen = ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "train.duration=1 steps", f"run.init_from={finished}")
    assert train(tmp_path / "weights", *frozen) == 0
    assert train(tmp_path / "all", *frozen, "run.init_optimizer=true") == 0
    source = CheckpointReader(choose(finished / "checkpoints", "last"))
    for name, steps in (("weights", 1), ("all", 9)):
        reader = CheckpointReader(choose(tmp_path / name / "checkpoints", "last"))
        gap = (reader.tensor("head.weight") - source.tensor("head.weight")).abs().max()
        assert gap < 1e-9, "the run began with the other run's weights"
        assert reader.state()["optimizer_step"] == steps
        assert read_metrics(tmp_path / name)[0]["step"] == 1
    with pytest.raises(UserError, match="another model"):
        train(tmp_path / "other", *frozen, "model.hidden_dim=20")


def test_a_new_run_from_a_run_whose_checkpoints_lie_elsewhere(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    assert train(tmp_path / "first", f"checkpoint.dir={elsewhere}") == 0
    config = load_config(None, [*TINY, f"checkpoint.dir={elsewhere}", f"run.dir={tmp_path / 'first'}"]).config
    (tmp_path / "first" / "config.yaml").write_text(to_yaml(config))  # the command line does so
    frozen = ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "train.duration=1 steps")
    assert train(tmp_path / "run", *frozen, f"run.init_from={tmp_path / 'first'}") == 0
    source, begun = (CheckpointReader(choose(f, "last")) for f in (elsewhere, tmp_path / "run" / "checkpoints"))
    assert (begun.tensor("head.weight") - source.tensor("head.weight")).abs().max() < 1e-9


def test_the_manifest_says_who_wrote(finished):
    manifest = json.loads((choose(finished / "checkpoints", "last") / "MANIFEST.json").read_text())
    assert manifest["written_by"] == {"world_size": 1, "strategy": "ddp", "attempt": 0, "best": "top1"}


def test_checkpoints_of_another_run_are_refused(tmp_path):
    """Two runs that were given one place: the second must neither go on from the first nor prune it."""
    shared = f"checkpoint.dir={tmp_path / 'shared'}"
    assert train(tmp_path / "a", shared) == 0
    with pytest.raises(UserError, match="belongs to another run"):
        train(tmp_path / "b", shared)
    assert committed_steps(tmp_path / "shared") == [4, 8]


def test_a_run_does_not_begin_again_because_its_checkpoints_are_said_to_be_elsewhere(tmp_path):
    assert train(tmp_path / "run") == 0
    with pytest.raises(UserError, match="copy them there first"):
        train(tmp_path / "run", f"checkpoint.dir={tmp_path / 'new'}", "train.duration=9 steps")


def test_smoke_leaves_the_place_of_the_real_checkpoints_alone(tmp_path, capsys):
    from helpers import TINY, as_before

    from pipeline.cli import run_smoke
    from pipeline.config import load_config

    places = (f"checkpoint.dir={tmp_path / 'there'}", f"checkpoint.mirror={tmp_path / 'mirror'}")
    with as_before():
        assert run_smoke(load_config(None, [*TINY, f"run.dir={tmp_path / 'run'}", *places]).config) == 0
    assert "fit to submit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_steps_to_save_at_are_kept_where_ranks_agree_rarely(tmp_path, monkeypatch):
    """On a GPU ranks agree every tenth step only; what is due by the count of steps does not wait for that."""
    from dataclasses import replace

    from pipeline.parts import Schedule

    schedule_of = Schedule.of
    monkeypatch.setattr(Schedule, "of", staticmethod(lambda *a, **k: replace(schedule_of(*a, **k), agree_every=10)))
    keep = "checkpoint.keep_last=9"
    assert train(tmp_path / "steps", "checkpoint.every=3 steps", keep) == 0
    assert committed_steps(tmp_path / "steps" / "checkpoints") == [3, 6, 8]
    clock = ("checkpoint.every=15 min", "checkpoint.keep_every=3 steps", "checkpoint.keep_last=1")
    assert train(tmp_path / "clock", *clock) == 0
    assert committed_steps(tmp_path / "clock" / "checkpoints") == [3, 6, 8]


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    from pipeline.checkpoint import layout, manager

    assert train(tmp_path / "run") == 0

    def unreachable(path):
        raise TimeoutError(110, "Connection timed out")

    with monkeypatch.context() as patch:
        patch.setattr(layout, "hash_file", unreachable)
        patch.setattr(manager, "READ_PAUSES", (0.0, 0.0))
        with pytest.raises(UserError, match="cannot be read now"):
            train(tmp_path / "run", "train.duration=9 steps")
    assert committed_steps(tmp_path / "run" / "checkpoints") == [4, 8]
    assert train(tmp_path / "run", "train.duration=9 steps") == 0
