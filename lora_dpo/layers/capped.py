"""Attention whose scores are capped (Gemma 2), a few queries at a time: no kernel of torch's caps them.

``softmax(cap tanh(scale q k' / cap)) v``, with the scores of some queries alone in memory, forward and
backward, where the library keeps those of all of them, several times over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_SCORES = 2**23  # of a block of queries: 32 MiB in float32


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    cap: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention of each query, ``[rows, heads, queries, size]``.

    Args:
        query: ``[rows, heads, queries, size]``.
        key, value: ``[rows, heads, keys, size]``; the last query stands where the last key does.
        scale: of the products.
        cap: what a score approaches at most.
        mask: True where a key is seen, or what is added to the scores, ``[rows, 1, queries, keys]``; each
            query sees what stands up to its own place if it is left out.
    """
    out: Tensor = _Capped.apply(query, key, value, mask, scale, cap)  # type: ignore[no-untyped-call]
    return out


class _Capped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float
    ) -> Tensor:
        ctx.mask, ctx.scale, ctx.cap = mask, scale, cap
        ctx.save_for_backward(q, k, v)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        for here, seen in _blocks(q, k, mask):
            weights, _ = _weights(ctx, q, k, here, seen)
            out[..., here, :] = weights.to(v.dtype) @ v[..., seen, :]
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        of_q = torch.empty_like(q)
        # sums over all blocks, which 16 bits would round as often
        of_k, of_v = (torch.zeros_like(x, dtype=_precise(x)) for x in (k, v))
        for here, seen in _blocks(q, k, ctx.mask):
            weights, bent = _weights(ctx, q, k, here, seen)
            g = upstream[..., here, :]
            of_v[..., seen, :] += weights.to(g.dtype).mT @ g
            of_scores = (g @ v[..., seen, :].mT).to(weights.dtype)
            of_scores -= (of_scores * weights).sum(-1, keepdim=True)
            # through the softmax, and the cap: the derivative of tanh is one minus its square
            of_scores *= weights.mul_(bent.square_().neg_().add_(1)).mul_(ctx.scale)
            of_products = of_scores.to(q.dtype)
            of_q[..., here, :] = of_products @ k[..., seen, :]
            of_k[..., seen, :] += of_products.mT @ q[..., here, :]
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None, None


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Cut queries so that a block makes few scores; with each the keys that it can see."""
    queries, keys = q.shape[2], k.shape[2]
    size = max(1, _SCORES // (q.shape[0] * q.shape[1] * keys))
    for start in range(0, queries, size):
        end = min(start + size, queries)
        yield slice(start, end), slice(0, keys if mask is not None else keys - queries + end)


def _weights(ctx: Any, q: Tensor, k: Tensor, here: slice, seen: slice) -> tuple[Tensor, Tensor]:
    """Return what queries weigh each value with, and their scores over the cap, in float32 at least."""
    products = q[..., here, :] @ k[..., seen, :].mT
    bent = products.to(_precise(products)).mul_(ctx.scale / ctx.cap).tanh_()
    if ctx.mask is not None:
        mask = ctx.mask[..., here, seen]
        if mask.dtype != torch.bool:
            return (bent * ctx.cap).add_(mask).softmax(-1), bent
        hidden = ~mask
    else:
        count = here.stop - here.start
        hidden = torch.ones(count, seen.stop, dtype=torch.bool, device=q.device)
        hidden = hidden.triu(seen.stop - count + 1)
    # a query that sees nothing (of padding) weighs all alike: its numbers stay numbers
    scores = (bent * ctx.cap).masked_fill_(hidden, torch.finfo(bent.dtype).min)
    return scores.softmax(-1), bent
