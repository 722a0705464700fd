"""Messages of a conversation: roles checked, other tools' spellings translated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_dpo.data.problems import BadRow, DroppedRow, listing
from lora_dpo.data.records import Message
from lora_dpo.data.report import excerpt

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
}
NOT_ONE_TURN = "dropped: completion is not one assistant turn"

Messages = tuple[Message, ...]
Repair = Callable[[str], None]


def is_message(value: Any) -> bool:
    """Whether a value is one message of either spelling."""
    return isinstance(value, Mapping) and bool({"role", "from"} & set(value))


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages (which may be empty)."""
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_message, value))
    )


def to_messages(value: Any, column: str, repair: Repair) -> Messages:
    """Return checked messages of a list, or of a single message."""
    items = [value] if is_message(value) else value
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise BadRow(f"{column} is {shown(value)}; expected a list of messages.")
    return tuple(_message(item, f"{column}[{i}]", repair) for i, item in enumerate(items))


def answer(value: Any, column: str, repair: Repair) -> Messages:
    """Return an answer as messages; a text is one assistant turn."""
    if isinstance(value, str):
        return ({"role": "assistant", "content": value},)
    return to_messages(value, column, repair)


def split_answers(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Return (prompt, chosen, rejected) of two whole conversations: the common messages first."""
    common = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        common += 1
    # Two identical conversations still end in an answer; that they are identical is told later.
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    if common < 1:
        raise DroppedRow("dropped: chosen and rejected share no first message", _short(chosen))
    return chosen[:common], chosen[common:], rejected[common:]


def without_prompt(side: Messages, prompt: Messages) -> Messages:
    """Return the answer alone where a side repeats the whole prompt before it."""
    return (
        side[len(prompt) :] if len(side) > len(prompt) and side[: len(prompt)] == prompt else side
    )


def check_answer(side: Messages, column: str, *, derived: bool) -> None:
    """Hold that an answer is one assistant message; a cut-out one that is not is dropped."""
    if len(side) == 1 and side[0]["role"] == "assistant":
        return
    if not side:
        raise DroppedRow(f"dropped: empty {column}", "no messages")
    roles = ", ".join(message["role"] for message in side)
    if derived or len(side) != 1:
        raise DroppedRow(NOT_ONE_TURN, f"{column}: {roles}")
    raise BadRow(f"{column} is a message of role {roles!r}; expected one of role 'assistant'.")


def check_prompt(prompt: Messages, *, derived: bool) -> None:
    """Hold that there is something to answer: a prompt does not end with the assistant."""
    if not prompt:
        raise DroppedRow("dropped: empty prompt", "no messages")
    if prompt[-1]["role"] == "assistant":
        if derived:
            raise DroppedRow(NOT_ONE_TURN, "the common messages end with the assistant")
        raise BadRow(
            "prompt ends with a message of role 'assistant'; expected the answer to be in chosen "
            "and rejected (or completion) only, and the prompt to end with the user."
        )


def shown(value: Any) -> str:
    """Return a value's type and beginning for a sentence."""
    if value is None:
        return "missing (null)"
    try:
        return f"{type(value).__name__} ({excerpt(repr(value), 50)})"
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        return type(value).__name__


def _role(role: Any) -> str:
    return repr(excerpt(role, 40)) if isinstance(role, str) else shown(role)


def _message(value: Any, where: str, repair: Repair) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"{where} is {shown(value)}; expected a message with role and content.")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or (role not in ROLES and role not in _OTHER_NAMES):
        raise BadRow(f"{where} has the role {_role(role)}; expected one of {listing(ROLES)}.")
    # Arrow fills absent keys with None; templates would print some of them.
    rest = {k: v for k, v in value.items() if v is not None and k not in _SPELLINGS}
    if role not in ROLES:
        if "role" in value:  # in ShareGPT's from/value these are the format's own names
            repair(f"repaired: role {role!r} read as {_OTHER_NAMES[role]!r}")
        role = _OTHER_NAMES[role]
    content = value.get("content") if "content" in value else value.get("value")
    return {"role": role, "content": _content(content, where, bool(rest.get("tool_calls"))), **rest}


_SPELLINGS = {"role", "from", "content", "value"}


def _content(content: Any, where: str, calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if isinstance(content, Sequence):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if kinds and all(kind == "text" for kind in kinds):
            texts = [part.get("text") for part in content]
            if all(isinstance(text, str) for text in texts):
                return "".join(texts)
        if other := [kind for kind in kinds if kind != "text"]:
            raise BadRow(f"{where} holds a part of type {other[0]!r}; only text can be trained on.")
    raise BadRow(f"{where} has content {shown(content)}; expected text.")


def to_tools(value: Any) -> tuple[Any, ...] | None:
    """Return the tools of a row: a list, or JSON text of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"tools is text that is not JSON ({error}); expected a list.") from None
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list | tuple):
        raise BadRow(f"tools is {shown(value)}; expected a list of tools, or JSON text of one.")
    return tuple(value) or None


def _short(messages: Messages) -> str:
    return excerpt(str(messages[0]["content"])) if messages else "no messages"
