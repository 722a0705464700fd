"""Attention over rows that lie end to end and share their beginning, without a mask of all tokens.

Registered with transformers as one more attention implementation. Without segments it is the
library's own scaled dot-product attention, so generation and padded batches run as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_dpo.layers.capped import capped_attention

NAME = "lora_dpo_flat"
SEGMENTS = "lora_dpo_segments"
# What some models ask of their attention beyond scaled dot products; ours does none of it.
_UNKNOWN = ("s_aux", "sinks")

Segments = Sequence[tuple[int, Sequence[int]]]


def flat_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, time, size]
    key: Tensor,  # [1, key heads, time, size]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **further: Any,
) -> tuple[Tensor, None]:
    """Return the attention of every token, ``[1, time, heads, size]``.

    Each segment's shared tokens and its first branch see what stands before them in the segment;
    each further branch sees the shared tokens and itself.

    Raises:
        NotImplementedError: the model asks for sinks or dropout.
    """
    segments = further.pop(SEGMENTS, getattr(attention_mask, SEGMENTS, None))
    cap = float(further.get("softcap") or 0.0)
    if segments is None and not cap:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **further
        )
        return out
    if dropout or any(further.get(name) is not None for name in _UNKNOWN):
        raise NotImplementedError("attention with sinks or dropout")
    if cap or not _takes_groups(query, key, value):
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if segments is None:
        length = query.shape[2]
        if (
            attention_mask is None and length > 1
        ):  # as sdpa reads it: the first query sees the first key
            key, value = key[:, :, :length], value[:, :, :length]
        dense = capped_attention(query, key, value, scale=scale, cap=cap, mask=attention_mask)
        return dense.transpose(1, 2), None
    attention = partial(_seen_behind, scale=scale, cap=cap)
    parts: list[Tensor] = []
    start = 0
    for shared, branches in segments:
        end = start + shared + branches[0]
        here = slice(start, end)
        parts.append(attention(query[:, :, here], key[:, :, here], value[:, :, here]))
        trunk = slice(start, start + shared)
        for length in branches[1:]:
            own = slice(end, end + length)
            if length:
                keys, values = (
                    torch.cat([both[:, :, trunk], both[:, :, own]], dim=2) for both in (key, value)
                )
                parts.append(attention(query[:, :, own], keys, values))
            end += length
        start = end
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _seen_behind(query: Tensor, key: Tensor, value: Tensor, *, scale: float, cap: float) -> Tensor:
    """Return the attention of queries on what stands up to their place; the last one's is the last key's."""
    length, whole = query.shape[2], key.shape[2]
    if cap:
        return capped_attention(query, key, value, scale=scale, cap=cap)
    how: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if length == whole:
        how["is_causal"] = True
    elif query.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        how["attn_mask"] = causal_lower_right(length, whole)  # for the flash kernel: no tensor
    else:
        seen = torch.ones(length, whole, dtype=torch.bool, device=query.device)
        how["attn_mask"] = seen.tril(whole - length)
    return scaled_dot_product_attention(query, key, value, **how)


def _takes_groups(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether several heads of the query can share one of the keys without a copy of it for each.

    On a card only the flash kernel can; torch would fall back to one that makes all scores.
    """
    if query.shape[1] == key.shape[1] or not query.is_cuda:
        return True
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, True))


AttentionInterface.register(NAME, flat_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
