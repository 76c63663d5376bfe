"""The checkpoints of a run: committed whole or not at all, kept by rule, found again past damage."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import script

from pipeline.checkpoint import manager, place
from pipeline.checkpoint.layout import MANIFEST, CheckpointError, CheckpointReader
from pipeline.checkpoint.manager import CheckpointManager, Retention, best_step, choose, committed_steps, step_folder
from pipeline.parallel.engine import WEIGHT, Piece
from pipeline.parallel.world import World

SHAPES = {("w", WEIGHT): (4, 5)}


class Run:
    """A manager and its simplest possible state: one tensor filled with the step."""

    def __init__(self, root: Path, world: World, **retention: Any):
        self.root = root
        self.manager = CheckpointManager(root, world, Retention(**retention))
        self.warnings: list[str] = []

    def save(self, step: int, top1: float | None = None, pieces: Iterator[Piece] | list[Piece] | None = None) -> None:
        whole = [Piece("w", WEIGHT, 0, torch.full((20,), float(step)))]
        metrics = {} if top1 is None else {"top1": top1}
        self.manager.save(
            step, SHAPES, whole if pieces is None else pieces, {"step": step}, metrics=metrics, written_by={}
        )

    def newest(self) -> CheckpointReader | None:
        return self.manager.newest_good(warn=self.warnings.append)

    def newest_step(self) -> int:
        reader = self.newest()
        assert reader is not None
        assert reader.state()["step"] == reader.manifest.step
        assert (reader.tensor("w") == reader.manifest.step).all()
        return reader.manifest.step

    def file(self, step: int) -> Path:
        return step_folder(self.root, step) / "rank-00000-of-00001.safetensors"


@pytest.fixture
def run(tmp_path, world) -> Run:
    return Run(tmp_path / "checkpoints", world)


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


def test_saves_and_finds_the_newest(run):
    assert run.newest() is None
    for step in (5, 10, 123_456_789_012):
        run.save(step)
    assert committed_steps(run.root) == [5, 10, 123_456_789_012]
    assert run.newest_step() == 123_456_789_012
    assert (run.root / "LATEST").read_text() == "step-123456789012\n"
    assert sorted(p.name for p in step_folder(run.root, 5).iterdir()) == [
        MANIFEST,
        "rank-00000-of-00001.safetensors",
        "state.json",
    ]
    assert run.warnings == []


# ----------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    "retention, expected",
    [
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 0}, [50]),
        ({"keep_last": 99}, [10, 20, 30, 40, 50]),
    ],
)
def test_retention(tmp_path, world, retention, expected):
    run = Run(tmp_path, world, **retention)
    for step in (10, 20, 30, 40, 50):
        run.save(step)
    assert committed_steps(run.root) == expected
    assert sorted(p.name for p in run.root.iterdir() if p.is_dir()) == [step_folder(run.root, s).name for s in expected]


def test_the_best_stays_and_is_found(tmp_path, world):
    run = Run(tmp_path, world, keep_last=1)
    with pytest.raises(CheckpointError, match="the run has not saved yet"):
        choose(run.root, "last")
    for step, top1 in [(1, None), (2, 0.4), (3, 0.9), (4, 0.5), (5, None)]:
        run.save(step, top1)
        assert step in committed_steps(run.root)
    assert committed_steps(run.root) == [3, 5]
    assert best_step(run.root) == 3
    assert choose(run.root, "best") == step_folder(run.root, 3)
    assert choose(run.root, "last") == step_folder(run.root, 5)
    assert choose(run.root, "step-3") == choose(run.root, "3") == step_folder(run.root, 3)
    with pytest.raises(CheckpointError, match="there are: last, best, step-3, step-5"):
        choose(run.root, "step-4")
    run.save(6, 0.9)
    assert best_step(run.root) == 6  # the later of equals
    assert committed_steps(run.root) == [6]


def test_the_best_is_that_of_the_metric_asked_for(run):
    for step, loss in [(1, 2.0), (2, 1.5), (3, 1.7)]:
        by, metrics = {"best": "loss"}, {"loss": loss, "top1": loss}
        pieces = [Piece("w", WEIGHT, 0, torch.zeros(20))]
        run.manager.save(step, SHAPES, pieces, {}, metrics=metrics, written_by=by)
    assert best_step(run.root) == 2
    assert manager.best_score(run.root, "top1") == (2.0, 1)


def test_nothing_was_evaluated(run):
    run.save(1)
    assert best_step(run.root) is None
    with pytest.raises(CheckpointError, match="--checkpoint last"):
        choose(run.root, "best")


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "state"])
def test_walks_back_over_damage_with_a_warning(run, damage):
    for step in (1, 2, 3):
        run.save(step)
    for step in (2, 3):
        path = run.file(step)
        match damage:
            case "flip":
                flip(path)
            case "truncate":
                path.write_bytes(path.read_bytes()[:-4])
            case "delete":
                path.unlink()
            case "manifest":
                flip(path.parent / MANIFEST, 30)
            case "state":
                flip(path.parent / "state.json", 3)
    assert run.newest_step() == 1
    assert len(run.warnings) == 2
    assert "step-00000003" in run.warnings[0] and "step-00000002" in run.warnings[1]


def test_damaged_checkpoints_do_not_crowd_out_good_ones(tmp_path, world):
    """Their steps are higher: retention would take them for the newest, and prune what was just saved."""
    run = Run(tmp_path, world, keep_last=1)
    run.save(10)
    run.manager.retention = Retention(keep_last=2)
    run.save(20)
    flip(run.file(20))
    run.manager.retention = Retention(keep_last=1)
    assert run.newest_step() == 10
    run.save(15)
    assert run.newest_step() == 15
    assert committed_steps(run.root) == [15]
    assert len(run.warnings) == 1


def test_all_damaged_is_an_error_again_and_again(run):
    """Never a silent start from the beginning, also not at the second try of a restarting launcher."""
    for step in (1, 2):
        run.save(step)
        flip(run.file(step))
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"2 were tried.*restore one from a copy"):
            run.newest()


def test_a_folder_without_manifest_is_no_checkpoint_and_is_cleaned(run):
    run.save(1)
    run.save(2)
    (step_folder(run.root, 2) / MANIFEST).unlink()
    other = run.root / "step-of-somebody"
    other.mkdir()
    assert committed_steps(run.root) == [1]
    assert run.newest_step() == 1
    run.manager.clean()
    assert not step_folder(run.root, 2).exists()
    assert other.exists() and run.newest_step() == 1
    assert run.warnings == []


def test_debris_of_the_same_step_is_overwritten(run):
    debris = step_folder(run.root, 4)
    debris.mkdir(parents=True)
    (debris / "rank-00007-of-00008.safetensors").write_bytes(b"half")
    run.save(4)
    assert not (debris / "rank-00007-of-00008.safetensors").exists()
    assert run.newest_step() == 4


# ------------------------------------------------------------------------------------------- failing saves


def failing(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [(manager, "write_pieces"), (manager, "publish"), (manager, "sync_folder"), (place.os, "fsync")],
    ids=lambda w: w[1],
)
def test_a_failing_write_leaves_the_previous_checkpoint_and_no_debris(run, monkeypatch, where):
    run.save(1)
    with monkeypatch.context() as m:
        m.setattr(*where, failing)
        with pytest.raises(CheckpointError, match=r"rank 0: .*No space left"):
            run.save(2)
    assert committed_steps(run.root) == [1] and run.newest_step() == 1
    assert not step_folder(run.root, 2).exists()
    run.save(3)
    assert run.newest_step() == 3


def test_an_incomplete_state_is_not_committed(run):
    run.save(1)
    for pieces in ([], [Piece("w", WEIGHT, 0, torch.zeros(19))], [Piece("v", WEIGHT, 0, torch.zeros(20))]):
        with pytest.raises(CheckpointError):
            run.save(2, pieces=pieces)
        assert committed_steps(run.root) == [1]


def test_a_failing_save_prunes_nothing(tmp_path, world, monkeypatch):
    run = Run(tmp_path, world, keep_last=1)
    run.save(1)
    monkeypatch.setattr(manager, "check_coverage", failing)
    for step in (2, 3, 4):
        with pytest.raises(CheckpointError):
            run.save(step)
    assert run.newest_step() == 1


FULL_DISK = """
import resource, signal
from pathlib import Path
from helpers import train
from pipeline import trainer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an OSError, as on a full disk
original = trainer.Trainer._complete_step
def complete(self, batches):
    original(self, batches)
    if self.step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    if self.step == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
