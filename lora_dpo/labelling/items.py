"""What is put before a person: two completions of a prompt, or one, out of any file that we read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, get_args

from lora_dpo.data import Labelled, Origin, Source, load_preferences
from lora_dpo.data.loading import check_unicode
from lora_dpo.data.messages import is_messages, shown, to_messages
from lora_dpo.data.problems import BadRow, Problems
from lora_dpo.data.readers import Raw, Table
from lora_dpo.data.records import digest
from lora_dpo.data.scores import answer_values, holds_answers
from lora_dpo.data.shapes import LABELS
from lora_dpo.data.sources import open_spec, specs
from lora_dpo.errors import DataError

Mode = Literal["pairs", "thumbs"]
MODES: tuple[str, ...] = get_args(Mode)
# Columns that hold two completions of the prompt, by the name of what made them.
_TWO = (("policy", "reference"),)
_EQUAL = "pairs left out: both completions are the same"
_AGAIN = "left out: the same as an earlier one"
_ALONE = "prompts left out: a single completion, which has nothing to be compared with"


@dataclass(frozen=True)
class Item:
    """One question to a person.

    Args:
        key: of prompt and completions, whatever their order: an answer is found again by it.
        prompt: text or messages, as the file has it.
        completions: one or two, as the file has them.
        sources: what the file calls them, or nothing; of a single completion all that gave it. Never
            shown to who is asked.
        origin: the row.
    """

    key: str
    prompt: Any
    completions: tuple[Any, ...]
    sources: tuple[str, ...]
    origin: Origin


@dataclass
class Items:
    """All questions of a file, in its order, and what was left out."""

    mode: Mode
    items: list[Item] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    places: dict[str, int] = field(default_factory=dict)  # in items, by key

    def add(self, prompt: Any, completions: Sequence[Any], sources: Any, origin: Origin) -> None:
        """Take in a question, unless it was asked already."""
        texts = [text_of(completion) for completion in completions]
        if len(texts) == 2 and texts[0] == texts[1]:
            self.left_out[_EQUAL] += 1
            return
        key = digest([prompt, sorted(texts)])
        if key in self.places:
            self.left_out[_AGAIN] += 1
            if self.mode == "thumbs":  # the one thumb is for all whose text it is
                known = self.items[self.places[key]]
                both = tuple(dict.fromkeys((*known.sources, *sources)))
                self.items[self.places[key]] = replace(known, sources=both)
            return
        self.places[key] = len(self.items)
        self.items.append(Item(key, prompt, tuple(completions), tuple(sources), origin))


def read_items(source: Source, mode: Mode | None, *, all_pairs: bool, seed: int) -> Items:
    """Read the questions of a source.

    Args:
        source: preferences in any format that we read; rows of ``prompt`` and ``completions``
            without scores; of ``prompt``, ``policy`` and ``reference``; of ``prompt`` and
            ``completion``.
        mode: ``pairs`` or ``thumbs``; None takes pairs where rows have two completions or more.
        all_pairs: of more than two completions, ask for each with each and not for each once.
        seed: chooses which completions meet where a prompt has more than two, and in which order
            those of a prompt get their thumbs.

    Raises:
        DataError: nothing to ask about, or rows of no known shape.
    """
    problems = Problems()
    tables = [table for spec in specs(source, None) for table in open_spec(spec, problems)]
    problems.raise_if_any()
    rows = list(_rows(source, tables, problems))
    problems.raise_if_any()
    several = any(len(row.completions) > 1 for row in rows)
    if mode == "pairs" and not several:
        raise DataError(
            f"{_name(source)}: each row has one completion, and pairs need two; judge them one by one "
            "with --mode thumbs."
        )
    found = Items(mode or ("pairs" if several else "thumbs"))
    for row in rows:
        _ask(found, row, all_pairs, seed)
    if not found.items:
        counts = "".join(f"\n  {count} {what}" for what, count in found.left_out.items())
        raise DataError(f"{_name(source)}: nothing to ask about.{counts}")
    return found


def text_of(completion: Any) -> str:
    """Return the text of a completion: of itself, or of its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


@dataclass(frozen=True)
class _Row:
    prompt: Any
    completions: tuple[Any, ...]
    sources: tuple[str, ...]
    origin: Origin


def _name(source: Any) -> str:
    return "rows in memory" if isinstance(source, list | tuple) else str(source)


def _ask(found: Items, row: _Row, all_pairs: bool, seed: int) -> None:
    names = row.sources or ("",) * len(row.completions)
    sides = list(zip(row.completions, names, strict=True))
    if found.mode == "thumbs":
        # by seed and texts alone: the order of the columns would tell where a text is from
        sides.sort(key=lambda side: digest([seed, row.prompt, text_of(side[0])]))
        groups: list[Any] = [[side] for side in sides]
    elif len(sides) == 1:
        found.left_out[_ALONE] += 1
        return
    elif all_pairs or len(sides) == 2:
        groups = list(combinations(sides, 2))
    else:  # each once; an odd one meets a completion that was shown already
        random.Random(f"{seed}:{digest(row.prompt)}").shuffle(sides)
        sides += sides[: len(sides) % 2]
        groups = [sides[i : i + 2] for i in range(0, len(sides), 2)]
    for group in groups:
        completions, sources = zip(*group, strict=True)
        found.add(row.prompt, completions, sources if row.sources else (), row.origin)


def _rows(source: Source, tables: Sequence[Table], problems: Problems) -> Iterator[_Row]:
    read = [_own_form(table) for table in tables]
    if any(form is None for form in read):
        yield from _preferences(source)
        return
    for table, form in zip(tables, read, strict=True):
        for raw in table.rows:
            try:
                yield _row(raw, form or ())
            except BadRow as bad:
                problems.add(raw.origin, str(bad))


def _own_form(table: Table) -> tuple[str, ...] | None:
    """Return the columns of completions of a form that is no preference yet; None: it is one."""
    columns = set(table.columns)
    if "prompt" not in columns or {"chosen", "rejected"} & columns:
        return None
    if any(holds_answers(raw.values) for raw in table.rows):
        return ()
    two = next((names for names in _TWO if columns.issuperset(names)), None)
    if two is not None:
        return two
    return ("completion",) if "completion" in columns and not columns & set(LABELS) else None


def _row(raw: Raw, columns: tuple[str, ...]) -> _Row:
    values = [raw.values.get(name) for name in columns] or answer_values(raw.values)
    prompt = raw.values.get("prompt")
    if not isinstance(prompt, str):
        prompt = list(to_messages(prompt, "prompt", lambda reason: None))
    if not text_of(prompt).strip():
        raise BadRow("prompt is empty; expected text.")
    check_unicode(text_of(prompt), "prompt")
    if not values:
        raise BadRow("no completions; expected a list of texts under completions.")
    for i, value in enumerate(values):
        name = columns[i] if columns else f"completions[{i}]"
        if not isinstance(value, str) and not (is_messages(value) and value):
            raise BadRow(f"{name} is {shown(value)}; expected text, or a list of messages.")
        check_unicode(text_of(value), name)
    return _Row(prompt, tuple(values), columns if len(columns) > 1 else (), raw.origin)


def _preferences(source: Source) -> Iterator[_Row]:
    for row in load_preferences(source, duplicates="keep").rows:
        prompt = _plain(row.prompt)
        if isinstance(row, Labelled):
            yield _Row(prompt, (_plain(row.completion),), (), row.origin)
        else:
            both = (_plain(row.chosen), _plain(row.rejected))
            yield _Row(prompt, both, ("chosen", "rejected"), row.origin)


def _plain(text: Any) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]
