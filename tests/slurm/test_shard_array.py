"""Sharding as an array on a real SLURM: same bytes, also when a node loses its power or parts run by hand."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from corpora import make_corpus, markers, repeated, run, set_files, start, wait_until

from data_tools import draft, slurm_array
from data_tools.engines import Output, ShardOptions, plan_into, run_part, shard_corpus
from data_tools.errors import UserError
from data_tools.slurm_array import array_script


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 600, side=120)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    shard_corpus(ShardOptions(corpus, out, max_samples=10, workers=2))
    return set_files(out)


@pytest.mark.slurm
@pytest.mark.slow
def test_submit_then_finalize(slurm, corpus, undisturbed, tmp_path):
    out = tmp_path / "it's $HOME\n%j `out`"  # a hostile name: nothing in it is ever run
    said = run("shard", corpus, out, "--max-samples", 10, "--engine", "slurm", "--num-tasks", 4, "--workers", 1,
               env=slurm.environment)  # fmt: skip
    job = re.search(r"SLURM job (\d+) packs it", said)
    assert job, said
    slurm.wait(job[1])
    logs = list((out / "plan" / "logs").glob("*.log"))
    assert len(logs) == 4
    assert "images" in run("shard", "--finalize", out)
    assert set_files(out) == undisturbed


@pytest.mark.slurm
@pytest.mark.slow
def test_a_node_without_power_in_the_middle(slurm, corpus, undisturbed, tmp_path):
    """Its tasks are requeued on what is left, and the run that waits finishes with the same bytes."""
    out = tmp_path / "out"
    waiting = start("shard", corpus, out, "--max-samples", 10, "--engine", "slurm", "--num-tasks", 8, "--wait",
                    "--workers", 1, "--sbatch", "--cpus-per-task=2", env=slurm.environment)  # fmt: skip
    wait_until(lambda: markers(out) >= 4, waiting, 120)
    try:
        slurm("kill-node", 2)
        _, error = waiting.communicate(timeout=240)
    finally:
        slurm("start-node", 2)
    assert waiting.returncode == 0, error
    assert set_files(out) == undisturbed


@pytest.mark.slurm
@pytest.mark.slow
def test_contents_are_hashed_by_an_array_before(slurm, tmp_path):
    corpus, options = repeated(tmp_path / "in"), ["--dedupe", "exact", "--max-samples", 200]
    run("shard", corpus, tmp_path / "local", *options)
    said = run("shard", corpus, tmp_path / "out", *options, "--engine", "slurm", "--num-tasks", 2, "--workers", 1,
               "--wait", env=slurm.environment)  # fmt: skip
    assert re.search(r"SLURM job \d+ hashes the images", said)
    assert set_files(tmp_path / "out") == set_files(tmp_path / "local")
    assert set_files(tmp_path / "out")["duplicates.jsonl"].count(b"\n") == 4400


def test_trouble_of_a_task_is_told_to_who_waits(slurm, tmp_path):
    corpus = make_corpus(tmp_path / "in", 10)
    out = tmp_path / "out"
    plan_into(ShardOptions(corpus, out, max_samples=5))
    (corpus / "class0" / "00000.jpg").write_bytes(b"written again")
    os.utime(corpus / "class0" / "00000.jpg", ns=(1, 1))
    job = run("shard", "--task-id", 0, "--num-tasks", 1, out, code=1)
    assert "was written again" in job


def test_parts_by_hand(corpus, undisturbed, tmp_path):
    out = tmp_path / "out"
    run("shard", corpus, out, "--max-samples", 10, "--plan-only")
    for part in (2, 0):
        run("shard", "--task-id", part, "--num-tasks", 3, "--workers", 1, out)
    assert "20 of 60 shards" in run("shard", "--finalize", out, code=1)
    both = [start("shard", "--task-id", 1, "--num-tasks", 3, "--workers", 1, out) for _ in range(2)]
    codes = sorted(p.wait(120) for p in both)  # the same part twice at once: refused (or done before it began)
    assert codes in ([0, 1], [0, 0])
    run("shard", "--finalize", out)
    assert set_files(out) == undisturbed
    assert "must be from 0 to 2" in run("shard", "--task-id", 3, "--num-tasks", 3, out, code=1)


def test_the_script_quotes_what_it_is_given(tmp_path):
    hostile = tmp_path / "a b'$(touch x)\n#SBATCH --wrap"
    script = array_script(Output(hostile), 3, 2)
    assert script.splitlines()[2].startswith("exec ")  # no line of the path has become one of the head
    # What a shell makes of it, with `exec` taken out of the way:
    shown = subprocess.run(
        ["bash", "-c", script.replace("exec ", "printf '%s\\0' ", 1)],
        env={"SLURM_ARRAY_TASK_ID": "7", "PATH": os.environ["PATH"]}, cwd=tmp_path, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    assert shown[-5:] == ["--task-id", "7", "--", str(hostile), ""] and not (tmp_path / "x").exists()


def test_a_scheduler_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\nsleep 20\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(slurm_array, "_ANSWER_SECONDS", 0.1)
    assert slurm_array._is_queued("7")


def test_parts_pack_as_soon_as_there_is_a_plan(tmp_path, monkeypatch):
    """What a run killed at the very end of planning left of its hashing is no work any more."""
    source, out = make_corpus(tmp_path / "in", 12), tmp_path / "out"

    clear = draft.Draft.clear

    def interrupted(self):
        if (out / "plan" / "plan.json").exists():
            raise KeyboardInterrupt
        clear(self)

    monkeypatch.setattr(draft.Draft, "clear", interrupted)
    options = ShardOptions(source, out, max_samples=5, dedupe="exact", workers=1)
    with pytest.raises(UserError, match="interrupted"):
        plan_into(options)
    for part in range(2):
        run_part(options.output(), part, 2, workers=1)
    assert markers(out) == 3
