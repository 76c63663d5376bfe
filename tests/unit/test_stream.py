"""Tars without an index, through the webdataset library: they train, and say that they are not exact."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from helpers import TINY_MODEL, picture, png, train

from data_tools.errors import UserError
from pipeline.audit import audit
from pipeline.config import load_config
from pipeline.data.stream import StreamSource
from pipeline.run import RunFolder, read_ledger


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(3):
        with tarfile.open(folder / f"a-{shard:03d}.tar", "w") as tar:
            for i in range(20):
                for name, data in ((f"{i:03d}.png", png(picture(i))), (f"{i:03d}.cls", str(i % 4).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_it_trains_and_resumes_and_refuses_an_audit(tars, tmp_path, capfd, workers):
    run = tmp_path / "run"
    where = [f"data.train={tars}/a-{{000..002}}.tar", "data.stream_samples=60", f"data.num_workers={workers}"]
    assert train(run, *where, *TINY_MODEL) == 0
    assert "a resume is approximate and an audit impossible" in capfd.readouterr().out
    assert train(run, *where, *TINY_MODEL, "train.duration=10 steps") == 0
    assert sorted(read_ledger(run)) == list(range(1, 11))
    with pytest.raises(UserError, match="cannot be audited"):
        audit(load_config(str(run / "config.yaml")).config, RunFolder(run))


def test_a_shell_runs_only_where_it_is_allowed(tars, tmp_path):
    where = [f"data.train=pipe:cat {tars}/a-000.tar", "data.stream_samples=20"]
    with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
        train(tmp_path / "run", *where)
    with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
        train(tmp_path / "run", "data.train=http://127.0.0.1:9/a.tar", "data.stream_samples=20")
    assert train(tmp_path / "run", *where, "data.allow_pipe=true", "train.duration=2 steps") == 0


@pytest.mark.parametrize(
    "urls",
    [
        "{tars}/a-000.tar::pipe:touch {mark} #.tar",
        "{{{tars}/a-000,pipe:touch {mark} #}}.tar",
        "gs:'; touch {mark}; '.tar",
        "{tars}/${{name}}.tar",
        "{tars}/a-000.tar",
    ],
)
def test_no_disguise_gets_a_shell(tars, tmp_path, monkeypatch, urls):
    mark = tmp_path / "ran"
    monkeypatch.setenv("WDS_name", f"pipe:touch {mark} #")
    if urls == "{tars}/a-000.tar":
        monkeypatch.setenv("GOPEN_REWRITE", f".*=pipe:touch {mark} #")
    with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
        source = StreamSource(urls.format(tars=tars, mark=mark), samples=20, seed=0, num_classes=4, allow_pipe=False)
        for i in range(20):
            source.read(i, 3)
    assert not mark.exists()


def test_refusals(tars, tmp_path):
    with pytest.raises(UserError, match=r"set data\.stream_samples=N"):
        train(tmp_path / "run", f"data.train={tars}/a-000.tar")
    with pytest.raises(UserError, match="nothing can be read of it"):
        train(tmp_path / "run", f"data.train={tmp_path}/missing-000.tar", "data.stream_samples=20")
