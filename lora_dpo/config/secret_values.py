"""Tokens and keys in a config, which is copied into the folder of every run and shown in its report."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS = {
    "a token of the hub": re.compile(r"(?<![\w-])hf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"(?<![\w-])sk-(?=[\w-]*[0-9])[\w-]{20,}"),
    "a user and a password": re.compile(
        r"[a-z][a-z0-9+.-]{0,20}://[^/\s:@]+:[^/\s@]+@", re.IGNORECASE
    ),
}
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")
_DEEPEST = 16
_SHORTEST = 8  # a shorter one stands in ordinary words


def secret_problems(values: Any) -> list[str]:
    """Return a sentence for each value that holds a secret, without the secret.

    Args:
        values: a nested mapping, as a config is given.
    """
    return [
        f"{where}: holds {kind}, and a config is copied into the run's folder. Take it out; the hub's "
        "token belongs into HF_TOKEN, a judge's key into an environment variable of its own."
        for where, text in _texts(values)
        if (kind := _secret(text))
    ]


def _secret(text: str) -> str | None:
    kinds = (kind for kind, pattern in _KINDS.items() if pattern.search(text))
    known = (
        f"the value of {name}"
        for name in _VARIABLES
        if len(value := os.environ.get(name, "").strip()) >= _SHORTEST and value in text
    )
    return next(kinds, None) or next(known, None)


def _texts(values: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield every text with the key that it stands under."""
    if depth > _DEEPEST:  # a YAML list may hold itself
        return
    if isinstance(values, Mapping):
        for key, value in values.items():
            name = "(a key)" if _secret(str(key)) else str(key)
            yield where or name, str(key)
            yield from _texts(value, f"{where}.{name}" if where else name, depth + 1)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value, where, depth + 1)
    elif isinstance(values, str):
        yield where, values
