"""Rendering conversations: the prompt as generation would see it, and what the answers add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_dpo.data.problems import BadRow
from lora_dpo.data.records import Labelled, Message, Pair, Text
from lora_dpo.data.report import DataReport, excerpt
from lora_dpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "conversation", "tools")
GENERATION_PROMPT = "repaired: generation prompt differs from the rendered answer's beginning"


@dataclass(frozen=True)
class Rendered:
    """A prompt and its one or two answers as texts; ``prompt + answer`` is the conversation."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Renderer:
    """Applies a tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    report: DataReport

    def __call__(self, row: Pair | Labelled) -> Rendered:
        """Return the row's texts; raises ``BadRow`` where the template cannot render it."""
        parts = answers_of(row)
        prompt = self._render(row, row.prompt, opened=True)
        whole = [self._render(row, (*row.prompt, *part)) for part in parts]
        if not all(text.startswith(prompt) for text in whole):
            opened, prompt = prompt, self._render(row, row.prompt)
            self._check_prefix(row, prompt, opened, whole)
        return Rendered(prompt, tuple(text[len(prompt) :] for text in whole))

    def _check_prefix(
        self, row: Pair | Labelled, prompt: str, opened: str, whole: list[str]
    ) -> None:
        for text in whole:
            if not text.startswith(prompt) or not prompt:
                at = next(
                    (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), 0
                )
                raise BadRow(
                    "the chat template renders the prompt differently once an answer follows "
                    f"({excerpt(prompt[at:], 30)!r} against {excerpt(text[at:], 30)!r}), so there "
                    "is no boundary between prompt and answer. Set data.chat_template to a "
                    "template that leaves earlier turns alone, or pass the template's own switch "
                    "in template_arguments (such as enable_thinking: false)."
                )
        generation, moved = opened.removeprefix(prompt), whole[0][len(prompt) :]
        detail = f"generation begins with {generation!r}, the answer with {moved[:40]!r}"
        self.report.add(GENERATION_PROMPT, row.origin, detail)

    def _render(self, row: Pair | Labelled, text: Text, *, opened: bool = False) -> str:
        turns = [dict(m) for m in text if isinstance(m, Mapping)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns,
                tools=list(row.tools) if row.tools else None,
                add_generation_prompt=opened,
                tokenize=False,
                **self.arguments,
            )
        except Exception as error:
            # A template is a program that came with the model: it may raise anything.
            raise BadRow(
                f"the chat template cannot render this conversation ({excerpt(str(error), 200)}); "
                f"its roles are {', '.join(str(m['role']) for m in turns)}. Change the row, or set "
                "data.chat_template to a template that accepts it."
            ) from None
        return str(rendered)


def answers_of(row: Pair | Labelled) -> tuple[tuple[Message, ...], ...]:
    """Return the one or two answers of a row of messages."""
    parts = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
    return tuple(tuple(m for m in part if isinstance(m, Mapping)) for part in parts)


def make_renderer(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], report: DataReport, where: str
) -> Renderer:
    """Return a renderer; a tokenizer without a template, or a reserved argument, raises."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the rows are messages, but the tokenizer has no chat template. Set "
            "data.chat_template to a file with one, use an instruct model's tokenizer, or give "
            "prompt, chosen and rejected as texts."
        )
    for name in arguments:
        if name in _OURS or name == "messages":
            raise DataError(
                f"template_arguments: {name!r} is set by this library; expected variables of the "
                "chat template only (such as enable_thinking)."
            )
    return Renderer(tokenizer, arguments, report)
