"""Text that imitates control tokens: kept as text where a chat template puts it among real ones.

Data may hold any text, ``<|im_end|>`` too, and a tokenizer reads a rendered conversation as one text
in which nothing tells the template's own tokens from such an imitation. So a conversation that holds
one is rendered with private characters in its place; the places where these come out are tokenised
again by themselves, as plain text. All other tokens stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_dpo.data.records import Labelled, Pair
from lora_dpo.data.vocabulary import Vocabulary

_PRIVATE = range(0xE000, 0xF900)  # Unicode's own for private use: no text means anything by them
# Behind an anchor a tokenizer with a dummy prefix does not put a space before a text.
ANCHORS = ("\n", "a", ".", "0")


@dataclass(frozen=True)
class Disguise:
    """What stands for each imitation while a template is rendered: a character and its text."""

    table: Mapping[str, str]

    def on(self, value: Any) -> Any:
        """Return messages, tools or a text with characters in place of imitations."""
        if isinstance(value, str):
            for character, text in self.table.items():
                value = value.replace(text, character)
            return value
        if isinstance(value, Mapping):
            return {self.on(key): self.on(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.on(item) for item in value)
        return value

    def off(self, text: str) -> str:
        """Return a text with its imitations back."""
        return text.translate({ord(character): own for character, own in self.table.items()})

    def row(self, row: Pair | Labelled) -> Pair | Labelled:
        """Return a row of messages likewise."""
        answers = ("chosen", "rejected") if isinstance(row, Pair) else ("completion",)
        changes: Any = {name: self.on(getattr(row, name)) for name in ("prompt", *answers, "tools")}
        return replace(row, **changes)

    def hides_in(self, text: str) -> bool:
        """Whether an imitation stands in this text."""
        return any(character in text for character in self.table)


def disguise_of(values: Any, vocabulary: Vocabulary) -> Disguise | None:
    """Return a disguise for every imitation in messages or tools; None where there is none."""
    texts = [text for text in leaves(values) if vocabulary.control_text(text)]
    if not texts:
        return None
    found = dict.fromkeys(hit for text in texts for hit in vocabulary.control_texts(text))
    longest_first = sorted(found, key=len, reverse=True)
    used = set("".join(leaves(values)))
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    return Disguise(dict(zip(free, longest_first, strict=False)))


def leaves(value: Any) -> Iterator[str]:
    """Yield every text within messages or tools, keys included: a template may print them all."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def kept_plain(
    vocabulary: Vocabulary, disguise: Disguise, text: str, ids: Sequence[int]
) -> list[int] | None:
    """Return the ids of a disguised text with its imitations back in it, as plain text.

    Args:
        vocabulary: of the tokenizer.
        disguise: that is in the text.
        text: a rendered conversation, or a part of one.
        ids: of exactly this text.

    Returns:
        None where the tokenizer cannot be brought to it.
    """
    if not disguise.hides_in(text):
        return list(ids)
    pieces, runs = vocabulary.between_controls(text), _runs(vocabulary, ids)
    if len(pieces) != len(runs):
        return None
    made: list[int] = []
    for piece, (run, control) in zip(pieces, runs, strict=True):
        mine = _again(vocabulary, disguise, piece, run) if disguise.hides_in(piece) else run
        if mine is None:
            return None
        made += [*mine, *control]
    return made


def _runs(vocabulary: Vocabulary, ids: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the ids between control tokens, each with the control token behind it."""
    runs: list[tuple[list[int], list[int]]] = [([], [])]
    for token in ids:
        if token in vocabulary.control_ids:
            runs[-1][1].append(token)
            runs.append(([], []))
        else:
            runs[-1][0].append(token)
    return runs


def _again(
    vocabulary: Vocabulary, disguise: Disguise, piece: str, run: list[int]
) -> list[int] | None:
    """Tokenise a piece by itself, where that gives for the disguised one what it has in its place."""
    # some control tokens take the white space beside them
    for shape in dict.fromkeys((piece, piece.lstrip(), piece.rstrip(), piece.strip())):
        for anchor in ("", *ANCHORS):
            texts = [anchor, anchor + shape, anchor + disguise.off(shape)]
            base, hidden, own = vocabulary.encode(texts, plain=True)
            start = len(base) if anchor else 0
            if hidden[start:] != run or hidden[:start] != own[:start]:
                continue
            found = own[start:]
            return None if vocabulary.control_ids.intersection(found) else found
    return None


def encode_conversation(
    vocabulary: Vocabulary, render: Callable[[Any], str], turns: Any
) -> tuple[list[int], bool]:
    """Return the ids of a rendered conversation, and whether its content stayed text throughout.

    Args:
        vocabulary: of the tokenizer.
        render: makes a text of turns.
        turns: the conversation.
    """
    text = render(turns)
    (ids,) = vocabulary.encode([text], plain=False)
    disguise = disguise_of(turns, vocabulary)
    if disguise is None:
        return ids, True
    hidden = render(disguise.on(turns))
    if disguise.off(hidden) != text:  # the template looks for such text itself
        return ids, False
    plain = kept_plain(vocabulary, disguise, hidden, vocabulary.encode([hidden], plain=False)[0])
    return (ids, False) if plain is None else (plain, True)
