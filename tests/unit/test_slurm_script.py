"""Job scripts: nothing in a value becomes a line or a command; profiles and durations are read as they are meant."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from launch.jobs import expand, seconds_of
from launch.preflight import compare
from launch.profiles import list_profiles, load_profile, parse_profile
from launch.slurm import Submission
from launch.snapshot import copy_code, redacted
from launch.torchrun import parse_nnodes
from pipeline.config import load_config

HOSTILE = "a b'\"$(touch INJECTED)`touch INJECTED`;touch INJECTED #%j\\"


def submission(run: str = "/runs/x", profile: dict | None = None, *settings: str, **more) -> Submission:
    fields = parse_profile(profile or {})
    overrides = ["data.train=synthetic", f"run.dir={run}", *fields.settings(), *settings]
    return Submission(load_config("digits", overrides).config, fields, **more)


def test_hostile_values_stay_values(tmp_path):
    run = tmp_path / f"run {HOSTILE}".replace("/", "_")
    profile = {"account": HOSTILE, "env": {"GREETING": HOSTILE}, "modules": [HOSTILE], "sbatch": {"comment": HOSTILE}}
    script = submission(str(run), profile).script()
    head = [line for line in script.splitlines() if line.startswith("#")]
    assert len(head) == len([line for line in head if line.startswith(("#!", "#SBATCH --", "# Written by"))])
    # What a shell makes of the rest, with `exec` and `module` only printing
    body = script.replace("exec ", "printf '%s\\n' ", 1)
    prelude = 'module() { printf "%s\\n" "$2"; }\n'
    result = subprocess.run(
        ["bash", "-c", f"{prelude}{body}\nprintf '%s\\n' \"$GREETING\" \"$PYTHONPATH\""],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=True,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0] == HOSTILE and lines[-2] == HOSTILE  # the module's name, the variable
    assert lines[-3] == str(run) and lines[-1] == f"{run}/code"
    assert not list(tmp_path.rglob("INJECTED*"))


@pytest.mark.parametrize("field", ["account", "partition", "qos", "constraint", "exclude", "gres"])
def test_a_line_break_is_refused(field):
    with pytest.raises(UserError, match="line break"):
        submission(profile={field: "x\n#SBATCH --wrap=evil"}).script()


@pytest.mark.parametrize(
    "profile",
    [{"env": {"A": "x\ny"}}, {"modules": ["x\nrm"]}, {"sbatch": {"comment": "x\r#SBATCH"}}],
)
def test_line_breaks_elsewhere_are_refused_too(profile):
    with pytest.raises(UserError, match="line break"):
        submission(profile=profile).script()
    with pytest.raises(UserError, match="line break"):
        submission("/runs/x\n#SBATCH --wrap=evil").script()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"partitoin": "x"}, "partitoin: unknown"),
        ({"modules": "x"}, "modules: 'x' is not of the kind list"),
        ({"env": {"A B": "x"}}, "not the name of an environment variable"),
        ({"sbatch": {"wrap x": "y"}}, "not the name of an option"),
        ({"container": {"runtime": "docker", "image": "x"}}, "pyxis or apptainer"),
        ({"container": {"image": "x", "mount": []}}, "container.mount: unknown"),
        (["x"], "must be a mapping"),
    ],
)
def test_profiles_with_mistakes(profile, message):
    with pytest.raises(UserError, match=message):
        parse_profile(profile)


def test_shipped_profiles_render():
    assert set(list_profiles()) >= {"plain", "gpu_modules", "pyxis", "preemptible"}
    for name in list_profiles():
        profile = load_profile(name)
        config = load_config("digits", ["data.train=synthetic", "run.dir=/r", *profile.settings()]).config
        assert "launch.slurm_job" in Submission(config, profile).script()
    with pytest.raises(UserError, match="no cluster profile"):
        load_profile("nowhere")


def options(script: str) -> dict[str, str]:
    found = [shlex.split(line.removeprefix("#SBATCH ")) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in found)
    return dict(word.removeprefix("--").partition("=")[::2] for [word] in found)


def test_options():
    asked = ("launch.nodes=6-8", "launch.gpus_per_node=8", "launch.time=24:00:00")
    said = options(
        submission("/runs/x", {"gres": "gpu:h100", "sbatch": {"mem": "100G", "hint": True}}, *asked).script()
    )
    assert said["nodes"] == "6-8" and said["gres"] == "gpu:h100:8" and said["signal"] == "USR2@600"
    assert said["requeue"] == "" and said["open-mode"] == "append" and said["mem"] == "100G" and said["hint"] == ""
    assert "ntasks-per-node" not in said and said["exclusive"] == "" and said["output"] == "/runs/x/logs/job-%j.log"
    short = options(submission("/runs/100%", None, "launch.time=2", "launch.cpus_per_node=4").script())
    assert short["signal"] == "USR2@30" and short["cpus-per-task"] == "4" and "exclusive" not in short
    assert short["output"] == "/runs/100%%/logs/job-%j.log"


def test_a_template_of_ones_own(tmp_path):
    template = tmp_path / "own.j2"
    template.write_text("#!/bin/sh\nsource /etc/site\nexec {{ python }} -m launch.slurm_job {{ action }} {{ run }}\n")
    assert submission(template=template).script("eval").splitlines()[-1].endswith("launch.slurm_job eval /runs/x")
    template.write_text("{{ nothing_such }}")
    with pytest.raises(UserError, match="template"):
        submission(template=template).script()


def test_resume_submits_what_was_submitted(tmp_path, monkeypatch):
    """From another folder: relative paths, profile, template and nodes are those of the submission, or as asked now."""
    from launch.cli_cluster import resubmit

    profile, template = {"account": "physics"}, tmp_path / "own.j2"
    template.write_text((Path(__file__).parents[2] / "launch/templates/job.sh.j2").read_text() + "# of my own\n")
    first = submission(str(tmp_path / "run"), profile, "launch.nodes=4", template=template)
    first.write(refresh=True)
    there = first.directory
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    monkeypatch.setattr("typer.echo", lambda text, **_: said.append(text))
    resubmit("run", [], "2-3", "", dry_run=True)
    again = options(said[0])
    assert (again["nodes"], again["account"], again["chdir"]) == ("2-3", "physics", there)
    assert said[0].endswith("# of my own\n")


def test_containers(tmp_path):
    pyxis = submission(profile={"container": {"image": "/i.sqsh", "mounts": ["/data:/data"]}}).describe({}, "auto")
    assert pyxis["srun"] == ["--container-image=/i.sqsh", "--container-mounts=/data:/data,/runs/x:/runs/x"]
    assert pyxis["node_command"] == ["python3"]
    profile = {"container": {"runtime": "apptainer", "image": "/i.sif", "python": "python"}}
    assert submission("/runs/x", profile, "launch.gpus_per_node=1").describe({}, "auto")["node_command"] == [
        "apptainer", "exec", "--nv", "--bind=/runs/x", "/i.sif", "python",
    ]  # fmt: skip
    json.dumps(pyxis)


def test_the_launcher_in_a_job_needs_no_packages():
    """Beside a container it runs on the node's own Python."""
    code = "import sys, launch.slurm_job, launch.preflight, launch.node; print(*{m.split('.')[0] for m in sys.modules})"
    root = Path(__file__).parents[2]
    said = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "launch" in said  # and -S leaves site-packages out: nothing else could be imported


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("n[1-3,07],login", ["n1", "n2", "n3", "n07", "login"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]c[1-2]-ib", ["r1c1-ib", "r1c2-ib", "r2c1-ib", "r2c2-ib"]),
        ("", []),
    ],
)
def test_expand(text, names):
    assert expand(text) == names


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1", 60), ("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12:00:00", 216000), ("1-0", 86400),
     ("0:00", 0), ("UNLIMITED", float("inf")), ("INVALID", float("inf"))],
)  # fmt: skip
def test_seconds_of(text, seconds):
    assert seconds_of(text) == seconds


