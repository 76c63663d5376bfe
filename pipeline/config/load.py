"""Strict loading: defaults < recipe < `key=value`. Every error names the full key, the line, and the way out."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.errors import UserError
from pipeline.config.check import HOW_TO_SET, refuse_missing, validate
from pipeline.config.explain import (
    INTERPOLATION,
    explain_interpolation,
    explain_section,
    explain_unknown,
    explain_value,
    first_line,
)
from pipeline.config.recipes import find_recipe
from pipeline.config.tree import Config, alternatives, leaf_keys, schema, sections


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and, for every dotted key, "default", the recipe's file or "command line"."""

    config: Config
    origins: dict[str, str]


@dataclass(frozen=True)
class _Assignment:
    """One value for one leaf. `where` opens a message about it: "digits.yaml:12" or "command line"."""

    key: str
    value: Any
    origin: str
    where: str


def load_config(name_or_path: str | None, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Defaults < recipe < `key=value` overrides: typed, interpolations resolved, and checked by `validate`.

    `name_or_path` is a recipe's name or file (None: defaults only). Raises UserError.
    """
    assignments: list[_Assignment] = []
    if name_or_path is not None:
        assignments += _read_file(find_recipe(name_or_path))
    for override in overrides:
        assignments += _read_override(override)

    tree = OmegaConf.structured(Config)
    origins = dict.fromkeys(leaf_keys(), "default")
    wheres: dict[str, str] = {}
    for a in assignments:
        try:
            OmegaConf.update(tree, a.key, a.value)
        except OmegaConfBaseException as error:
            raise UserError(f"{a.where}: {explain_value(a.key, a.value, error)}") from None
        origins[a.key], wheres[a.key] = a.origin, a.where

    written: Any = OmegaConf.to_container(tree, resolve=False)  # ${...} still as they stand
    refuse_missing(k for k in HOW_TO_SET if _lookup(written, k) == MISSING)
    for key in leaf_keys():
        try:
            value = _lookup(tree, key)
            if isinstance(value, ListConfig):
                OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, RecursionError) as error:
            where = wheres.get(key, "default")
            raise UserError(f"{where}: {explain_interpolation(key, _lookup(written, key), error)}") from None
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    # From the environment a number arrives as text, and OmegaConf does not convert inside a union.
    if isinstance(config.train.micro_batch_size, str) and config.train.micro_batch_size.isdecimal():
        config.train.micro_batch_size = int(config.train.micro_batch_size)
    validate(config)
    return LoadedConfig(config, origins)


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return tree[section][name]


def _read_file(path: Path) -> list[_Assignment]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        # OmegaConf's loader, not yaml's: it reads 1e-3 as a number and refuses a key given twice.
        raw = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        row = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {problem}{_yaml_hint(row)}") from None
    except OmegaConfBaseException as error:  # a malformed ${...} is already refused here
        key = getattr(error, "full_key", None) or ""
        line = _line_of(text, key)
        raise UserError(f"{path}{line}: {key}: {first_line(error)} {INTERPOLATION}") from None
    except OSError:  # OmegaConf's way of saying that the document is a bare number
        raw, root = None, None
    if not isinstance(raw, dict) or not (root is None or isinstance(root, yaml.MappingNode)):
        raise UserError(f"{path}: must hold sections of keys, such as `train: {{duration: 14 epochs}}`")
    nodes = _index(root) if root is not None else {}

    def where(key: str) -> str:
        return f"{path}:{nodes[key][0]}" if key in nodes else str(path)

    assignments: list[_Assignment] = []
    problems: list[str] = []
    for section, body in raw.items():
        section = str(section)
        if section not in sections():
            problems.append(f"{where(section)}: {explain_unknown(section)}")
        elif body is None:
            continue  # a section whose keys are all commented out
        elif not isinstance(body, dict):
            problems.append(f"{where(section)}: {explain_section(section, body)}")
        else:
            for name, value in body.items():
                key = f"{section}.{name}"
                if key not in schema():
                    problems.append(f"{where(key)}: {explain_unknown(key)}")
                    continue
                if _is_text(key) and key in nodes:
                    value = _as_written(nodes[key][1], value)
                assignments.append(_Assignment(key, value, str(path), where(key)))
    if problems:
        raise UserError("\n".join(problems))
    return assignments


def _yaml_hint(row: str) -> str:
    """The two mistakes that YAML's own message does not lead to."""
    if "\t" in row:
        return "; indent with spaces, not tabs"
    return '; inside {...} and [...] write an interpolation in quotes: "${...}"' if "${" in row else ""


def _read_override(override: str) -> list[_Assignment]:
    where = "command line"
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals:
        known = key.lstrip("-") in schema()
        hint = f"; write {key.lstrip('-')}=VALUE" if known else " (no spaces around =, quotes around spaces)"
        raise UserError(f"{where}: {override!r} is not of the form key=value{hint}")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        bare = key.lstrip("-+~")
        hint = f"; write {bare}={text}" if bare in schema() else ", such as train.duration='14 epochs'"
        raise UserError(f"{where}: {key!r} is not a key; overrides are key=value{hint}")
    if key in schema():
        if not text:
            raise UserError(f"{where}: {key}= has no value; write {key}=VALUE, or {key}=null for none")
        return [_Assignment(key, _parse_value(key, text), where, where)]
    if key in sections():
        value = _parse_value(key, text)
        if not isinstance(value, dict):
            raise UserError(f"{where}: {explain_section(key, value)}")
        unknown = [f"{key}.{name}" for name in value if f"{key}.{name}" not in schema()]
        if unknown:
            raise UserError("\n".join(f"{where}: {explain_unknown(k)}" for k in unknown))
        return [_Assignment(f"{key}.{name}", v, where, where) for name, v in value.items()]
    raise UserError(f"{where}: {explain_unknown(key)}")


def _parse_value(key: str, text: str) -> Any:
    """The value of `key=text`, read as YAML; text keys keep what was typed (the shell has delimited it)."""
    try:
        if _is_text(key):
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            if not (schema()[key] is Any and isinstance(node, yaml.CollectionNode)):
                whole = isinstance(node, yaml.ScalarNode) and (node.style or node.tag == _NULL)
                return _as_written(node, text) if whole and node.end_mark.index == len(text) else text
        # One key around the value, so that OmegaConf's loader sees a document of the kind that it expects.
        document = "value: " + text
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(document)), resolve=False)
        assert isinstance(loaded, dict)
        return loaded["value"]
    except yaml.YAMLError as error:
        if _is_text(key) and not (schema()[key] is Any and text.startswith("[")):
            return text
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"command line: {key}={text}: {problem}{_yaml_hint(text)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"command line: {key}={text}: {first_line(error)}") from None


_NULL = "tag:yaml.org,2002:null"


def _is_text(key: str) -> bool:
    """Whether the key holds text (or none): then no YAML rule may turn it into something else.

    `Any` is text or a list (data.train).
    """
    hint = schema().get(key)
    return hint is Any or (str in alternatives(hint) and int not in alternatives(hint))


def _as_written(node: yaml.Node | None, value: Any) -> Any:
    """A scalar's own characters: `off`, `007` and `12:30` are not what YAML 1.1 makes of them."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else node.value
    return value


def _index(root: yaml.Node) -> dict[str, tuple[int, yaml.Node]]:
    """Dotted key -> (line, value node), two levels deep; what comes in through `<<` is left out."""
    index: dict[str, tuple[int, yaml.Node]] = {}
    if isinstance(root, yaml.MappingNode):
        for name, body in root.value:
            index[str(name.value)] = (name.start_mark.line + 1, body)
            if isinstance(body, yaml.MappingNode):
                for sub, value in body.value:
                    index[f"{name.value}.{sub.value}"] = (sub.start_mark.line + 1, value)
    return index


def _line_of(text: str, key: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    index = _index(root) if root is not None else {}
    return f":{index[key][0]}" if key in index else ""
