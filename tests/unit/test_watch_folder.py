"""Who failed first, which rank is waited for, which start is meant: from folders made by hand; and real pulses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch.failure import failures, first_failure, mended_failures
from launch.output import Tee
from launch.watch import current_start, find_runs, look, slowest, span
from launch.watch_cli import _copy, _tail
from pipeline.logs import StartLogs, new_local_start, starts
from pipeline.pulse import SIZE, Beat, read_pulse
from pipeline.run import RunFolder, last_lines

NOW = time.time() - 1000  # whatever is compared with the clock goes through `now`
WAITING = "all_reduce (distributed/distributed_c10d.py:3252) < sum (parallel/world.py:61)"
READING = "read (data/source.py:88) < train (pipeline/trainer.py:1)"


def beat(rank: int, **more: object) -> Beat:
    base = Beat(NOW, rank, 3, f"node{rank}", 1, NOW - 100, "training", 40, NOW - 90, 0.5, 0.1, WAITING)
    return replace(base, **more)  # type: ignore[arg-type]


def now(beats: list[Beat]) -> dict[int, Beat]:
    """As if this module had been imported just now."""
    late = time.time() - NOW
    return {b.rank: replace(b, time=b.time + late, since=b.since + late) for b in beats}


def write(logs: StartLogs, *beats: Beat) -> None:
    logs.folder.mkdir(parents=True, exist_ok=True)
    for b in beats:
        logs.pulse(b.rank).write_text(json.dumps(asdict(b)))


def fail(logs: StartLogs, rank: int, error: Exception, at: float) -> None:
    path = logs.write_error(rank, error, 70)
    assert path
    record = json.loads(path.read_text()) | {"time": at, "host": f"node{rank}"}
    path.write_text(json.dumps(record))


def test_the_cause_comes_before_what_others_noticed_earlier(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path / "7.0")
    write(logs, *(beat(r, state="failed") for r in range(3)))
    fail(logs, 0, RuntimeError("[gloo] Connection reset by peer"), NOW - 5)
    fail(logs, 2, RuntimeError("CUDA error: uncorrectable ECC error encountered"), NOW - 4)
    found = failures(logs)
    assert [f.rank for f in found] == [2, 0] and found[1].consequence
    assert found[0].headline.startswith("rank 2 on node2: RuntimeError: CUDA error") and "--exclude" in found[0].advice


def test_a_killed_rank_is_known_by_torchrun_and_a_lost_node_by_its_silence(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path / "7.0")
    write(logs, beat(0, state="failed"), beat(1, where=READING), beat(2, time=NOW - 60))
    fail(logs, 0, RuntimeError("Connection closed by peer"), NOW - 5)
    row = {"rank": 1, "exit_code": -9, "time": int(NOW - 6), "host": "node1"}
    saved = {"rank": 0, "exit_code": 70, "time": int(NOW - 5), "host": "node0"}
    (logs.folder / "agent-node1-1.json").write_text(json.dumps([row, saved]))
    found = {f.rank: f.message for f in failures(logs)}
    assert found[1] == "killed by SIGKILL after step 40, in read (data/source.py:88)"
    assert "no sign of life" in found[2] and len(found) == 3
    assert first_failure(logs).rank == 2  # type: ignore[union-attr] - it fell silent first


def test_saved_and_ended_by_torchrun_is_no_failure(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path / "7.0")
    write(logs, beat(0, state="ended"), beat(1, state="ended"))
    rows = [{"rank": r, "exit_code": c, "time": NOW, "host": "n"} for r, c in ((0, 75), (1, -15))]
    (logs.folder / "agent-n-1.json").write_text(json.dumps(rows))
    assert failures(logs) == []


def test_failures_before_processes_were_started_again_are_mended(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path / "7.0")
    write(logs, beat(0, started=NOW - 20), beat(1, started=NOW - 20))
    fail(logs, 1, ValueError("then"), NOW - 40)
    assert failures(logs) == [] and [f.message for f in mended_failures(logs)] == ["ValueError: then"]
    fail(logs, 1, ValueError("now"), NOW - 3)
    assert first_failure(logs).message == "ValueError: now"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("beats", "rank"),
    [
        ([beat(0), beat(1, time=NOW - 60), beat(2)], 1),  # frozen, or gone with its node
        ([beat(0), beat(1), beat(2, where=READING)], 2),  # all wait but one
        ([beat(0, step=41), beat(1, step=41), beat(2)], 2),  # one is a step behind
        ([beat(0), beat(1), beat(2)], None),  # all wait for something else
        ([beat(0, since=NOW), beat(1, where=READING), beat(2)], None),  # too early to tell
    ],
)
def test_the_rank_that_others_wait_for(beats: list[Beat], rank: int | None) -> None:
    found = slowest(now(beats), 30.0, stuck=True)
    assert (found.rank if found else None) == rank


def test_a_rank_that_is_merely_slow_is_named_while_it_trains() -> None:
    found = slowest(now([beat(r, own_s=0.3 if r == 1 else 0.1) for r in range(3)]), 30.0, stuck=False)
    assert found and (found.rank, found.host) == (1, "node1")
    assert slowest(now([beat(r) for r in range(3)]), 30.0, stuck=False) is None


def test_states_of_runs_on_other_machines(tmp_path: Path) -> None:
    """No process of these is here: pulses alone tell."""

    def state(name: str, *beats: Beat, **status: object) -> str:
        run = RunFolder(tmp_path / name)
        write(StartLogs(run.path / "logs" / "7.0"), *beats)
        run.write_status(state="training", step=40, total_steps=100, logs="7.0", eta_s=50, **status)
        return look([run.path])[0].state

    fresh = {"time": time.time(), "since": time.time()}
    assert state("a", beat(0, **fresh), beat(1, **fresh), beat(2, **fresh)) == "TRAINING"
    assert state("b", beat(0, **fresh), beat(1, **fresh), beat(2, time=NOW - 60)) == "STALLED"
    assert state("c", beat(0, **fresh | {"since": time.time() - 90}), beat(1, **fresh), beat(2, **fresh)) == "STALLED"
    assert state("d", beat(0, **fresh | {"since": time.time() - 90}, state="loading"), beat(1, **fresh)) == "LOADING"
    assert state("e", *(beat(r, time=NOW - 300) for r in range(3))) == "DIED"
    waiting = look([tmp_path / "d"])[0]
    assert (waiting.step, waiting.world_size, waiting.nodes) == (40, 3, ["node0", "node1"])
    missing = beat(0, **fresh, state="starting"), beat(2, **fresh, state="starting")
    assert state("f", *missing) == "STARTING"
    assert look([tmp_path / "f"])[0].note == "waits for rank 1 of 3, which did not appear"
    assert [p.name for p in find_runs([str(tmp_path)])] == ["a", "b", "c", "d", "e", "f"]


def test_starts_are_numbered_and_the_newest_is_meant(tmp_path: Path) -> None:
    first, second = new_local_start(tmp_path), new_local_start(tmp_path)
    assert [first.name, second.name] == ["local.0", "local.1"]
    os.utime(first.folder, (NOW - 10, NOW - 10))
    assert [s.name for s in starts(tmp_path)] == ["local.0", "local.1"]
    assert current_start(RunFolder(tmp_path)) == second


def test_a_pulse_goes_on_while_the_main_thread_hangs_and_stays_as_long_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pulse-rank-0.json"
    code = f"""