trainer.Trainer._complete_step = complete
sys.exit(train(Path(sys.argv[1]), "checkpoint.every=3 steps", "checkpoint.background=false"))
"""


def test_training_goes_on_while_checkpoints_cannot_be_written(tmp_path):
    """A disk that is full around step 6 of 8: a warning, no debris, and the next save succeeds."""
    out = subprocess.run(script(FULL_DISK, tmp_path / "run"), capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "checkpoint at step 6 failed, the previous one stays" in out.stdout
    assert committed_steps(tmp_path / "run" / "checkpoints") == [3, 8]
    assert not step_folder(tmp_path / "run" / "checkpoints", 6).exists()


# ------------------------------------------------------------------------------------------------- outages


class Flaky:
    """Path methods that fail a few times on files of one name, as a sick file server does."""

    def __init__(self, monkeypatch, name: str, times: int):
        self.times = times
        for method in ("read_bytes", "read_text"):
            real = getattr(Path, method)
            monkeypatch.setattr(Path, method, lambda p, *a, real=real, **k: self._call(real, name, p, *a, **k))

    def _call(self, real: Any, name: str, path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name and self.times > 0:
            self.times -= 1
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)


@pytest.mark.parametrize("name", [MANIFEST, "state.json"])
def test_a_read_error_is_no_damage(run, monkeypatch, name):
    monkeypatch.setattr(manager, "READ_PAUSES", (0.0, 0.0))
    run.save(1)
    run.save(2)
    flaky = Flaky(monkeypatch, name, times=2)
    assert run.newest_step() == 2
    flaky.times = 99
    with pytest.raises(CheckpointError, match=r"cannot be read now .*Input/output error"):
        run.newest()
    flaky.times = 0
    assert run.newest_step() == 2 and run.warnings == []


def test_an_unreadable_best_is_not_pruned(tmp_path, world, monkeypatch):
    run = Run(tmp_path, world, keep_last=1)
    run.save(1, top1=0.9)
    flaky = Flaky(monkeypatch, MANIFEST, times=99)
    run.save(2, top1=0.1)  # committed, although the housekeeping could not be done
    flaky.times = 0
    run.save(3, top1=0.2)
    assert committed_steps(run.root) == [1, 3] and best_step(run.root) == 1


class Outage(Exception):
    """What a store's client raises when nobody answers: like botocore's, no OSError."""


def with_mirror(tmp_path: Path, world: World, mirror: Path) -> Run:
    run = Run(tmp_path / "checkpoints", world)
    run.manager.mirror = mirror
    return run


def out_of_reach(monkeypatch, store: Path) -> None:
    def no_answer(*args: Any, **kwargs: Any) -> Any:
        raise Outage("Could not connect to the endpoint URL")

    for method in ("exists", "info", "isdir", "ls", "find", "open", "cat_file", "rm", "mv"):
        monkeypatch.setattr(type(store.fs), method, no_answer)  # type: ignore[attr-defined]


def test_an_outage_of_a_store_is_an_os_error(tmp_path, world, monkeypatch):
    monkeypatch.setattr(manager, "READ_PAUSES", (0.0,))
    root = place.place(f"memory://{tmp_path.name}")
    run = Run(root, world)
    run.save(1, top1=0.5)
    with monkeypatch.context() as patch:
        out_of_reach(patch, root)
        for read in (
            lambda: committed_steps(root),
            lambda: best_step(root),
            lambda: list(place.blocks(root / "file")),
            lambda: place.read(root / "file"),
            lambda: place.write_durably(root / "file", [b""]),
        ):
            with pytest.raises(OSError, match="Outage: Could not connect"):
                read()
        with pytest.raises(CheckpointError, match=r"cannot be read now .*Could not connect"):
            run.newest()
        with pytest.raises(CheckpointError, match="Could not connect"):
            run.save(2)
    assert run.newest_step() == 1 and run.warnings == []


def test_debris_on_the_mirror_is_cleaned(tmp_path, world):
    run = with_mirror(tmp_path, world, tmp_path / "mirror")
    run.save(1)
    run.manager.copy_to_mirror(1)
    debris = tmp_path / "mirror" / "step-00000002"
    debris.mkdir()
    (debris / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    run.manager.clean()
    assert not debris.exists() and committed_steps(tmp_path / "mirror") == [1]


def test_a_start_without_the_mirror(tmp_path, world, monkeypatch):
    monkeypatch.setattr(manager, "READ_PAUSES", (0.0,))
    mirror = place.place(f"memory://{tmp_path.name}")
    run = with_mirror(tmp_path, world, mirror)
    out_of_reach(monkeypatch, mirror)
    with pytest.raises(CheckpointError, match="cannot be read now"):  # the only copy may lie there
        run.newest()
    run.save(1)
    assert run.newest_step() == 1
    assert len(run.warnings) == 1 and "the mirror" in run.warnings[0]
    run.manager.clean()
