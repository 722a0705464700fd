"""Which of the known shapes a file has, told by its columns and the types in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_dpo.data.messages import is_message, is_messages
from lora_dpo.data.preferences import Kind
from lora_dpo.data.problems import few, listing
from lora_dpo.data.readers import Table
from lora_dpo.data.report import excerpt
from lora_dpo.data.transcripts import is_transcript
from lora_dpo.errors import DataError, nearest

# In order of preference: UltraFeedback has a prompt and, beside it, messages that hold the answer.
CONTEXTS = ("prompt", "conversations", "messages", "instruction", "question", "input")
CONVERSATIONS = ("messages", "conversations")
PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
COMPLETIONS = ("completion", "response", "output")
LABELS = ("label", "kto_tag", "thumbs")
FURTHER = ("system", "history", "input", "tools", "score_chosen", "score_rejected", "margin")
RANKED = ("completions", "responses", "answers", "scores", "ranks")
KNOWN_COLUMNS = tuple(
    dict.fromkeys((*CONTEXTS, *sum(PAIRS, ()), *COMPLETIONS, *LABELS, *FURTHER, *RANKED))
)
ACCEPTED = {
    ("prompt", "chosen", "rejected"): "texts, or lists of messages",
    ("chosen", "rejected"): "whole transcripts as texts or lists of messages",
    ("conversations", "chosen", "rejected"): "ShareGPT",
    ("messages", "chosen", "rejected"): "messages and two answers",
    ("instruction", "chosen", "rejected"): "Alpaca; or output as a list [better, worse]",
    ("question", "chosen", "rejected"): "Orca, with or without system",
    ("prompt", "completion", "label"): "unpaired",
    ("prompt", "completions"): "answers with scores or ranks, made into pairs",
    ("messages", "label"): "unpaired, the answer being the last message",
}
DEMONSTRATED = {  # read where demonstrations are asked for, beside the wanted answers of all others
    ("prompt", "completion"): "texts, or lists of messages",
    ("messages",): "whole conversations, or ShareGPT's conversations",
    ("instruction", "output"): "Alpaca, with or without input",
}
Form = Literal["text", "messages"]


@dataclass(frozen=True)
class Layout:
    """The columns that hold the prompt and the answers; an empty context means a shared prefix."""

    kind: Kind
    context: str
    answers: tuple[str, ...]
    label: str = ""

    def used(self, chat: bool) -> set[str]:
        """The columns that are read from a row of this layout."""
        used = {*self.columns, "tools"}
        used |= {"score_chosen", "score_rejected"} if self.kind == "paired" else set()
        used |= {"input"} if self.context == "instruction" else set()
        used |= {"system"} if chat else set()
        asked = self.context not in ("", "messages", "conversations")
        return used | ({"history"} if chat and asked else set())

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that decided, prompt first."""
        return tuple(name for name in (self.context, *self.answers, self.label) if name)


@dataclass(frozen=True)
class Shape:
    """A recognised file: its layout, the form of its rows, and its name for people."""

    layout: Layout
    form: Form
    name: str
    present: frozenset[str]
    transcript: bool = False


def find_layout(columns: Iterable[str], row: Mapping[str, Any]) -> Layout | None:
    """Return the layout that these columns have, or None."""
    have = set(columns)
    context = next((name for name in CONTEXTS if name in have), "")
    for pair in PAIRS:
        if have.issuperset(pair):
            return Layout("paired", context, pair)
    completion = next((name for name in COMPLETIONS if name in have and name != context), "")
    label = next((name for name in LABELS if name in have), "")
    if label and context in CONVERSATIONS and not completion:
        return Layout("unpaired", context, (), label)
    if label and context and completion:
        return Layout("unpaired", context, (completion,), label)
    if "output" in have and context and isinstance(row.get("output"), list | tuple):
        return Layout("paired", context, ("output",))
    return None


def find_demonstrations(columns: Iterable[str]) -> Layout | None:
    """Return the layout of single answers without a label, which are all wanted, or None."""
    have = set(columns)
    context = next((name for name in CONTEXTS if name in have), "")
    completion = next((name for name in COMPLETIONS if name in have and name != context), "")
    if context and completion:
        return Layout("demonstrations", context, (completion,))
    whole = next((name for name in CONVERSATIONS if name in have), "")
    return Layout("demonstrations", whole, ()) if whole else None


def recognise(table: Table, kind: Kind | None = None) -> Shape:
    """Return the shape of a table; columns of no known shape, or two shapes, raise.

    Args:
        table: rows of one file.
        kind: what is asked for; answers without a label are demonstrations where nothing else is.
    """
    present = frozenset(k for row in table.rows for k, v in row.values.items() if v is not None)
    first = table.rows[0]
    layout = find_layout(present, first.values)
    if layout is None and kind in (None, "demonstrations"):
        layout = find_demonstrations(present)
    if layout is None:
        raise DataError(_unknown_shape(table, present, kind))
    _refuse_mixture(table, layout)
    forms = [form_of(row.values, layout) for row in table.rows]
    form = next((form for form in forms if form), None)
    chat = form == "messages" or layout.context not in ("", "prompt")
    # A system prompt or earlier turns have a place in a conversation only.
    chat = chat or any(row.values.get(k) for row in table.rows for k in ("system", "history"))
    chat = chat and (form == "messages" or bool(layout.context))
    transcript = not chat and not layout.context and _mostly_transcripts(table, layout)
    name = _name(layout, form, transcript)
    return Shape(layout, "messages" if chat else "text", name, present, transcript)


