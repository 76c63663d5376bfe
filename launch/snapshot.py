"""What a submitted run is frozen into: code, versions, git state, environment. Requeued jobs run from there."""

from __future__ import annotations

import compileall
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from pipeline.run import environment, replace_file

PACKAGES = ("launch", "pipeline", "data_tools", "configs")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|SIGNATURE|PRIVATE|_PAT$|^PAT$", re.IGNORECASE)
_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")
_DIFF_LIMIT = 4 << 20


def freeze(folder: Path, *, refresh: bool) -> dict[str, Any]:
    """Writes code/ and launch/ of a run folder and returns what to say of them.

    refresh: take today's code although the folder holds some already.
    """
    code, notes = folder / "code", folder / "launch"
    notes.mkdir(parents=True, exist_ok=True)
    root = Path(importlib.import_module("launch").__file__ or "").resolve().parent.parent
    if root != code.resolve() and (refresh or not (code / "launch").is_dir()):
        copy_code(root, code)
        (notes / "git.json").unlink(missing_ok=True)
    if not (notes / "git.json").exists():
        state, diff = git_state(root)
        replace_file(notes / "checkout.diff", diff)
        replace_file(notes / "git.json", json.dumps(state, indent=1) + "\n")
    packages = sorted({f"{d.name}=={d.version}" for d in metadata.distributions() if d.name}, key=str.lower)
    replace_file(notes / "packages.txt", "\n".join(packages) + "\n")
    replace_file(notes / "environment.json", json.dumps(redacted(dict(os.environ)), indent=1, sort_keys=True) + "\n")
    return {
        "git": json.loads((notes / "git.json").read_text()),
        "python": sys.executable,
        "versions": {**versions(), "code": code_digest(code)},
        "host": environment()["host"],
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """What must be equal on all nodes: Python and the packages that compute."""
    found = environment()
    return {"python": found["python"], **found["packages"]}


def code_digest(root: Path) -> str:
    """Of the code that this node would run."""
    digest = hashlib.sha256()
    for package in ("launch", "pipeline", "data_tools"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def copy_code(root: Path, code: Path) -> None:
    """Copies the packages beside each other, compiled, and puts them in place at once."""
    fresh = code.with_name(f"{code.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in PACKAGES:
        if not (root / name).is_dir():
            raise UserError(f"{root} has no {name}/: the installation is not whole")
        shutil.copytree(root / name, fresh / name, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(fresh, quiet=2, stripdir=str(fresh), prependdir=str(code))
    if code.exists():
        old = code.with_name(f"{code.name}.{os.getpid()}.old")
        code.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    fresh.rename(code)


def git_state(root: Path) -> tuple[dict[str, Any], str]:
    """(commit, branch, whether there is more; what there is more), empty where the code is in no git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.decode(errors="replace") if run.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root:
        return {}, ""
    commit, branch = git("rev-parse", "HEAD"), git("rev-parse", "--abbrev-ref", "HEAD")
    changed = git("status", "--porcelain") or ""
    diff = git("diff", "HEAD") or ""
    if len(diff) > _DIFF_LIMIT:
        diff = diff[:_DIFF_LIMIT] + "\n... cut\n"
    state = {"commit": (commit or "").strip(), "branch": (branch or "").strip(), "changed": changed.splitlines()}
    return state, diff


def redacted(variables: dict[str, str]) -> dict[str, str]:
    """The environment without secrets: values of telling names, and logins inside URLs, are left out."""
    return {
        name: "(redacted)" if _SECRET.search(name) else _LOGIN.sub(r"\1(redacted)@", value)
        for name, value in variables.items()
    }
