"""A configuration as YAML: to be loaded again, or with the origin of every value for people."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config.load import LoadedConfig
from pipeline.config.tree import Config, get_value, leaf_keys

_ONE_LINE = 10**6  # wider than any value: one key, one line


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; loading it again gives the same values."""
    tree = escaped(dataclasses.asdict(config))
    return yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, allow_unicode=True, width=_ONE_LINE)


def escaped(value: Any) -> Any:
    """Values are final here: a literal `${` must not become an interpolation when the file is read again."""
    if isinstance(value, Mapping):
        return {k: escaped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [escaped(v) for v in value]
    if isinstance(value, str) and "${" in value:
        # OmegaConf reads backslashes in front of ${ in pairs, and only there.
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def format_config(loaded: LoadedConfig) -> str:
    """The configuration as YAML with the origin of every value as a comment: what `--print-config` prints."""
    rows: list[tuple[str, str]] = []
    section = ""
    for key in leaf_keys():
        head, name = key.split(".")
        if head != section:
            section = head
            rows.append((f"{head}:", ""))
        # In a list, so that text is quoted where a flow needs it and no document end follows.
        value = [escaped(get_value(loaded.config, key))]
        dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=_ONE_LINE).strip()
        rows.append((f"  {name}: {dumped[1:-1]}", loaded.origins[key]))
    # One long path should not push every comment off the screen.
    width = min(max(len(text) for text, _ in rows), 48)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows) + "\n"
