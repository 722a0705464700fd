"""What the trained policy says to a few fixed prompts: kept with an export, to try what is served.

The prompts are written here, so that no row of anybody's data goes into a folder that is shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.heads import causal_lm, compute_context, home_device
from lora_dpo.policy import unwrap
from lora_dpo.prompt_tokens import encode_prompt

SMOKE_FILE = "smoke_test.json"
PROMPTS = (
    "Tell me a short story about a fox.",
    "What is the capital of France?",
    "Hello!",
)
TOP = 10
GREEDY = 32  # tokens
LIKELY = math.log(0.05)  # less likely tokens are not compared
EXACT, ROUGH = 0.15, 0.5  # nats: files of the policy itself, and files on other base weights


def smoke_record(
    model: nn.Module,
    tokenizer: Any,
    stops: Sequence[int],
    *,
    chat: bool,
    tolerance: float = EXACT,
    template_arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return prompts with the likeliest first tokens and the likeliest answer of a model.

    Args:
        model: the trained policy, in evaluation mode.
        tokenizer: its own.
        stops: tokens that end an answer.
        chat: whether prompts go through the chat template.
        tolerance: by how many nats a served model may differ.
        template_arguments: variables for the chat template, as training had them.
    """
    prompts = []
    for text in PROMPTS:
        messages = [{"role": "user", "content": text}] if chat else None
        ids = encode_prompt(tokenizer, messages or text, template_arguments)
        room = _positions(model) - len(ids)
        if not ids or room < 1:
            continue
        values, tokens = first_token_logprobs(model, ids).topk(TOP)
        answer = greedy_answer(model, ids, stops, min(GREEDY, room))
        stopped = bool(answer) and answer[-1] in stops
        prompts.append(
            {
                "text": text,
                "messages": messages,
                "token_ids": ids,
                "first_token": [
                    {"id": i, "token": tokenizer.decode([i]), "logprob": round(v, 6)}
                    for i, v in zip(tokens.tolist(), values.tolist(), strict=True)
                ],
                "answer_ids": answer,
                "answer": tokenizer.decode(answer, skip_special_tokens=True),
                "stopped": stopped,
            }
        )
    return {
        "chat": chat,
        "template_arguments": dict(template_arguments or {}),
        "stop_ids": list(stops),
        "tolerance": tolerance,
        "prompts": prompts,
    }


def first_token_logprobs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the log-probs of the token behind a prompt, ``[vocabulary]``, float32 on the CPU."""
    rows = torch.tensor([list(ids)], device=home_device(model))
    with torch.no_grad(), compute_context(model):
        out = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    logits: Tensor = out.logits[0, -1].float().cpu()
    return logits.log_softmax(-1)


def greedy_answer(
    model: nn.Module, ids: Sequence[int], stops: Sequence[int] | None, tokens: int
) -> list[int]:
    """Return the likeliest answer, with its end token; ``stops`` None takes the model's own."""
    target: Any = model if hasattr(model, "generate") else unwrap(model)
    rows = torch.tensor([list(ids)], device=home_device(model))
    own = {} if stops is None else {"eos_token_id": list(stops), "pad_token_id": stops[0]}
    with torch.no_grad(), compute_context(model):
        out = target.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            **own,
        )
    made: list[int] = out[0, rows.shape[1] :].tolist()
    return made


def difference(expected: Sequence[Mapping[str, Any]], found: Mapping[Any, float]) -> float:
    """Return the largest difference in nats over the likely first tokens of one prompt.

    Args:
        expected: ``first_token`` of a prompt in the record.
        found: log-probs of what is looked at, by token id or by token text; a token that is not
            among them is taken to be as likely as the least likely one there.
    """
    if not found:
        return math.inf
    floor, worst = min(found.values()), 0.0
    for number, token in enumerate(expected):
        if number and token["logprob"] < LIKELY:
            break
        key = token["id"] if token["id"] in found else token["token"]
        apart = abs(token["logprob"] - found.get(key, floor))
        if not math.isfinite(apart):
            return math.inf  # max(0.0, nan) is 0.0
        worst = max(worst, apart)
    return worst


def _positions(model: nn.Module) -> int:
    config = causal_lm(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
