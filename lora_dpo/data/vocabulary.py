"""What a tokenizer does at the edges of a text: first and last tokens, and look-alikes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lora_dpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 200  # characters: a generation prompt is shorter


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, the tokens it opens a text with, and the tokens that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    stops: frozenset[int]
    eos: int
    bos: int | None
    opening: tuple[int, ...] = field(default=())

    def encode(self, texts: list[str], *, plain: bool) -> list[list[int]]:
        """Tokenise texts without opening tokens; ``plain``: control tokens in them stay text."""
        if not texts:
            return []
        out = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = out["input_ids"]
        return ids

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Return the exact texts of token ids, control tokens included."""
        if not ids:
            return []
        decoded = self.tokenizer.batch_decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return list(decoded)

    @cached_property
    def added(self) -> dict[str, int]:
        """All added tokens by text, and the stop tokens, longest text first."""
        table = {str(t.content): i for i, t in self.tokenizer.added_tokens_decoder.items()}
        for stop in self.stops:
            table.setdefault(self.decode([[stop]])[0], stop)
        found = {text: i for text, i in table.items() if text.strip()}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    @cached_property
    def _controls(self) -> dict[str, int | None]:
        """Control tokens by text: special ones, and added ones that end an answer."""
        added = self.tokenizer.added_tokens_decoder.items()
        table: dict[str, int | None] = {
            str(token.content): i for i, token in added if token.special or i in self.stops
        }
        for text in map(str, self.tokenizer.all_special_tokens):
            if text not in table:
                (table[text],) = self.tokenizer.convert_tokens_to_ids([text])  # type: ignore[misc]
        return {text: i for text, i in table.items() if text.strip()}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of control tokens, without the one that stands for whatever is unknown."""
        unknown = self.tokenizer.unk_token_id
        return frozenset(i for i in self._controls.values() if i is not None and i != unknown)

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _starts(self) -> tuple[str, ...]:
        return tuple({text[:2] for text in self._controls})

    def control_text(self, text: str) -> re.Match[str] | None:
        """Return the first place where a text imitates a control token."""
        # Hundreds of alternatives make the pattern slow; nearly all texts fail this cheap test.
        if self._control is None or not any(start in text for start in self._starts):
            return None
        return self._control.search(text)

    def control_texts(self, text: str) -> list[str]:
        """Return all that imitates a control token in a text, in its order."""
        return self._control.findall(text) if self._control is not None else []

    def between_controls(self, text: str) -> list[str]:
        """Return a text cut at its control tokens, without these."""
        return self._control.split(text) if self._control is not None else [text]

    @cached_property
    def _boundaries(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self.added))) if self.added else None

    def tail(self, text: str) -> str:
        """Return the end of a rendered prompt from its last control token on, or all of it.

        No token reaches across a control token, so behind the tail an answer is tokenised as
        behind the whole prompt.
        """
        start = max(0, len(text) - _TAIL)
        matches = self._boundaries.finditer(text, start) if self._boundaries else ()
        return text[max((match.start() for match in matches), default=0) :]

    def without_bos(self, text: str) -> tuple[str, int]:
        """Return a text without its BOS texts, and how many there were."""
        return without_bos(self.tokenizer, text)

    def without_eos(self, text: str) -> tuple[str, int]:
        """Return a text without its EOS texts, and how many there were."""
        return _strip(text, str(self.tokenizer.eos_token), front=False)

    def name(self, token: int) -> str:
        """Return a token's text for a sentence."""
        return self.decode([[token]])[0]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Vocabulary:
    """Look at what a tokenizer puts around a text, and check that an answer can be ended."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "the tokenizer has no end-of-text token, so no answer could ever end. Set "
            "tokenizer.eos_token to the token that the model stops at."
        )
    stops = frozenset({*map(int, stop_ids), eos})
    bare = Vocabulary(tokenizer, stops, eos, bos if isinstance(bos, int) else None)
    return Vocabulary(tokenizer, stops, eos, bare.bos, _opening(bare))


def _opening(vocabulary: Vocabulary) -> tuple[int, ...]:
    probe = "a"
    plain = vocabulary.encode([probe], plain=False)[0]
    full = vocabulary.tokenizer(probe, verbose=False)["input_ids"]
    places = range(len(full) - len(plain) + 1)
    start = next((i for i in places if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start])


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int]:
    """Return a text without its BOS texts, and how many there were."""
    return _strip(text, str(tokenizer.bos_token or ""), front=True)


def one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], int]:
    """Return token ids with at most one BOS in front, and how many there were."""
    bos = tokenizer.bos_token_id
    count = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return (ids[count - 1 :] if count > 1 else ids), count


def _strip(text: str, token: str, *, front: bool) -> tuple[str, int]:
    count = 0
    while token and (text.startswith(token) if front else text.endswith(token)):
        text = text[len(token) :] if front else text[: -len(token)]
        count += 1
    return text, count
