"""Submitting a training to SLURM: freeze it into the run folder, render the job script, hand it to sbatch.

Inside the job `launch.slurm_job` takes over (on the first node), and starts one `launch.node` on every node.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from launch.jobs import EVAL_SCRIPT, TRAIN_SCRIPT, book, seconds_of, submit_eval, submit_script
from launch.profiles import Profile, refuse_control_characters
from launch.queue import queued
from launch.snapshot import freeze
from pipeline.config import Config, to_yaml
from pipeline.run import RunFolder, read_lines, replace_file

KEPT_TEMPLATE = "launch/template.j2"  # the user's own, for `mixer resume`
_ALIVE = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Submission:
    """One training as its user asked for it."""

    config: Config  # checked; run.dir is where everything goes
    profile: Profile
    allow: str = ""  # keys that a resumed run may change
    chain: int = 1
    then_eval: bool = False
    template: Path | None = None
    directory: str = field(default_factory=os.getcwd)  # where relative paths of the settings begin

    @property
    def run(self) -> RunFolder:
        return RunFolder(Path(self.config.run.dir).absolute())

    @property
    def processes(self) -> int:
        """A node."""
        launch = self.config.launch
        return launch.nproc or launch.gpus_per_node or 1

    # -- the script ---------------------------------------------------------------------------------------------

    def script(self, action: str = "train") -> str:
        """The batch script. Everything that comes from outside is quoted."""
        from jinja2 import Environment, StrictUndefined

        source = self.template or Path(__file__).with_name("templates") / "job.sh.j2"
        profile, run = self.profile, str(self.run.path)
        code = refuse_control_characters("run.dir", f"{run}/code")
        env = {**_network(profile.interface), **profile.env}
        values = {
            "options": [f"--{name}={quote_option(name, value)}" if value != "" else f"--{name}"
                        for name, value in self.options(action).items()],
            "modules": [shlex.quote(refuse_control_characters("modules", m)) for m in profile.modules],
            "env": [(k, shlex.quote(refuse_control_characters(f"env.{k}", v))) for k, v in env.items()],
            "code": shlex.quote(code),
            "python": shlex.quote(refuse_control_characters("python", self.host_python)),
            "action": shlex.quote(action),
            "run": shlex.quote(run),
        }  # fmt: skip
        try:
            template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
                source.read_text()
            )
            return template.render(values)
        except OSError as e:
            raise UserError(f"template {source}: {e.strerror}") from None
        except Exception as e:
            raise UserError(f"template {source}: {e}") from None

    @property
    def host_python(self) -> str:
        return "python3" if self.profile.container else sys.executable

    def options(self, action: str = "train") -> dict[str, str]:
        """sbatch's options, name -> value; an empty value is a switch."""
        launch, profile, run = self.config.launch, self.profile, self.run.path
        training = action == "train"
        options: dict[str, Any] = {
            "job-name": self.job_name + ("" if training else "-eval"),
            "nodes": launch.nodes if training else "1",
            # no number of tasks: with MIN-MAX nodes SLURM would only give what they need; srun says it
            "time": launch.time,
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "exclude": profile.exclude,
            "gres": _gres(profile.gres, launch.gpus_per_node),
            "requeue": "",
            "open-mode": "append",
            "output": f"{run}/logs/job-%j.log".replace("%", "%%").replace("%%j.log", "%j.log"),
            "chdir": self.directory,
        }
        if launch.cpus_per_node:
            options["cpus-per-task"] = str(launch.cpus_per_node)
        else:
            options |= {"exclusive": "", "mem": "0"}
        if training:
            # A short job, for a test perhaps, must not be signalled as soon as it begins
            lead = min(launch.signal_lead, seconds_of(launch.time) / 4) if launch.time else launch.signal_lead
            options["signal"] = f"USR2@{max(int(lead), 1)}"
        for name, value in profile.sbatch.items():
            options[name] = "" if value is True else None if value is False else value
        return {name: str(value) for name, value in options.items() if value is not None}

    @property
    def signal_lead(self) -> int:
        """Seconds before the time limit at which SLURM tells the job to save; 0 where a profile has it otherwise."""
        found = re.search(r"@(\d+)", self.options().get("signal", ""))
        return int(found[1]) if found else 0

    @property
    def job_name(self) -> str:
        """Chains depend on it: of this run alone."""
        name = re.sub(r"[^A-Za-z0-9_.+-]", "_", self.config.run.name or "mixer") or "mixer"
        path = hashlib.sha256(str(self.run.path).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{name}-{path[:6]}"

    # -- what the job reads ---------------------------------------------------------------------------------------

    def describe(self, frozen: dict[str, Any], requeue: str) -> dict[str, Any]:
        """launch/submission.json."""
        c = self.config
        return {
            "version": 1,
            **frozen,
            "directory": self.directory,
            "command": sys.argv,
            "user": os.environ.get("USER"),
            "allow": self.allow,
            "nodes": c.launch.nodes,
            "processes": self.processes,
            "gpus_per_node": c.launch.gpus_per_node or 0,
            "cpus_per_node": c.launch.cpus_per_node,
            "requeue": requeue,
            "signal_lead": 0 if requeue == "never" else self.signal_lead,
            "max_restarts": c.launch.max_restarts,
            "max_requeues": c.launch.max_requeues,
            "preflight": c.launch.preflight,
            "chain": self.chain,
            "then_eval": self.then_eval,
            "srun": [*self.profile.srun, *_pyxis(self)],
            "node_command": _node_command(self),
            "profile": self.profile.to_dict(),
        }

    def write(self, *, refresh: bool, requeue: str | None = None) -> None:
        """Everything that a job needs, into the run folder."""
        run = self.run
        for folder in ("launch", "logs"):
            (run.path / folder).mkdir(parents=True, exist_ok=True)
        frozen = freeze(run.path, refresh=refresh)
        text = to_yaml(self.config)
        replace_file(run.path / "launch" / "config.yaml", text)
        if self.template is None:
            (run.path / KEPT_TEMPLATE).unlink(missing_ok=True)  # of an earlier submission
        elif self.template != kept_template(run.path):
            replace_file(run.path / KEPT_TEMPLATE, self.template.read_text())
        if not run.config.exists():
            replace_file(run.config, text)
        launch = self.config.launch
        description = self.describe(frozen, requeue or launch.requeue)
        replace_file(run.path / "launch" / "submission.json", json.dumps(description, indent=1) + "\n")
        for action, name in (("train", TRAIN_SCRIPT), ("eval", EVAL_SCRIPT)):
            replace_file(run.path / name, self.script(action))

    def submit(self, *, by: str, refresh: bool) -> list[str]:
        """Freezes, submits, returns the job ids. Raises UserError where SLURM is missing or refuses."""
        if shutil.which("sbatch") is None:
            raise UserError(
                "there is no sbatch on this machine: submit from a login node of the cluster, print the script with "
                "--dry-run, or use `mixer launch torchrun`"
            )
        refuse_running(self.run)
        self.write(refresh=refresh)
        _clear(self.run)
        jobs = []
        more = ["--dependency=singleton"] if self.chain > 1 else []
        try:
            for link in range(self.chain):
                jobs.append(submit_script(self.run.path, by=by if link == 0 else "chain", options=more,
                                          nodes=self.config.launch.nodes))  # fmt: skip
            if self.then_eval:
                jobs.append(submit_eval(self.run.path, jobs[-1]))
        except UserError as e:
            if not jobs:
                raise
            raise UserError(f"{e}\nJob {', '.join(jobs)} is submitted and stays; `mixer stop` takes it back") from None
        return jobs

    def inside(self) -> int:
        """Runs in the allocation that this process is in (salloc), until the training ends."""
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("--inside runs in an allocation: first `salloc --nodes=2 ...`, then this command in it")
        self.write(refresh=True, requeue="never")
        _clear(self.run)
        # The user wants it now: what is counted (starts without progress) is counted from here
        book(self.run.path, "submitted", os.environ["SLURM_JOB_ID"], by="inside", nodes=self.config.launch.nodes)
        env = {**os.environ, "PYTHONPATH": _front(self.run.path / "code"), "PYTHONSAFEPATH": "1",
               **_network(self.profile.interface), **self.profile.env}  # fmt: skip
        command = [self.host_python, "-m", "launch.slurm_job", "train", str(self.run.path)]
        sys.stdout.flush()
        os.execvpe(command[0], command, env)


def kept_template(run: Path) -> Path | None:
    """The template of one's own that a run was submitted with."""
    path = run / KEPT_TEMPLATE
    return path if path.exists() else None


def refuse_running(run: RunFolder) -> None:
    """Raises UserError while SLURM still has a job of this run."""
    alive = {job: state for job, state in job_states(run).items() if state in _ALIVE}
    if alive:
        jobs = ", ".join(f"{job} ({state.lower()})" for job, state in alive.items())
        raise UserError(f"{run.path}: SLURM has this run already: job {jobs}. First `mixer stop {run.path}`")


def job_states(run: RunFolder) -> dict[str, str]:
    """job id -> state, of the run's jobs that SLURM still knows; empty where it cannot be asked."""
    lines = [line for line in read_lines(run.path / "jobs.jsonl") if line["event"] == "submitted"]
    known = {line["job"] for line in lines if line["by"] != "inside"}  # an allocation outlives what ran in it
    return {job: found.state for job, found in queued(known, seconds=60).items()}


def quote_option(name: str, value: str) -> str:
    """A value for an #SBATCH line, which sbatch parses much as a shell would, without expanding anything."""
    refuse_control_characters(name, value)
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./\[\]-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _clear(run: RunFolder) -> None:
    """The user wants the run to go on: an earlier wish to stop is void."""
    (run.path / "STOP").unlink(missing_ok=True)


def _gres(kind: str | None, gpus: int | None) -> str | None:
    if kind and (not gpus or re.search(r":\d+$", kind)):
        return kind
    return f"{kind or 'gpu'}:{gpus}" if gpus else None


def _network(interface: str | None) -> dict[str, str]:
    return {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface} if interface else {}


def _front(code: Path) -> str:
    return os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))


def _pyxis(s: Submission) -> list[str]:
    c = s.profile.container
    if c is None or c.runtime != "pyxis":
        return []
    mounts = ",".join([*c.mounts, f"{s.run.path}:{s.run.path}"])
    return [f"--container-image={c.image}", f"--container-mounts={mounts}"]


def _node_command(s: Submission) -> list[str]:
    """What srun starts on every node, up to the module's name."""
    c = s.profile.container
    if c is None:
        return [sys.executable]
    if c.runtime == "pyxis":
        return [c.python]
    gpu = ["--nv"] if s.config.launch.gpus_per_node else []
    binds = [f"--bind={mount}" for mount in [*c.mounts, str(s.run.path)]]
    return ["apptainer", "exec", *gpu, *binds, c.image, c.python]
