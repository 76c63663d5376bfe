"""What messages say of keys and values that do not fit: the nearest valid key, what was expected, an example."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args, get_origin

import yaml

from pipeline.config.tree import Config, alternatives, get_value, schema, sections

INTERPOLATION = "(an interpolation is written ${section.key} or ${oc.env:NAME})"

# What people type first, where nothing in the spelling leads to the key.
_ALIASES = {"learning_rate": "optimizer.lr", "epochs": "train.duration", "steps": "train.duration"}


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def explain_unknown(key: str) -> str:
    """What to say of a key that the tree does not have."""
    section, _, rest = key.partition(".")
    if key in schema():  # right, but written with a dot inside a file
        return f"{key}: write it nested, {section}: {{{rest}: ...}}"
    parent = key.rpartition(".")[0]
    if parent in schema():
        return f"{key}: no such key; {parent} is a single value, give it whole: {parent}={_example(parent)}"
    near = _nearest(key)
    if near:
        return f"{key}: no such key; did you mean {near}?"
    if section in sections():
        names = [k.partition(".")[2] for k in schema() if k.startswith(section + ".")]
        return f"{key}: no such key; {section} has {', '.join(names)}"
    return f"{key}: no such key; the sections are {', '.join(sections())}"


def _nearest(key: str) -> str | None:
    """The key or keys most likely meant: a sibling, the same name in another section, or anything alike."""
    section, _, name = key.rpartition(".")
    if not section and (close := difflib.get_close_matches(name, sections(), n=1)):
        return close[0]
    homes = [section] if section in sections() else difflib.get_close_matches(section, sections(), n=1)
    for home in homes:
        names = [k.partition(".")[2] for k in schema() if k.startswith(home + ".")]
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
            return f"{home}.{close[0]}"
    if name in _ALIASES:
        return _ALIASES[name]
    names = {k: k.partition(".")[2] for k in schema()}
    same = [k for k, n in names.items() if n == name or n.endswith("_" + name)]
    close = same or [k for k, n in names.items() if difflib.get_close_matches(name, [n], cutoff=0.75)]
    return " or ".join(close) if close else None


def explain_section(section: str, value: Any) -> str:
    names = [k for k in schema() if k.startswith(section + ".")]
    first = f"{section}.name" if f"{section}.name" in names else names[0]
    return f"{section} is a section and takes no value ({value!r}); set one of its keys, such as {first}"


def _expected(key: str) -> str:
    hint = schema()[key]
    if key == "train.micro_batch_size":
        return "a whole number or auto"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        return {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}[item]
    if hint is Any:
        return "a data set's folder or a list of {path, weight}"
    return " or ".join(names[t] for t in alternatives(hint))


def _example(key: str) -> str:
    """The key's default, as one types it."""
    return yaml.safe_dump(get_value(Config(), key), default_flow_style=True).strip().replace(", ", ",")


def explain_value(key: str, value: Any, error: Exception) -> str:
    """What to say of a value that OmegaConf did not take."""
    hint = schema()[key]
    if isinstance(value, str) and "${" in value:
        return f"{key}: {first_line(error)} {INTERPOLATION}"
    message = f"{key}: expected {_expected(key)}, not {'null' if value is None else repr(value)}"
    if value in ("None", "none", "Null") and type(None) in alternatives(hint):
        message += f"; for none write {key}=null"
    elif get_origin(hint) is list:
        message += f"; write for example {_example(key)}"
    elif isinstance(value, bool):
        message += " (YAML reads on, off, yes and no as true and false)"
    elif isinstance(value, float) and value.is_integer() and int in alternatives(hint):
        message += f"; write {int(value)}"
    return message


def explain_interpolation(key: str, value: Any, error: Exception) -> str:
    """What to say of a `${...}` that leads nowhere."""
    text = str(value)
    missing = re.search(r"Environment variable '([^']*)' not found", str(error))
    if missing:
        name = missing[1]
        return (
            f"{key}: {text!r} needs the environment variable {name}, which is not set; "
            f"export {name}=... or give {key}=VALUE"
        )
    unknown = re.search(r"Interpolation key '([^']*)' not found", str(error))
    if unknown:
        return f"{key}: {text!r}: {explain_unknown(unknown[1])}"
    if isinstance(error, RecursionError) or "ecursi" in str(error):
        return f"{key}: {text!r} refers to itself"
    # An interpolation that gave a value of the wrong type, an unknown resolver, ...
    return f"{key}: {text!r} (expected {_expected(key)}): {first_line(error)}"
