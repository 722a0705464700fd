"""Attention over rows that lie end to end and share their beginning, without a mask of all tokens.

Registered with transformers as one more attention implementation. Without segments it is the
library's own scaled dot-product attention, so generation and padded batches run as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "lora_dpo_flat"
SEGMENTS = "lora_dpo_segments"
# What some models ask of their attention beyond scaled dot products; ours does none of it.
_UNKNOWN = ("softcap", "s_aux", "sinks")

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
        NotImplementedError: the model asks for a soft cap, sinks, or dropout.
    """
    segments = further.pop(SEGMENTS, getattr(attention_mask, SEGMENTS, None))
    if segments is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **further
        )
        return out
    if dropout or any(further.get(name) is not None for name in _UNKNOWN):
        raise NotImplementedError("attention with a soft cap, sinks or dropout")
    groups = query.shape[1] // key.shape[1]
    if not _takes_groups(query, key, value):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    attention = partial(
        scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    parts: list[Tensor] = []
    start = 0
    for shared, branches in segments:
        end = start + shared + branches[0]
        here = slice(start, end)
        parts.append(
            attention(query[:, :, here], key[:, :, here], value[:, :, here], is_causal=True)
        )
        trunk = slice(start, start + shared)
        for length in branches[1:]:
            own = slice(end, end + length)
            if length:
                parts.append(_branch(attention, query, key, value, trunk, own))
            end += length
        start = end
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1), None


def _takes_groups(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether several heads of the query can share one of the keys without a copy of it for each.

    On a card only the flash kernel can; torch would fall back to one that makes all scores.
    """
    if query.shape[1] == key.shape[1] or not query.is_cuda:
        return True
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    return can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, True, True))


def _branch(
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    trunk: slice,
    own: slice,
) -> Tensor:
    keys = torch.cat([key[:, :, trunk], key[:, :, own]], dim=2)
    values = torch.cat([value[:, :, trunk], value[:, :, own]], dim=2)
    length, whole = own.stop - own.start, keys.shape[2]
    if query.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        mask: Any = causal_lower_right(length, whole)  # dispatched to the flash kernel, no tensor
    else:
        mask = torch.ones(length, whole, dtype=torch.bool, device=query.device).tril(whole - length)
    return attention(query[:, :, own], keys, values, attn_mask=mask)


AttentionInterface.register(NAME, flat_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
