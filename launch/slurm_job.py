"""What runs in a SLURM job, on its first node: check the nodes, start the training on all of them, decide what next.

`python -m launch.slurm_job train|eval RUN`, from the job script. SLURM itself requeues a job that loses a node; here it
is decided what happens after everything else: saved before the time limit (requeue), processes died (again in this
job), nodes unfit (another job without them), an error that a restart cannot mend, or the end.

Standard library only: with containers it runs on the node's own Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data_tools.errors import UserError
from launch.failure import first_failure
from launch.jobs import book, booked, expand, submit_eval, submit_script
from launch.preflight import MARK, compare
from launch.queue import seconds_left
from pipeline.logs import LOGS, StartLogs
from pipeline.run import RunFolder, read_lines

T = TypeVar("T")
EXIT_SAVED, EXIT_HUNG = 75, 76
_PREFLIGHT_SECONDS = 300.0
_SILENT = "no answer"
_STEP_GRACE = 75.0  # more than srun's --wait: after that srun itself hangs, for instance on a node out of reach
_LOCK_PATIENCE = 120
_PATIENCE = 600  # seconds
_LIMIT_MARGIN = 15.0
_UNFIT_IN_A_ROW = 20  # preflights: an outage of the checkpoints' store or a full disk passes, a mistake does not


@dataclass
class Result:
    """How one start of the training processes ended, over all nodes."""

    codes: list[int] = field(default_factory=list)  # of training processes
    signals: set[str] = field(default_factory=set)
    asked: bool = False  # every node was signalled; where one was not, srun ended the others for its sake
    srun: int = 0


class Job:
    def __init__(self, run: Path):
        self.run = RunFolder(run)
        self.plan: dict[str, Any] = json.loads(_patiently((run / "launch" / "submission.json").read_text))
        self.id = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.nodes = expand(os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST") or "")
        self.logs = run / "logs" / f"{self.id}.{self.restart}"
        self.stopping = False  # SLURM or a person ends this job
        self._goes_on = False  # a later start or another job is seen to
        left = seconds_left(self.id)
        self._limit = time.monotonic() + (float("inf") if left is None else left)

    # -- the life of a job ----------------------------------------------------------------------------------------

    def train(self) -> int:
        """Exit code 0 finished, 75 saved and to be continued, else an error."""
        if self.run.finished.exists():
            say(f"{self.run.path} is finished: nothing to do")
            return 0
        if self._stop_asked():
            say(f"{self.run.path / 'STOP'}: asked to end; `mixer resume` goes on")
            return EXIT_SAVED
        earlier = booked(self.run.path)
        step = self._saved_step()
        book(self.run.path, "started", self.id, restart=self.restart, nodes=self.nodes, step=step)
        say(f"job {self.id} start {self.restart} on {', '.join(self.nodes)}, from step {max(step, 0)}")
        problem = self._too_many(earlier, step)
        if problem:
            return self._end(1, "error", problem)
        fruitless = attempt = 0
        while True:
            failed = self._preflight(attempt)
            verdict = self._verdict(Result()) if self.stopping else None
            if verdict is not None:
                return verdict
            if attempt and self._signal_is_past():
                code = self._end(EXIT_SAVED, "saved", f"at step {max(self._saved_step(), 0)}; too late to start again")
                self._requeue("the time limit is near")
                return code
            if failed:
                return self._leave_out(failed)
            before = self._saved_step()
            book(self.run.path, "launched", self.id, restart=self.restart, attempt=attempt, step=before)
            result = self._launch(attempt)
            verdict = self._verdict(result)
            if verdict is not None:
                return verdict
            attempt += 1
            fruitless = 0 if self._saved_step() != before else fruitless + 1
            if fruitless > self.plan["max_restarts"]:
                said = f"{self._cause()}; {fruitless} starts without a new checkpoint in between"
                return self._end(1, "died", f"{said}; `mixer why {self.run.path}` shows more")
            say(f"{self._cause()}; again from step {max(self._saved_step(), 0)} "
                f"({fruitless} of launch.max_restarts={self.plan['max_restarts']} without progress)")  # fmt: skip

    def _verdict(self, result: Result) -> int | None:
        """The job's exit code, or None where the training is to be started again in this job."""
        if result.srun == 0 and self.run.finished.exists():
            return self._end(0, "finished")
        if EXIT_SAVED in result.codes or result.asked or self.stopping:
            if self._stop_asked():
                return self._end(EXIT_SAVED, "stopped")
            code = self._end(EXIT_SAVED, "saved" if EXIT_SAVED in result.codes else "cancelled")
            if "SIGUSR2" in result.signals or time.monotonic() > self._limit - _LIMIT_MARGIN:
                self._requeue("saved before the time limit or a preemption")
            return code
        if self._stop_asked():  # --now
            return self._end(EXIT_SAVED, "stopped")
        if UserError.exit_code in result.codes:
            return self._end(1, "error", f"{self._cause()}; `mixer why {self.run.path}` shows more")
        return None

    def _cause(self) -> str:
        failure = first_failure(StartLogs(self.logs))
        return failure.headline if failure else "a training process died"

    def _end(self, code: int, why: str, message: str = "") -> int:
        book(self.run.path, "ended", self.id, restart=self.restart, code=code, why=why)
        say(f"{why}{': ' + message if message else ''} (exit code {code})")
        return code

    def _too_many(self, earlier: list[dict[str, Any]], step: int) -> str | None:
        """Starts are capped by their number, and by progress, as restarts inside a job are."""
        starts = sum(line["event"] == "started" for line in earlier)
        if starts > self.plan["max_requeues"]:
            return f"started {starts} times already (launch.max_requeues)"
        fruitless = 0
        for line in reversed([e for e in earlier if e["event"] == "launched" and e["attempt"] == 0]):
            if line["step"] != step:
                break
            fruitless += 1
        # One more than inside a job: a job that is lost while it starts has had no chance
        if fruitless > self.plan["max_restarts"] + 1:
            return (
                f"{fruitless} starts in a row made no new checkpoint (launch.max_restarts); `mixer resume` tries again"
            )
        return None

    def _saved_step(self) -> int:
        """Of the newest save, not the highest: a damaged checkpoint or a sick step takes the run back."""
        step = -1
        for event in read_lines(self.run.events):
            step = event["step"] if event["event"] == "save" else step
        return step

    def _signal_is_past(self) -> bool:
        """SLURM has told the job to save: it will not tell processes that are started from now on."""
        lead = self.plan.get("signal_lead", 0)
        return time.monotonic() > self._limit - min(lead + 60, 2 * lead)  # it may come up to 60 s early

    def _stop_asked(self) -> bool:
        return (self.run.path / "STOP").exists()

    def go_on_after_trouble(self) -> int:
        """This launcher itself failed: a file system that was away for a moment must not end the run for good."""
        ends = _patiently(lambda: [line["why"] for line in booked(self.run.path) if line["event"] == "ended"])
        troubles = next((i for i, why in enumerate(reversed(ends)) if why != "trouble"), len(ends))  # in a row
        code = self._end(70, "trouble", "the launcher itself failed: see above")
        if not self.stopping and troubles < self.plan["max_restarts"]:
            self._requeue("the launcher itself failed")
        return code

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _preflight(self, attempt: int) -> dict[str, list[str]]:
        """node -> what is wrong with it. Before a second attempt too: what killed the first may still be there.

        It overlaps with other steps: one on a node out of reach never ends.
        """
        if not self.plan["preflight"]:
            return {}
        started = time.monotonic()
        gpus = str(self.plan["gpus_per_node"])
        command = [*self._srun(f"--job-name=preflight-{attempt}", "--wait=0", "--overlap"), *self.plan["node_command"],
                   "-m", "launch.preflight", str(self.run.path), gpus]  # fmt: skip
        reports: dict[str, dict[str, Any]] = {}
        skew: dict[str, float] = {}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
        timer = threading.Timer(_PREFLIGHT_SECONDS if not attempt else _PREFLIGHT_SECONDS / 5, process.kill)
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            before, mark, text = line.partition(MARK)
            report = _parsed(text) if mark else None
            if report:
                print(before, end="", flush=True)
                reports[report["node"]] = report
                skew[report["node"]] = report["clock"] - time.time()
            else:
                print(line, end="", flush=True)
        process.wait()
        timer.cancel()
        if self.stopping or (attempt and self._signal_is_past()):  # whoever is silent was signalled
            return {}
        failed = compare(reports, skew, self.plan["versions"])
        silent = [node for node in self.nodes if node not in reports]
        failed |= {node: [_SILENT] for node in silent}
        seconds = round(time.monotonic() - started, 1)
        book(self.run.path, "preflight", self.id, restart=self.restart, attempt=attempt, ok=not failed, failed=failed,
             of=len(self.nodes), seconds=seconds)  # fmt: skip
        for node, problems in failed.items():
            say(f"preflight: {node} is unfit: {'; '.join(problems)}")
        if not failed:
            say(f"preflight: {len(reports)} nodes are fit ({seconds} s)")
        return failed

    def _leave_out(self, failed: dict[str, list[str]]) -> int:
        """Another job without the nodes that failed; where all did, the fault is not theirs."""
        everywhere = len(failed) == len(self.nodes)
        checks = [line["ok"] for line in booked(self.run.path) if line["event"] == "preflight"]
        in_a_row = checks[::-1].index(True) if any(checks) else len(checks)
        silent = all(problems == [_SILENT] for problems in failed.values())
        if everywhere and not any(checks) and not silent:
            return self._end(1, "unfit", "every node fails the preflight: see above")
        if everywhere and not any(checks) and in_a_row > self.plan["max_restarts"]:
            return self._end(1, "unfit", "no node has ever answered: can srun start `python3 -m launch.preflight`?")
        if in_a_row > _UNFIT_IN_A_ROW:
            return self._end(1, "unfit", f"{in_a_row} preflights in a row failed: see above; then `mixer resume`")
        if everywhere:
            again = len(self.nodes) == 1 and in_a_row > 1  # a second time: perhaps it is this node
            code = self._end(EXIT_SAVED, "unfit", "every node: once more, on any")
            return code if self._requeue("no node is fit", set(failed) if again else set()) else 1
        code = self._end(EXIT_SAVED, "unfit", f"going on without {', '.join(failed)}")
        return code if self._requeue("unfit: " + ", ".join(failed), set(failed)) else 1

    # -- the training processes -------------------------------------------------------------------------------------

    def _srun(self, *more: str) -> list[str]:
        n = len(self.nodes)
        cpus = self.plan["cpus_per_node"]
        # A step without --cpus-per-task would be bound to one CPU
        width = [f"--cpus-per-task={cpus}"] if cpus else ["--cpu-bind=none"]
        return ["srun", f"--nodes={n}", f"--ntasks={n}", "--ntasks-per-node=1", *width, *self.plan["srun"], *more]

    def _launch(self, attempt: int) -> Result:
        """One start on all nodes; returns when it has ended everywhere, or cannot be waited for any longer."""
        outcomes = self.logs / f"outcome-{attempt}"
        outcomes.mkdir(parents=True, exist_ok=True)
        port = 10_000 + (int(self.id.split("_")[0]) * 17 + self.restart * 5 + attempt) % 20_000
        identity = f"{self.id}.{self.restart}.{attempt}"
        command = [
            *self._srun("--job-name=train", "--kill-on-bad-exit=1", "--wait=60"), *self.plan["node_command"],
            "-m", "launch.node", str(outcomes), self.nodes[0], str(port), identity, str(self.plan["processes"]),
            "train", str(self.run.path / "launch" / "config.yaml"), f"run.dir={self.run.path}",
            *(["--allow", self.plan["allow"]] if self.plan["allow"] else []),
        ]  # fmt: skip
        environment = {**os.environ, LOGS: str(self.logs), "MIXER_LOCK_PATIENCE": str(_LOCK_PATIENCE),
                       "MIXER_CHECK_GROUP": "1"}  # fmt: skip
        process = subprocess.Popen(command, env=environment, start_new_session=True)  # Ctrl-C is for this process
        try:
            self._wait_for_step(process, outcomes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return self._read(outcomes, process.returncode)

    def _wait_for_step(self, process: subprocess.Popen[bytes], outcomes: Path) -> None:
        bad_since: float | None = None
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if bad_since is None and _outcomes(outcomes):
                bad_since = now
            if bad_since is not None and now - bad_since > _STEP_GRACE and not self._still_saving(outcomes):
                say("srun does not end although a node did: it is left behind")
                return
            if now > self._limit - _LIMIT_MARGIN and not self.stopping and self.plan["requeue"] != "never":
                left = seconds_left(self.id, within=5)  # it may have been extended since
                if left is not None and left > _LIMIT_MARGIN:
                    self._limit = now + left
                    continue
                self.stopping = True
                self._requeue("the time limit is near and the training has not ended")

    def _still_saving(self, outcomes: Path) -> bool:
        """Did every node that has ended end well? Then the others may still be writing."""
        return all(EXIT_SAVED in o["codes"] or o["agent"] == 0 for o in _outcomes(outcomes))

    def _read(self, outcomes: Path, srun: int) -> Result:
        result = Result(srun=srun)
        ended = _outcomes(outcomes)
        for outcome in ended:
            result.codes += outcome["codes"]
            result.signals |= set(outcome["signals"])
        result.asked = len(ended) == len(self.nodes) and all(outcome["signals"] for outcome in ended)
        return result

    # -- again --------------------------------------------------------------------------------------------------------

    def _requeue(self, why: str, exclude: set[str] = frozenset()) -> bool:  # type: ignore[assignment]
        """Sees to it that the run goes on later; False, and said aloud, where that is not to be or cannot be."""
        if self._goes_on:
            return True
        how = self.plan["requeue"]
        if how == "never" or (self.plan["chain"] > 1 and how == "auto" and not exclude):
            say("the next job of the chain goes on" if self.plan["chain"] > 1 else "`mixer resume` goes on")
            return False
        if self._stop_asked():
            return False
        checks = [line for line in booked(self.run.path) if line["event"] == "preflight"]
        # Where all nodes failed, the fault was not theirs
        unfit = [line["failed"] for line in checks if len(line["failed"]) < line.get("of", len(self.nodes))]
        exclude = {*exclude, *(node for failed in unfit for node in failed)}
        fresh = bool(exclude - set(_excluded(self.run.path, self.id)))  # a requeued job keeps what its sbatch excluded
        # Where there are not enough nodes without the unfit ones, it goes on with any: they may be mended meanwhile
        self._goes_on = (
            (fresh and self._submit_again(why, exclude))
            or (how in ("auto", "scontrol") and self._scontrol(why))
            or (how in ("auto", "resubmit") and self._submit_again(why, set() if fresh else exclude))
        )
        if not self._goes_on:
            say(f"cannot requeue from this node (launch.requeue={how}): `mixer resume {self.run.path}` on a login node")
        return self._goes_on

    def _scontrol(self, why: str) -> bool:
        """The same job once more."""
        if shutil.which("scontrol") is None:
            return False
        book(self.run.path, "requeued", self.id, restart=self.restart, how="scontrol", why=why)
        done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True)
        say(f"requeued: {why}" if done.returncode == 0 else f"scontrol requeue failed: {done.stderr.strip()}")
        return done.returncode == 0

    def _submit_again(self, why: str, exclude: set[str]) -> bool:
        """Another job of the same script."""
        always = [self.plan["profile"]["exclude"]] if self.plan["profile"]["exclude"] else []
        options = [f"--exclude={','.join([*always, *sorted(exclude)])}"] if exclude else []
        # After the chain's other jobs, which have been told of no unfit node: two at a time would disturb each other
        options += ["--dependency=singleton"] if self.plan["chain"] > 1 else []
        try:
            job = submit_script(self.run.path, by="requeue", nodes=self.plan["nodes"], options=options)
        except (UserError, OSError) as e:
            say(f"cannot submit the next job{' without ' + ', '.join(sorted(exclude)) if exclude else ''}: {e}")
            return False
        book(self.run.path, "requeued", self.id, restart=self.restart, how="resubmit", why=why)
        say(f"submitted job {job}: {why}" + (f"; without {', '.join(sorted(exclude))}" if exclude else ""))
        if self.plan["then_eval"]:
            try:
                submit_eval(self.run.path, job)  # the one that waits for this job goes away with it
            except (UserError, OSError) as e:
                say(f"cannot submit the evaluation: {e}")
        return True

    # -- signals, evaluation ------------------------------------------------------------------------------------------

    def on_signal(self, number: int, frame: object) -> None:
        """SLURM signals the training processes itself; only Ctrl-C in an salloc has to be passed on."""
        if number == signal.SIGINT and not self.stopping:
            subprocess.Popen(["scancel", "--signal=TERM", self.id])
        self.stopping = True

    def evaluate(self) -> int:
        """The dependent job of --then-eval: on this node, all its devices."""
        if not self.run.finished.exists():
            say(f"{self.run.path} is not finished: nothing to evaluate")
            return EXIT_SAVED
        command = [*self._srun("--job-name=eval"), *self.plan["node_command"],
                   "-m", "launch.cli", "eval", str(self.run.path), "--nproc", str(self.plan["processes"])]  # fmt: skip
        return subprocess.run(command).returncode


def _patiently(read: Callable[[], T]) -> T:
    """What `read` returns; tried again for ten minutes where a file system is away."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(5)


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    """Of the nodes that have ended; one that cannot be read counts as one that said nothing."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.json")):
            with contextlib.suppress(OSError):
                found.append(_parsed(path.read_text()))
    return [outcome for outcome in found if outcome]


def _parsed(text: str) -> dict[str, Any] | None:
    """None where it is not whole: srun mixes what several nodes say, where lines are long."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _excluded(run: Path, job: str) -> list[str]:
    lines = [line for line in booked(run) if line["event"] == "submitted" and line["job"] == job]
    return lines[0].get("exclude", "").split(",") if lines else []


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} mixer: {text}", flush=True)


def main(arguments: list[str]) -> int:
    action, run = arguments
    job = Job(Path(run))
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, job.on_signal)
        return job.train() if action == "train" else job.evaluate()
    except UserError as e:
        say(f"error: {e}")
        return e.exit_code
    except Exception:
        traceback.print_exc()
        return job.go_on_after_trouble() if action == "train" else 70


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
