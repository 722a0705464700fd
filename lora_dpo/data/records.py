"""The typed rows that the rest of the package sees: where a row came from and what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Text = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """The file and the 1-based line (JSONL) or row of one row of preferences."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt; all three are texts, or all three are tuples of messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    origin: Origin
    tools: tuple[Any, ...] | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the row is messages, to be rendered by a chat template."""
        return not isinstance(self.prompt, str)

    @property
    def prompt_key(self) -> str:
        """A stable hash of the prompt: rows with the same prompt share it."""
        return text_key(self.prompt)

    @property
    def content(self) -> tuple[Any, ...]:
        """All that makes two rows the same row."""
        return (self.prompt, self.chosen, self.rejected, self.tools)


@dataclass(frozen=True, slots=True)
class Labelled:
    """One answer to one prompt, and whether it is wanted."""

    prompt: Text
    completion: Text
    label: bool
    origin: Origin
    tools: tuple[Any, ...] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the row is messages, to be rendered by a chat template."""
        return not isinstance(self.prompt, str)

    @property
    def prompt_key(self) -> str:
        """A stable hash of the prompt: rows with the same prompt share it."""
        return text_key(self.prompt)

    @property
    def content(self) -> tuple[Any, ...]:
        """All that makes two rows the same row."""
        return (self.prompt, self.completion, self.label, self.tools)


def text_key(text: Text) -> str:
    """Return the sha256 (hex) of a text, or of messages in canonical form.

    Space around a text or a message's content does not count: a prompt with and without a final
    space is the same prompt, and must not land on both sides of a split.
    """
    if isinstance(text, str):
        return digest(["text", text.strip()])
    return digest(["messages", [_canonical(message) for message in text]])


def digest(value: Any) -> str:
    """Return the sha256 (hex) of a JSON-able value; other values count by their ``repr``."""
    line = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(line.encode()).hexdigest()


def _canonical(message: Message) -> dict[str, Any]:
    return {key: v.strip() if isinstance(v, str) else v for key, v in message.items()}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else repr(value)