def form_of(row: Mapping[str, Any], layout: Layout) -> Form | None:
    """Return whether a row's prompt and answers are texts or hold messages; None: neither."""
    values = [row.get(name) for name in (layout.context, *layout.answers) if name]
    if layout.answers == ("output",) and isinstance(values[-1], list | tuple):
        values = [*values[:-1], *values[-1]]
    if all(isinstance(value, str) for value in values):
        return "text"
    fine = (isinstance(v, str) or is_message(v) or is_messages(v) for v in values)
    return "messages" if all(fine) else None


def _refuse_mixture(table: Table, layout: Layout) -> None:
    """Raise where two rows of one file have different shapes; single bad fields are told later."""
    layouts: dict[frozenset[str], Layout | None] = {}
    first: tuple[Any, Form] | None = None
    for row in table.rows:
        keys = frozenset(k for k, v in row.values.items() if v is not None and k in KNOWN_COLUMNS)
        if keys not in layouts:
            layouts[keys] = find_layout(keys, row.values)
        own, form = layouts[keys], form_of(row.values, layout)
        if own is not None and own != layout:
            found = next((r for r in table.rows if _has(r.values, layout)), None)
            where = (
                f"{found.origin} has {listing(layout.columns)}" if found else "other rows differ"
            )
            raise DataError(
                f"{row.origin}: mixed shapes in one file: this row has {listing(own.columns)}, "
                f"{where}. Put each shape in a file of its own and name both files as sources."
            )
        if form is None or own is None:
            continue
        if first is not None and form != first[1]:
            raise DataError(
                f"{row.origin}: mixed shapes in one file: the prompt and answers of this row are "
                f"{_FORMS[form]}, those of {first[0]} are {_FORMS[first[1]]}. Put each shape in a "
                "file of its own and name both files as sources."
            )
        first = first or (row.origin, form)


_FORMS = {"text": "texts", "messages": "lists of messages"}


def _has(row: Mapping[str, Any], layout: Layout) -> bool:
    return all(row.get(name) is not None for name in layout.columns)


def _mostly_transcripts(table: Table, layout: Layout) -> bool:
    hits = 0
    for row in table.rows:
        sides = [row.values.get(name) for name in layout.answers]
        hits += all(isinstance(side, str) and is_transcript(side) for side in sides)
    return 2 * hits > len(table.rows)


def _name(layout: Layout, form: Form | None, transcript: bool) -> str:
    if transcript:
        return "chosen / rejected, whole Human/Assistant transcripts"
    what = "messages" if form == "messages" else "text"
    if not layout.context:
        return f"chosen / rejected, whole {'conversations' if what == 'messages' else 'texts'}"
    style = {
        "conversations": "ShareGPT: ",
        "instruction": "Alpaca: ",
        "question": "Orca: ",
        "input": "Orca: ",
    }.get(layout.context, "")
    wanted = ", demonstrations" if layout.kind == "demonstrations" else ""
    return f"{style}{' / '.join(layout.columns)}, {what}{wanted}"


def _unknown_shape(table: Table, present: frozenset[str], kind: Kind | None) -> str:
    columns = [name for name in table.columns if name in present]
    known = (DEMONSTRATED if kind == "demonstrations" else {}) | ACCEPTED
    shapes = [f"  {', '.join(names)}  ({what})" for names, what in known.items()]
    best = max(known, key=lambda names: (_overlap(names, present), -len(names)))
    missing = [name for name in best if name not in present]
    hint = ""
    if missing:
        close = "".join(nearest(name, columns) for name in missing)
        others = [name for name in columns if name not in best]
        example = f"columns: {{{missing[0]}: {excerpt(others[0], 40) if others else '...'}}}"
        way = f"If it is here under another name, map it, as in {example}."
        hint = f"\nNearest is {', '.join(best)}: {listing(missing)} missing.{close} "
        hint += way if others else "No column is left that could be it: it has to be in each row."
    if demonstrated := find_demonstrations(present):
        hint += (
            f"\nAs they are, {listing(demonstrated.columns)} can be fine-tuned on: lora-dpo sft, "
            "whose adapter a preference run then starts from."
        )
    return (
        f"{table.name}: columns of no known shape. Found: {few(columns) or 'none'}. "
        "Expected one of\n" + "\n".join(shapes) + hint
    )


def _overlap(names: Sequence[str], present: frozenset[str]) -> int:
    return sum(name in present for name in names)
