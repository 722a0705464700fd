"""Values that a config may hold at all, before anything asks what they mean."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 200  # characters of a value in a message
DEEPEST, MOST = 32, 20_000  # of values within each other, of values in all
NUMBERS = 2**63


def given(value: Any) -> str:
    """Return a value as it is told in a message, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # within itself; a number of thousands of digits
        return type(value).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def plain_problems(values: Mapping[Any, Any]) -> list[str]:
    """Return a sentence for each value that no setting can be: of no YAML, too large, or within itself."""
    found = []
    for count, (where, problem) in enumerate(_walk(values, ())):
        if problem:
            found.append(f"{'.'.join(where) or 'config'}: {problem}")
        if count >= MOST:
            found.append(
                f"config: more than {MOST} values, aliases counted each time that they are used; no "
                "config needs so many. Write out what is meant."
            )
        if count >= MOST or len(found) >= 10:
            break
    return found


def _walk(value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each value's place and what is wrong with it; nothing below a wrong one is looked at."""
    if problem := _problem(value, where):
        yield where, problem
        return
    yield where, ""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield (
                    where,
                    f"the key {given(key)} is no text; expected the name of a setting. A word that "
                    "YAML reads as a number, a date or yes and no needs quotes.",
                )
            elif len(key) > LONGEST or _problem(key, where):
                yield where, f"the key {given(key)} is no name of a setting."
            else:
                yield from _walk(item, (*where, given(key)[1:-1]))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _walk(item, (*where, str(place)))


def _problem(value: Any, where: tuple[str, ...]) -> str:
    if len(where) > DEEPEST:
        return f"lists or mappings within each other more than {DEEPEST} deep; no setting is."
    if isinstance(value, str):
        if "\0" in value:
            return f"got {given(value)}; it holds a NUL character. Leave it out."
        if any("\ud800" <= c <= "\udfff" for c in value):
            return f"got {given(value)}; it holds half of a character. Give whole Unicode text."
    if isinstance(value, int) and not -NUMBERS <= value < NUMBERS:
        return f"got {given(value)}; a number of more than 64 bits is no setting."
    if isinstance(value, (datetime.date, datetime.time, bytes, set, frozenset)):
        return (
            f"got a {type(value).__name__} ({given(value)}); expected text, a number, true or false, a "
            "list or a mapping. Put it in quotes if text is meant."
        )
    return ""
