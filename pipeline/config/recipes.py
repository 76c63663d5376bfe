"""Recipes: the YAML files that come with the package, found by name, and the user's own, by path."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path

from data_tools.errors import UserError


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = importlib.resources.files("configs").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: an existing file, else the shipped recipe of that name. Raises UserError."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = list_recipes()
    name = name_or_path.removesuffix(".yaml")
    if name in names:
        # The package's files are always real ones: setuptools' wheels are unpacked.
        return Path(str(importlib.resources.files("configs") / f"{name}.yaml"))
    if path.is_dir():
        problem = f"{name_or_path}: is a folder, not a recipe"
        if (path / "config.yaml").is_file():
            problem += f"; for this run's configuration give {path / 'config.yaml'}"
    else:
        problem = f"{name_or_path}: no such file and no recipe of that name"
        near = difflib.get_close_matches(path.name.removesuffix(".yaml"), names, n=3, cutoff=0.4)
        if near:
            problem += f"; did you mean {' or '.join(near)}?"
    raise UserError(f"{problem}\nrecipes: {', '.join(names)}; or give the path of a YAML file")