def test_nnodes():
    assert parse_nnodes("3") == (3, 3) and parse_nnodes("2:4") == (2, 4)
    for wrong in ("", "0", "4:2", "2:x"):
        with pytest.raises(UserError, match="--nnodes"):
            parse_nnodes(wrong)


@pytest.mark.parametrize("setting", ["launch.nodes=8-6", "launch.nodes=x", "launch.time=soon", "launch.requeue=maybe"])
def test_settings_that_make_no_sense(setting):
    with pytest.raises(UserError, match=setting.partition("=")[0]):
        submission("/runs/x", None, setting)


def test_profiles_take_what_is_written(tmp_path):
    """YAML reads 24:00:00 as 86400 (SLURM: minutes, two months) and 0123 as 83."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "account: 0123\nlaunch: {time: 24:00:00, gpus_per_node: 8}\nenv: {VERSION: 1.10}\n"
        "sbatch: {begin: 22:30:00, hint: true, mem: null}\n"
    )
    profile = load_profile(str(path))
    said = options(Submission(load_config("digits", ["data.train=synthetic", "run.dir=/r", *profile.settings()]).config,
                              profile).script())  # fmt: skip
    assert (said["account"], said["time"], said["begin"], said["hint"]) == ("0123", "24:00:00", "22:30:00", "")
    assert "mem" not in said and profile.env == {"VERSION": "1.10"}
    path.write_text("env: {NCCL_CROSS_NIC: off}\n")
    with pytest.raises(UserError, match="NCCL_CROSS_NIC: write one value, in quotes"):
        load_profile(str(path))


def test_a_job_without_a_limit():
    assert options(submission("/runs/x", None, "launch.time=UNLIMITED").script())["signal"] == "USR2@600"


def test_a_template_is_that_of_the_latest_submission(tmp_path):
    from launch.slurm import kept_template

    template = tmp_path / "own.j2"
    template.write_text("#!/bin/sh\n")
    submission(str(tmp_path / "run"), template=template).write(refresh=False)
    assert kept_template(tmp_path / "run")
    submission(str(tmp_path / "run")).write(refresh=False)
    assert kept_template(tmp_path / "run") is None


def test_secrets_are_redacted():
    shown = redacted({"AWS_SECRET_ACCESS_KEY": "s1", "HF_TOKEN": "s2", "PATH": "/bin", "PROXY": "http://me:s3@host/"})
    assert shown["PATH"] == "/bin" and shown["PROXY"] == "http://(redacted)@host/"
    assert not any(secret in str(shown) for secret in ("s1", "s2", "s3"))


def test_code_is_replaced_whole(tmp_path):
    root, code = Path(__file__).parents[2], tmp_path / "run" / "code"
    copy_code(root, code)
    (code / "launch" / "left_over.py").write_text("")
    copy_code(root, code)
    assert (code / "launch" / "slurm_job.py").exists() and (code / "configs" / "clusters" / "plain.yaml").exists()
    assert not (code / "launch" / "left_over.py").exists() and [p.name for p in (tmp_path / "run").iterdir()] == [
        "code"
    ]


def report(problems=(), tflops=None, **versions) -> dict:
    return {
        "problems": list(problems),
        "versions": {"torch": "2", **versions},
        **({"tflops": tflops} if tflops else {}),
    }


def test_what_makes_a_node_unfit():
    fit = {"a": report(), "b": report(), "c": report()}
    assert compare(fit, dict.fromkeys(fit, 0.5), {"torch": "2"}) == {}
    broken = {**fit, "b": report(["cannot write"])}
    assert compare(broken, {}, {}) == {"b": ["cannot write"]}
    other = {**fit, "c": report(torch="3")}
    assert compare(other, {}, {"torch": "2"}) == {"c": ["torch 3, the others have 2"]}
    assert set(compare({"a": report(torch="3"), "b": report()}, {}, {"torch": "2"})) == {"a"}  # as submitted
    assert "clock" in compare(fit, {"a": 0.0, "b": -90.0, "c": 0.1}, {})["b"][0]
    assert list(compare(fit, {"a": 0.0, "b": 90.0, "c": 90.1}, {})) == ["a"]  # the first node's own is wrong
    slow = {"a": report(tflops=[600, 610]), "b": report(tflops=[605, 300]), "c": report(tflops=[590, 600])}
    assert list(compare(slow, {}, {})) == ["b"]
