"""Tokens and keys in a config, which is copied into the folder of every run and shown in its report."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS = {
    "a token of the hub": re.compile(r"(?<![\w-])(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"(?<![\w-])sk-(?=[\w-]*[0-9])[\w-]{20,}"),
    "a token of GitHub": re.compile(r"(?<![\w-])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "a token of GitLab": re.compile(r"(?<![\w-])glpat-[\w-]{20,}"),
    "a key of AWS": re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a key of Google": re.compile(r"(?<![\w-])(?:AIza[\w-]{35}|ya29\.[\w-]{20,})"),
    "a token of Slack": re.compile(
        r"(?<![\w-])xox[abeoprs]-[\w-]{10,}|hooks\.slack\.com/services/T\w+/B\w+/\w+"
    ),
    "a signed token (JWT)": re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    "a bearer token": re.compile(r"\bbearer\s+(?=[\w.~+/=-]*[0-9])[\w.~+/=-]{16,}", re.IGNORECASE),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----"),
    "a user and a password": re.compile(
        r"[a-z][a-z0-9+.-]{0,20}://[^/\s:@]+:[^/\s@]+@", re.IGNORECASE
    ),
}
_VARIABLES = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"}
_VARIABLES |= {"ANTHROPIC_API_KEY", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
# A judge's key stands in a variable of its user's choice: by its name, any of these may be one.
_BY_NAME = re.compile(r"(?:^|_)(?:API_?)?(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
_DEEPEST = 16
_SHORTEST = 8  # a shorter one stands in ordinary words
_SHORTEST_BY_NAME = 16  # and such a variable may hold a word, or a path


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
    known = (f"the value of {name}" for name, value in _known() if value in text)
    return next(kinds, None) or next(known, None)


def _known() -> Iterator[tuple[str, str]]:
    """Yield name and value of each environment variable that holds a secret."""
    for name, given in os.environ.items():
        value = given.strip()
        known = name in _VARIABLES and len(value) >= _SHORTEST
        if known or (_BY_NAME.search(name) and _is_random(value)):
            yield name, value


def _is_random(value: str) -> bool:
    """Whether a value is no word and no path: letters and digits in one piece."""
    long = len(value) >= _SHORTEST_BY_NAME
    return long and bool(re.fullmatch(r"[\w.~+=-]+", value) and re.search(r"\d", value))


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
