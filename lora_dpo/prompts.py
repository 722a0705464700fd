"""Prompts from files: a line each, a column, the prompts of preferences, or a run's held-out ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lora_dpo.data import Preferences, load_preferences
from lora_dpo.data.imitations import leaves
from lora_dpo.data.loading import check_unicode
from lora_dpo.data.messages import shown, to_messages
from lora_dpo.data.problems import BadRow, Problems
from lora_dpo.data.readers import is_known, read_file
from lora_dpo.data.sources import as_path
from lora_dpo.errors import DataError
from lora_dpo.preparing import load_rows
from lora_dpo.prompt_tokens import Prompt, as_trained
from lora_dpo.run_folder import Run

logger = logging.getLogger("lora_dpo")

_ANSWERS = {"chosen", "rejected", "completion", "completions", "responses", "answers", "output"}


def read_prompts(run: Run, source: Any = None, *, limit: int | None = None) -> list[Prompt]:
    """Return the distinct prompts of a source, in their order, in the form that a run was trained on.

    Args:
        run: whose held-out prompts are taken where no source is given.
        source: a .txt file with a prompt a line; a file with a column ``prompt`` (text or messages);
            preferences, whose prompts are taken; or a list of prompts.
        limit: the first so many, at most.

    Raises:
        DataError: names file and line of what is no prompt.
    """
    found = _held_out(run) if source is None else _given(run, source)
    unique = list({json.dumps(p, sort_keys=True, default=str): p for p in found}.values())
    if again := len(found) - len(unique):
        logger.info("prompts: %d of %d are repetitions; each is asked once", again, len(found))
    if not unique:
        raise DataError(f"prompts: {source}: holds none; give at least one.")
    if limit is not None and limit < 1:
        raise DataError(f"prompts: limit is {limit}; expected at least 1.")
    return as_trained(unique[:limit], chat=run.is_chat)


def check_room(prompts: Sequence[Sequence[int]], context: int, wanted: int) -> None:
    """Hold that an answer has room behind each prompt.

    Args:
        prompts: their tokens.
        context: the most tokens that the model takes.
        wanted: of an answer, at most.

    Raises:
        DataError: names the longest prompt that leaves too little.
    """
    longest = max(map(len, prompts), default=0)
    if longest + wanted > context:
        place = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        raise DataError(
            f"prompt {place + 1} has {longest} tokens, and with {wanted} new ones it is longer than the "
            f"model's context of {context}. Leave it out, or ask for fewer (--max-new-tokens)."
        )


def _given(run: Run, source: Any) -> list[Prompt]:
    if isinstance(source, (list, tuple)):
        return [_checked(p, f"prompts: number {i}") for i, p in enumerate(source, start=1)]
    path = as_path(source)
    if path.suffix.lower() == ".txt":
        return list(_lines(path))
    if path.is_file() and is_known(path):
        problems = Problems()
        table = read_file(path, problems)
        problems.raise_if_any()
        if "prompt" in table.columns and not _ANSWERS & set(table.columns):
            return [
                _checked(row.values.get("prompt"), f"{row.origin}: prompt") for row in table.rows
            ]
    elif not path.exists():
        # a hub id, or a mistake: the readers tell which
        return _of(load_preferences(str(source), columns=run.config.data.columns or None))
    return _of(load_rows(run.config, str(source), None))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a prompt a line.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    return [line.strip("\r") for line in text.split("\n") if line.strip()]


def _checked(value: Any, where: str) -> Prompt:
    """Return a prompt that can be asked: text, or messages with the roles of ours.

    Raises:
        DataError: it is something else, or holds half of a character.
    """
    try:
        if isinstance(value, str) and value.strip():
            found: Any = value
        elif isinstance(value, Sequence) and not isinstance(value, str) and value:
            found = [dict(turn) for turn in to_messages(value, "messages", lambda reason: None)]
        else:
            raise DataError(
                f"{where} is {shown(value)}; expected text, or messages with role and content."
            )
        for text in leaves(found):
            check_unicode(text, "it")
    except BadRow as bad:
        raise DataError(f"{where}: {bad}") from None
    return cast(Prompt, found)


def _of(rows: Preferences) -> list[Prompt]:
    return [
        p if isinstance(p, str) else [dict(m) for m in p] for p in (r.prompt for r in rows.rows)
    ]


def _held_out(run: Run) -> list[Prompt]:
    """Return the prompts of the rows that the run held out, as they stand in its files."""
    held, data = run.held_out(), run.config.data
    places = set(zip(held.rows["file"], held.rows["row"], strict=True))
    rows = load_rows(run.config, data.eval or data.train, run.objective.data)
    kept = tuple(r for r in rows.rows if (r.origin.file, r.origin.row) in places)
    return _of(Preferences(rows.kind, kept, rows.shape, rows.why))  # type: ignore[arg-type]
