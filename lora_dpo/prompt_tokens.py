"""A prompt's tokens, as training saw them: plain text, or a chat through its template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from lora_dpo.data.imitations import encode_conversation
from lora_dpo.data.report import excerpt
from lora_dpo.data.vocabulary import Vocabulary, one_bos, without_bos
from lora_dpo.errors import ModelError

logger = logging.getLogger("lora_dpo")

Prompt = str | Sequence[Mapping[str, Any]]


def encode_prompt(
    tokenizer: Any, prompt: Prompt, template_arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the tokens of a prompt as training saw it: through the chat template, or plain.

    Raises:
        ModelError: a chat, and a tokenizer without chat template, or with one that refuses it.
    """
    if not isinstance(prompt, str):
        if not tokenizer.chat_template:
            raise ModelError(
                "the prompt is a chat and the tokenizer has no chat template; give plain text, or set "
                "data.chat_template."
            )
        return _encode_chat(tokenizer, prompt, template_arguments or {})
    text, opened = without_bos(tokenizer, prompt)
    # in a text nothing is a control token
    ids: list[int] = list(tokenizer(text, split_special_tokens=True)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if opened and tokenizer.bos_token_id not in ids[:1]:
        ids.insert(0, tokenizer.bos_token_id)
    return ids


def _encode_chat(
    tokenizer: Any, prompt: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[int]:
    def render(turns: Sequence[Mapping[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=True, **arguments
            )
        )

    try:
        vocabulary = _vocabulary(tokenizer, tokenizer.eos_token_id, len(tokenizer))
        ids, plain = encode_conversation(vocabulary, render, list(prompt))
    except Exception as error:  # a template is a program that came with the model
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the chat template cannot render the prompt ({reason}); its roles are "
            f"{', '.join(str(turn.get('role')) for turn in prompt)}. Set data.chat_template to one that can."
        ) from None
    if not plain:
        logger.warning(
            "a prompt holds text of control tokens, which this tokenizer or chat template cannot keep "
            "as text: %s",
            excerpt(prompt_text(prompt)),
        )
    return one_bos(tokenizer, ids)[0]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, end: int | None, size: int) -> Vocabulary:
    """Return what is known of a tokenizer's tokens: looking at thousands of them takes its time."""
    stops: frozenset[int] = frozenset() if end is None else frozenset({int(end)})
    return Vocabulary(tokenizer, stops, end or 0, tokenizer.bos_token_id)


def as_trained(prompts: Sequence[Prompt], *, chat: bool) -> list[Prompt]:
    """Return prompts in the form that a run was trained on: a text becomes the user's turn in chats."""
    return [
        [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt for people to read."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
