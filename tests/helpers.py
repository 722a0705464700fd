"""Batches and moved adapters for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.heads import causal_lm
from lora_dpo.layers import Work, work_of


@dataclass(frozen=True)
class Rows:
    """A padded batch, as the forward pass reads it."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


def pad(rows: list[tuple[list[int], list[int]]], *, side: str = "right", extra: int = 0) -> Rows:
    """Pad ``(prompt, completion)`` rows with token 0 to the longest, and ``extra`` beyond."""
    width = max(len(p) + len(c) for p, c in rows) + extra
    ids, attention, completion = [], [], []
    for prompt, answer in rows:
        fill = width - len(prompt) - len(answer)
        parts = ([0] * fill, [0] * fill), (prompt + answer, [1] * (len(prompt) + len(answer)))
        order = parts if side == "left" else parts[::-1]
        ids.append(order[0][0] + order[1][0])
        attention.append(order[0][1] + order[1][1])
        marks = [0] * len(prompt) + [1] * len(answer)
        completion.append([0] * fill + marks if side == "left" else marks + [0] * fill)
    return Rows(torch.tensor(ids), torch.tensor(attention), torch.tensor(completion).bool())


def random_rows(
    count: int, seed: int = 0, vocabulary: int = 128
) -> list[tuple[list[int], list[int]]]:
    """Rows of unequal lengths with random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [(draw(2, 9), draw(1, 12)) for _ in range(count)]


def move_adapter(
    policy: nn.Module, adapter: str = "default", std: float = 0.05, seed: int = 1
) -> None:
    """Give ``lora_B`` random values, so that the policy is no longer its reference."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if f"lora_B.{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def fast_work(policy: Any) -> Work:
    """Return what the fast layers of a policy share."""
    work = work_of(causal_lm(policy))
    assert work is not None
    return work
