"""Cluster profiles: what one cluster wants of every job, in YAML, found by name (configs/clusters) or by path.

Values are only ever quoted into the job script; a value with a line break or another control character is refused.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import UserError

_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _AsWritten(yaml.SafeLoader):
    """Numbers stay text. YAML would make 86400 of 24:00:00 and 83 of 0123, which SLURM takes for other things."""


_AsWritten.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class Container:
    """Where the training processes run in an image; the launcher itself runs beside it, on the node's `python3`."""

    runtime: str = "pyxis"  # or apptainer
    image: str = ""
    mounts: list[str] = field(default_factory=list)  # "/from:/to", the run folder is mounted anyway
    python: str = "python3"  # inside the image


@dataclass
class Profile:
    """What a cluster wants of every job. `launch` holds defaults of the launch.* settings there."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None  # as in "gpu:h100"; the number of GPUs a node is added
    modules: list[str] = field(default_factory=list)
    container: Container | None = None
    env: dict[str, str] = field(default_factory=dict)
    interface: str | None = None  # network interfaces, for NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch: its name without -- and value
    srun: list[str] = field(default_factory=list)  # more options of srun, as in "--mpi=none"
    launch: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> list[str]:
        """The profile's launch.* settings in the form of the command line."""
        return [f"launch.{key}={value}" for key, value in self.launch.items()]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    files = (importlib.resources.files("configs") / "clusters").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_profile(name_or_path: str | None) -> Profile:
    """A profile by name or path; the empty one for None. Raises UserError that names the file and the key."""
    if name_or_path is None:
        return Profile()
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        path = Path(str(importlib.resources.files("configs") / "clusters" / f"{name_or_path}.yaml"))
    if not path.is_file():
        raise UserError(
            f"{name_or_path}: no such file and no cluster profile of that name (there are: "
            f"{', '.join(list_profiles())}; or give the path of a YAML file)"
        )
    try:
        return parse_profile(yaml.load(path.read_text(), Loader=_AsWritten) or {})
    except (yaml.YAMLError, UserError, OSError) as e:
        raise UserError(f"cluster profile {path}: {e}") from None


def parse_profile(raw: Any) -> Profile:
    """A profile from what YAML made of it, checked."""
    values = _fields(Profile, raw, "")
    if values.get("container") is not None:
        container = Container(**_fields(Container, values["container"], "container."))
        if container.runtime not in ("pyxis", "apptainer") or not container.image:
            raise UserError("container: needs an image, and runtime pyxis or apptainer")
        values["container"] = container
    profile = Profile(**values)
    for name, value in profile.sbatch.items():
        if not _OPTION.fullmatch(str(name)):
            raise UserError(f"sbatch: {name!r} is not the name of an option (without the leading --)")
        if isinstance(value, (list, dict)):
            raise UserError(f"sbatch.{name}: write one value, not a list")
    for name, value in profile.env.items():
        if not _VARIABLE.fullmatch(str(name)):
            raise UserError(f"env: {name!r} is not the name of an environment variable")
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise UserError(f"env.{name}: write one value, in quotes if it is a word like true, off or null")
    profile.env = {name: str(value) for name, value in profile.env.items()}
    return profile


def refuse_control_characters(what: str, text: str) -> str:
    """`text`, unless it could begin a line of its own in a script."""
    if any(ord(c) < 32 or ord(c) == 127 or c in "\u0085\u2028\u2029" for c in text):
        raise UserError(f"{what}: {text!r} holds a line break or another control character")
    return text


def _fields(cls: type, raw: Any, prefix: str) -> dict[str, Any]:
    """The keys of one section, with the kinds of value that its class declares."""
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.') or 'it'}: must be a mapping of keys to values")
    kinds = {name: str(hint.type) for name, hint in cls.__dataclass_fields__.items()}
    for key, value in raw.items():
        if key not in kinds:
            raise UserError(f"{prefix}{key}: unknown (keys: {', '.join(kinds)})")
        kind = kinds[key]
        fit = (
            isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value)
            if kind.startswith("list")
            else isinstance(value, dict)
            if kind.startswith(("dict", "Container"))
            else isinstance(value, (str, int, float)) and not isinstance(value, bool)
        )
        if value is not None and not fit:
            raise UserError(f"{prefix}{key}: {value!r} is not of the kind {kind}")
    out = {}
    for key, value in raw.items():
        if value is not None:
            kind = kinds[key]
            texts = [str(v) for v in value] if kind.startswith("list") else str(value)
            out[key] = value if kind.startswith(("dict", "Container")) else texts
    return out
