"""Rows of token ids as a reader sees them: each token's own text, and what it is besides text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from lora_dpo.data.vocabulary import Vocabulary

# Tokens of context that decide how a token reads: some tokenizers drop the space of a first one.
_CONTEXT = 4
_HALF = "\ufffd"


@dataclass(frozen=True)
class Token:
    """One token: its id, the text that it adds, and what it is (BOS, EOS, end of turn, ...)."""

    id: int
    text: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShownRow:
    """A row as the model is fed: the prompt's tokens, and each answer's behind them.

    Args:
        origin: ``file:row``.
        prompt: its tokens.
        answers: the tokens of each answer by name (chosen and rejected, or completion).
        begins_alike: tokens that both answers begin with.
        label: of an unpaired row.
    """

    origin: str
    prompt: tuple[Token, ...]
    answers: Mapping[str, tuple[Token, ...]]
    begins_alike: int = 0
    label: bool | None = None


def show_rows(
    rows: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, names: Sequence[str], *, chat: bool
) -> tuple[ShownRow, ...]:
    """Return rows with the text and the marks of every token.

    Args:
        rows: tokenised rows.
        vocabulary: of the tokenizer.
        names: of the answers.
        chat: whether a chat template rendered the rows: each answer's last token ends a turn.
    """
    ends = {row[f"{name}_ids"][-1] for row in rows for name in names} if chat else set()
    return tuple(_show(row, vocabulary, names, ends) for row in rows)


def token_texts(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; together they are the text of all.

    A character that several tokens make up stands with the last of them.
    """
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, whole = vocabulary.decode([list(ids[start:done]), list(ids[start:end])])
        if whole.endswith(_HALF) and end < len(ids) and end - done < _CONTEXT:
            texts.append("")  # a part of a character: the next token may end it
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else "")
        start, done = max(start, end - _CONTEXT), end
    return texts


def _show(
    row: Mapping[str, Any], vocabulary: Vocabulary, names: Sequence[str], ends: Set[int]
) -> ShownRow:
    prompt: list[int] = list(row["prompt_ids"])
    sides = {name: list(row[f"{name}_ids"]) for name in names}
    shown = {}
    for name, ids in sides.items():
        # behind the prompt's end, so that an answer's first space is there
        texts = token_texts(vocabulary, [*prompt[-_CONTEXT:], *ids])[-len(ids) :]
        shown[name] = _tokens(vocabulary, ids, texts, ends)
    first, *others = sides.values()
    alike = 0
    for a, b in zip(first, others[0] if others else [], strict=False):
        if a != b:
            break
        alike += 1
    return ShownRow(
        origin=f"{row['file']}:{row['row']}",
        prompt=_tokens(vocabulary, prompt, token_texts(vocabulary, prompt), ends),
        answers=shown,
        begins_alike=alike,
        label=row.get("label"),
    )


def _tokens(
    vocabulary: Vocabulary, ids: Sequence[int], texts: Sequence[str], ends: Set[int]
) -> tuple[Token, ...]:
    special = {i for i, t in vocabulary.tokenizer.added_tokens_decoder.items() if t.special}
    found = []
    for token, text in zip(ids, texts, strict=True):
        marks = [
            mark
            for mark, fits in (
                ("BOS", token == vocabulary.bos),
                ("EOS", token == vocabulary.eos),
                ("stop", token in vocabulary.stops and token != vocabulary.eos),
                ("end of turn", token in ends),
            )
            if fits
        ]
        found.append(Token(token, text, tuple(marks or (["special"] if token in special else []))))
    return tuple(found)
