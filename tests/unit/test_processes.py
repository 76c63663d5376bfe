"""What training processes of one machine agree on without talking: who says an error that all of them meet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

COMPLAIN = "import sys; from launch.cli import _complain; _complain(sys.argv[1], True)"


def complain(outcome: Path, rank: int, message: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "MIXER_OUTCOME_FILE": str(outcome)}
    command = [sys.executable, "-c", COMPLAIN, message]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_an_error_of_all_ranks_is_said_once_and_an_error_of_one_soon(tmp_path):
    begin = time.monotonic()
    others = [complain(tmp_path / "outcome", rank, "too few samples") for rank in (1, 2)]
    alone = complain(tmp_path / "outcome", 3, "the disk of this node is broken")
    zero = complain(tmp_path / "outcome", 0, "too few samples")
    said = [p.communicate(timeout=60)[1] for p in (zero, *others)]
    assert "".join(said).count("too few samples") == 1
    assert said[0] in ("error: too few samples\n", "")  # the last only where it starts seconds after the others
    assert alone.communicate(timeout=60)[1] == "error (rank 3): the disk of this node is broken\n"
    assert time.monotonic() - begin < 12
