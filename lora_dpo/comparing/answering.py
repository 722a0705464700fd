"""Answers of each model to the same prompts, from the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_dpo.generation import end_ids, sample_ids


@dataclass(frozen=True)
class Sampled:
    """The answers of one model, prompt by prompt, ``[prompts x samples]``.

    Args:
        ids: of each answer, its end token included.
        texts: without special tokens.
        ended: whether each reached an end token.
    """

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    ended: tuple[bool, ...]


def sample_answers(
    policy: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    as_reference: bool,
    samples: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 16,
    template_arguments: Mapping[str, Any] | None = None,
) -> Sampled:
    """Return ``samples`` answers a tokenised prompt at temperature 1.

    Each batch begins from a seed of its own, so that two models whose answers have other lengths
    still draw the same numbers for the same prompt.

    Args:
        policy: with the adapter that is meant active.
        tokenizer: its own.
        prompts: token ids.
        as_reference: whether its reference answers.
        samples: a prompt.
        max_new_tokens: longest answer.
        seed: of the random numbers.
        batch_size: answers at a time.
        template_arguments: variables for the chat template, as training had them.
    """
    rows = [prompt for prompt in prompts for _ in range(samples)]
    made: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        made += sample_ids(
            policy,
            tokenizer,
            rows[start : start + batch_size],
            as_reference=as_reference,
            max_new_tokens=max_new_tokens,
            seed=seed + start,
            batch_size=batch_size,
            template_arguments=template_arguments,
        )
    ends = end_ids(policy, tokenizer, template_arguments)
    return Sampled(
        ids=tuple(map(tuple, made)),
        texts=tuple(tokenizer.batch_decode(made, skip_special_tokens=True)),
        ended=tuple(ids[-1] in ends for ids in made),
    )
