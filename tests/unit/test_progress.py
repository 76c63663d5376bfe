"""How far a run is saved, where the place of its checkpoints does not answer at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch import progress
from pipeline.run import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(progress, "_PAUSE", 0.01)
    folder = RunFolder(tmp_path / "run")
    for step in (4, 8):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (folder.checkpoints / f"step-{step:08d}" / "MANIFEST.json").write_text("{}")
    return folder


def silent(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first `times` questions are not answered."""
    original, left = progress.committed_steps, [times]

    def ask(root: Path) -> list[int]:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(5, "no answer")
        return original(root)

    monkeypatch.setattr(progress, "committed_steps", ask)


def test_the_newest_checkpoint_tells(run, tmp_path):
    assert progress.saved_step(run) == 8
    assert progress.saved_step(RunFolder(tmp_path / "nowhere")) == -1


def test_a_restart_waits_for_an_answer(run, monkeypatch, capsys):
    silent(3, monkeypatch)
    assert progress.saved_step(run, patience=60) == 8
    assert capsys.readouterr().out.count("is out of reach ([Errno 5] no answer); waiting up to 60 s") == 1


@pytest.mark.parametrize(("patience", "given_up"), [(0.0, False), (0.05, False), (60.0, True)])
def test_nobody_waits_for_ever(run, monkeypatch, patience, given_up):
    """At once at a start, after the patience of a restart, or when the run is to be stopped."""
    silent(10**6, monkeypatch)
    with pytest.raises(UserError, match=r"checkpoints is out of reach.*no answer.*mixer resume"):
        progress.saved_step(run, patience, lambda: given_up)
