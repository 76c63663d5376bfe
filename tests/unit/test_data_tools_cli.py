"""The thin commands over the sharding functions."""

import re
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
import typer
from typer.testing import CliRunner

from data_tools import progress
from data_tools.cli import data_app, format_bytes, parse_bad, parse_size, shard
from data_tools.progress import Progress, ProgressPrinter

app = typer.Typer()
app.command()(shard)
app.add_typer(data_app, name="data")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500000", 500_000),
        ("256MB", 256_000_000),
        ("1GiB", 2**30),
        ("1.5 gb", 1_500_000_000),
        ("64k", 64_000),
    ],
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "MB", "1 XB", "-1", "1GBB", "ib"])
def test_sizes_that_are_none(text):
    with pytest.raises(typer.BadParameter):
        parse_size(text)


def test_bad_counts_and_fractions():
    assert [parse_bad(t) for t in ("10", "0.5%", "0.001")] == [10, 0.005, 0.001]
    assert isinstance(parse_bad("1"), int) and isinstance(parse_bad("100%"), float)
    with pytest.raises(typer.BadParameter):
        parse_bad("few")


def test_bytes_for_people():
    assert [format_bytes(n) for n in (0, 999, 1_500_000, 2.5e12)] == ["0 B", "999 B", "1.5 MB", "2.5 TB"]


def test_from_corpus_to_inspection(tmp_path):
    for i in range(4):
        (tmp_path / "in" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (8, 9, 3), dtype=np.uint8)
        (tmp_path / "in" / f"c{i % 2}" / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    source, out = str(tmp_path / "in"), str(tmp_path / "out")

    def run(*args: str) -> str:
        result = CliRunner().invoke(app, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "4 images" in run("shard", source, out, "--dry-run") and not (tmp_path / "out").exists()
    assert "train: 4 images, 1 shard," in run("shard", source, out, "--workers", "1")
    assert "4 images checked: 0 problems" in run("data", "verify", out)
    assert "images a class: 2 to 2" in run("data", "inspect", out)
    assert "9 x 8  label 1 (c1)" in run("data", "inspect", f"{out}/train-000000.tar", "c1/3")
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"")
    result = CliRunner().invoke(app, ["data", "verify", out])
    assert result.exit_code == 1 and "the manifest says" in result.output


def test_importing_the_commands_is_light():
    code = "import sys, data_tools.cli; print({'numpy', 'PIL', 'xxhash', 'torch'} & sys.modules.keys())"
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == "set()"


def test_progress_on_a_terminal_and_in_a_log(monkeypatch, capsys):
    at = [Progress(n, 400, 100, n // 100, n * 1000, n // 100, 4) for n in (100, 250, 400)]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with ProgressPrinter() as printer:
        for now in at:
            printer(now)
    log = capsys.readouterr().err
    assert "going on: 100 of 400 images were done before" in log
    assert re.search(r"250/400 images \(62%\), shard 2/4, [\d,]+ img/s, [\d,.]+ MB/s, 2 bad, [\d,]+ s left", log)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressPrinter() as printer:
        for now in at:
            printer(now)
    bar = capsys.readouterr().err
    assert all(text in bar for text in ("sharding", "400/400", "img/s", "MB/s", "bad", "ETA"))