import time
from pathlib import Path
from pipeline import pulse
pulse.INTERVAL = 0.1
p = pulse.Pulse(Path({str(path)!r}))
p.enter("training"); p.step(1, 0.5); p.step(2, 0.5)
def where_it_hangs():
    time.sleep(2)
where_it_hangs()
p.end()
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        seen = []
        while process.poll() is None:
            if path.exists() and (b := read_pulse(path)):
                assert path.stat().st_size == SIZE
                seen.append(b)
            time.sleep(0.02)
    finally:
        process.kill()
    hanging = [b for b in seen if "where_it_hangs" in b.where]
    assert len({b.time for b in hanging}) > 3 and {b.step for b in hanging} == {2}
    last = read_pulse(path)
    assert last and last.state == "ended" and last.over and last.own_s == pytest.approx(0.5)


def test_a_hang_leaves_last_words(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path / "local.0")
    code = f"""
import time
from pathlib import Path
from pipeline.health import EXIT_HUNG, Watchdog
from pipeline.logs import StartLogs
logs = StartLogs(Path({str(logs.folder)!r}))
Watchdog(0.4, logs.stacks(0), on_hang=lambda error: logs.write_error(0, error, EXIT_HUNG))
time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 76
    failure = first_failure(logs)
    assert failure and "no step for" in failure.message and "--stacks" in failure.advice
    assert "MainThread" in logs.stacks(0).read_text() or "most recent call first" in logs.stacks(0).read_text()


def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    read, written = os.pipe()
    os.close(read)
    terminal = open(written, "w", buffering=1)  # noqa: SIM115 - closing it fails, as it must
    with open(tmp_path / "log", "w") as log:
        tee = Tee(terminal, log)
        tee.write("one\n")
        tee.write("two\n")
        assert tee.terminal is None
    with pytest.raises(BrokenPipeError):
        terminal.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_the_last_lines_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(10_000)))
    assert [line["step"] for line in last_lines(path, 200)][-3:] == [9997, 9998, 9999]
    assert len(last_lines(path, 200)) < 20 and last_lines(tmp_path / "none") == []


def test_spans() -> None:
    assert [span(s) for s in (5, 100, 7200, 360_000)] == ["5 s", "2 min", "2.0 h", "4.2 d"]


def test_a_character_that_is_half_written_is_shown_when_it_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, text = tmp_path / "rank-0.log", "corpus: Äpfel\n".encode()
    half = text.index("Ä".encode()) + 1
    log.write_bytes(text[:half])
    at = _tail(log, 0)
    log.write_bytes(text)
    assert _copy(log, at) == len(text) and capsys.readouterr().out == text.decode()


def test_what_only_has_logs_is_no_run(tmp_path: Path) -> None:
    """A git checkout, a web server."""
    for other in (".git/logs/refs", "server/logs/access"):
        (tmp_path / other).mkdir(parents=True)
    with pytest.raises(UserError, match="not a run folder"):
        find_runs([str(tmp_path)])
    new_local_start(tmp_path / "run")
    assert find_runs([str(tmp_path)]) == [tmp_path / "run"]


def test_between_two_starts_a_run_is_starting(tmp_path: Path) -> None:
    """A launcher starts its processes again: the new start's folder is there, they need some seconds to appear."""
    run = RunFolder(tmp_path)
    run.record("start", step=0, attempt=0, world_size=1)
    (tmp_path / "config.yaml").write_text("{}\n")
    died = new_local_start(tmp_path)
    write(died, beat(0, state="failed"))
    fail(died, 0, RuntimeError("a bug"), NOW)
    assert look([tmp_path])[0].state == "FAILED"
    again = new_local_start(tmp_path)
    os.utime(died.folder, (NOW, NOW))
    [view] = look([tmp_path])
    assert view.state == "STARTING" and view.running
    os.utime(again.folder, (NOW + 1, NOW + 1))
    assert look([tmp_path])[0].state == "DIED"


def test_a_log_on_a_full_disk_does_not_keep_a_training_from_starting(tmp_path: Path) -> None:
    logs = StartLogs(tmp_path)
    logs.log(0).symlink_to("/dev/full")
    code = (
        "from pathlib import Path; from launch.output import keep_output; from pipeline.logs import StartLogs\n"
        f"assert keep_output(StartLogs(Path({str(tmp_path)!r})), 0); print('it goes on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "it goes on" in done.stdout, done.stderr
