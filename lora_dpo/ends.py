"""Where an answer ends: the token that a chat template puts behind it, and all that a model stops on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QUESTION, _ANSWER = "qx7Kq", "ax9Wa"


def end_of_turn(tokenizer: Any, template_arguments: Mapping[str, Any] | None = None) -> int | None:
    """Return the id of the token that ends an assistant's turn in rendered chats.

    None where the tokenizer has no chat template, the template cannot render one question with one
    answer, or it ends a turn with no token of its own.
    """
    if not tokenizer.chat_template:
        return None
    chat = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    ]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **(template_arguments or {}))
    except Exception:  # a template is a program that came with the model: it may raise anything
        return None
    tail = str(text).rpartition(_ANSWER)[2]
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return next((int(token) for token in ids if token in control), None)


def stop_tokens(
    generation_config: Any, tokenizer: Any, template_arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Return every token that generation must stop on, those of the model first, each once."""
    stated = getattr(generation_config, "eos_token_id", None)
    found = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    found += [end_of_turn(tokenizer, template_arguments), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
