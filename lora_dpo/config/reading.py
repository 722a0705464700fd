"""YAML read strictly, and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_dpo.config.plain import LONGEST, MOST, given
from lora_dpo.config.sections import DataConfig
from lora_dpo.errors import ConfigError, nearest


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; broken syntax and repeated keys are ``ConfigError`` with the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no UTF-8; a name that holds a NUL
        raise ConfigError(
            f"{str(path)[:LONGEST]}: cannot be read ({error}); a YAML file is expected."
        ) from None
    try:
        values = load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_reason(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a mapping of sections is expected, got {type(values).__name__}."
        )
    return values


def load_yaml(text: str) -> Any:
    """Return what a YAML text says; tags, keys given twice and aliases that multiply are refused.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it cannot be read, or is refused.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node has, aliases each time that they are used, without making them.

    Raises:
        ConstructorError: too many, or a node within itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias stands within what it names", node.start_mark
            )
        return known[id(node)]
    known[id(node)] = 0
    inner: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    total = 1 + sum(_count(part, known) for part in inner)
    if total > MOST:
        raise yaml.constructor.ConstructorError(
            None, None, f"more than {MOST} values, aliases counted", node.start_mark
        )
    known[id(node)] = total
    return total


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 2 * LONGEST else f"{text[: 2 * LONGEST - 3]}..."


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
            problems.append(
                f"--set {given(text)[1:-1]}: expected key=value, as in objective.beta=0.05."
            )
            continue
        try:
            set_key(values, key.strip(), load_yaml(value))
        except (ConfigError, yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(f"--set {given(text)[1:-1]}: {_reason(error)}")
    if problems:
        raise ConfigError(problems)
    return values


def data_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the section ``data`` that ``data.key=value`` texts give.

    Raises:
        ConfigError: a text that is none, or that names another section, no setting, or the files
            themselves.
    """
    values = override({}, overrides)
    settings = values.pop("data", {})
    if not isinstance(settings, dict):
        raise ConfigError(
            f"--set data: got {given(settings)}; expected a setting, as data.overflow=truncate-prompt."
        )
    known = set(DataConfig.model_fields) - {"train", "eval"}
    wrong = [*values, *(f"data.{name}" for name in settings if name not in known)]
    if wrong:
        raise ConfigError(
            f"--set {given(wrong[0])[1:-1]}: expected a setting of the section data that says how the files are "
            "read, such as data.overflow=truncate-prompt; the files themselves are arguments."
            + nearest(wrong[0].removeprefix("data."), known)
        )
    return dict(settings)


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
            raise ConfigError(f"{name!r} holds {given(here)}, which has no keys below it.")
    here[last] = value
