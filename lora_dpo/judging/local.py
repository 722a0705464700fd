"""A model on this machine as judge: the likelier of two letters is its choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lora_dpo.config import Config
from lora_dpo.diagnostics.measuring import token_scores
from lora_dpo.errors import UnreadableAnswerError
from lora_dpo.heads import causal_lm
from lora_dpo.judging.questions import question
from lora_dpo.judging.verdicts import Choice
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.policy import load_base
from lora_dpo.preparing import load_tokenizer
from lora_dpo.prompt_tokens import encode_prompt


class LocalJudge:
    """A causal language model that is asked through its chat template, or in plain text.

    Args:
        model: in memory.
        tokenizer: its own.
        instructions: what makes an answer better; ours if left out.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, instructions: str | None = None) -> None:
        self.model, self.tokenizer, self.instructions = model, tokenizer, instructions

    @classmethod
    def open(cls, folder: Path, *, instructions: str | None = None) -> LocalJudge:
        """Load a folder's model in 4 bits (one that is quantised already as it is)."""
        config = Config.parse(
            {
                "model": {"base": str(folder)},
                "data": {"train": "none"},
                "output": {"dir": "none"},
            }
        )
        return cls(load_base(config.model), load_tokenizer(config), instructions)

    def __repr__(self) -> str:
        return f"LocalJudge({getattr(causal_lm(self.model).config, '_name_or_path', '')!r})"

    def choose(self, prompt: str, first: str, second: str) -> Choice:
        """Return the answer whose letter is likelier; a tie if both are equally likely.

        Raises:
            UnreadableAnswerError: the question is longer than the model's context.
        """
        what, pair = question(prompt, first, second, self.instructions, ties=False)
        if self.tokenizer.chat_template:
            asked = encode_prompt(
                self.tokenizer, [{"role": "user", "content": f"{what}\n\n{pair}"}]
            )
        else:
            asked = encode_prompt(self.tokenizer, f"{what}\n\n{pair}\nBetter answer:")
        forms = [self._forms("A"), self._forms("B")]
        self._check_length(len(asked) + max(len(ids) for form in forms for ids in form))
        a, b = self._log_odds(asked, forms)
        return "tie" if a == b else "first" if a > b else "second"

    def _forms(self, letter: str) -> list[list[int]]:
        """Return the token ids of a letter, with and without a space before it."""
        found = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (letter, f" {letter}")
        ]
        return [found[0]] if found[0] == found[1] else found

    def _log_odds(
        self, asked: Sequence[int], forms: Sequence[Sequence[list[int]]]
    ) -> tuple[float, float]:
        rows = [(asked, ids) for form in forms for ids in form]
        found = token_scores(self.model, rows, batch_size=len(rows), chunk=CHUNK_TOKENS)
        values = iter(float(value.sum()) for value in found)
        a, b = (float(np.logaddexp.reduce([next(values) for _ in form])) for form in forms)
        return a, b

    def _check_length(self, tokens: int) -> None:
        config = causal_lm(self.model).config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most and tokens > most:
            raise UnreadableAnswerError(
                f"the question has {tokens} tokens and the judge's context {most}"
            )
