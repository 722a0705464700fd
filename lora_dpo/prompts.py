"""Prompts from files: a line each, a column, the prompts of preferences, or a run's held-out ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dpo.data import Preferences, load_preferences
from lora_dpo.data.problems import Problems
from lora_dpo.data.readers import Raw, is_known, read_file
from lora_dpo.errors import DataError
from lora_dpo.generation import Prompt, as_trained
from lora_dpo.preparing import load_rows
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
        for place, prompt in enumerate(source, start=1):
            if not _is_prompt(prompt):
                raise DataError(
                    f"prompts: number {place} is {prompt!r}; expected text or messages."
                )
        return list(source)
    path = Path(str(source)).expanduser()
    if path.suffix.lower() == ".txt":
        return list(_lines(path))
    if path.is_file() and is_known(path):
        problems = Problems()
        table = read_file(path, problems)
        problems.raise_if_any()
        if "prompt" in table.columns and not _ANSWERS & set(table.columns):
            return [_prompt_of(row) for row in table.rows]
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


def _prompt_of(row: Raw) -> Prompt:
    prompt: Any = row.values.get("prompt")
    if not _is_prompt(prompt):
        raise DataError(
            f"{row.origin}: prompt is {prompt!r}; expected text, or messages with role and content."
        )
    found: Prompt = prompt
    return found


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in value)
    )


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
