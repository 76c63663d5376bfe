"""`mixer doctor` on this very machine, fit and unfit."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from helpers import TINY, train

from data_tools.errors import UserError
from launch import doctor


def mixer(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def test_this_machine_is_fit_and_what_is_short_is_named(tmp_path: Path) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    assert train(tmp_path / "run", *TINY) == 0
    done = mixer(tmp_path / "run", preexec_fn=few_files)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {" ".join(line.split()[:2]): line for line in done.stdout.splitlines()}
    assert {"ok python", "ok torch", "ok packages", "ok JPEG", "ok disk", "ok clock"} <= lines.keys()
    assert "newest step 8" in lines["ok checkpoints"]
    assert "1,000" in lines["note open"] and "ulimit -n" in lines["note open"]
    assert done.stdout.endswith("fit to train\n")


def test_what_would_stop_a_training_is_bad(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "elsewhere"
    assert train(run, *TINY, f"checkpoint.dir={place}") == 0
    place.rename(tmp_path / "moved")
    place.write_text("a file where the folder was")
    config = (run / "config.yaml").read_text().replace("train: synthetic", f"train: {tmp_path / 'nowhere'}")
    (run / "config.yaml").write_text(config)
    findings = []
    for finding in doctor._run(str(run)):
        findings.append((finding.level, finding.topic))
    assert findings == [("BAD", "checkpoints"), ("BAD", "data")]
    done = mixer(run)
    assert done.returncode == UserError.exit_code
    assert "2 of these would stop or spoil a training" in done.stderr and "Traceback" not in done.stderr
