"""YAML read strictly, and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_dpo.errors import ConfigError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; broken syntax and repeated keys are ``ConfigError`` with the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); a YAML file is expected.") from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a mapping of sections is expected, got {type(values).__name__}."
        )
    return values


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML's last-one-wins would ignore the first."""


def _strict_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a word, not a list or a mapping", key_node.start_mark
            )
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set ``key=value`` texts in a nested mapping, in place, and return it."""
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"--set {text}: expected key=value, as in objective.beta=0.05.")
            continue
        try:
            set_key(values, key.strip(), yaml.load(value, Loader=_StrictLoader))
        except (ConfigError, yaml.YAMLError, ValueError) as error:
            problems.append(f"--set {text}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError(problems)
    return values


def data_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the section ``data`` that ``data.key=value`` texts give.

    Raises:
        ConfigError: a text that is none, or that names another section or the files themselves.
    """
    values = override({}, overrides)
    settings: dict[str, Any] = values.pop("data", {})
    wrong = [*values, *(f"data.{name}" for name in ("train", "eval") if name in settings)]
    if wrong:
        raise ConfigError(
            f"--set {wrong[0]}: expected a setting of the section data that says how the files are "
            "read, such as data.overflow=truncate-prompt; the files themselves are arguments."
        )
    return settings


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = values
    for name in parents:
        if here.setdefault(name, {}) is None:
            here[name] = {}
        if here is values and name == "objective" and isinstance(here[name], str):
            here[name] = {"name": here[name]}  # the short form
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"{name!r} holds {here!r}, which has no keys below it.")
    here[last] = value
