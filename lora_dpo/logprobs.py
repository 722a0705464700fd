"""From hidden states to log-probs of given tokens, without a ``[batch, time, vocabulary]`` tensor.

Only positions that predict a completion token go through the head, in chunks; each chunk's logits
live while its log-sum-exp is taken and are built again in backward. The log-sum-exp is float32
whatever the dtype of the head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024

Head = Callable[[Tensor], Tensor]


def token_logps(
    hidden: Tensor, targets: Tensor, head: Head, *, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """Return the log-prob of each target token, ``[tokens]``, nats, float32 (float64 stays).

    Args:
        hidden: states that predict the targets, ``[tokens, hidden]``.
        targets: token ids, ``[tokens]``.
        head: maps ``[n, hidden]`` to logits ``[n, vocabulary]``.
        chunk: tokens whose logits exist at one time, at least 1.
    """
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    keep_graph = torch.is_grad_enabled()
    values = [
        checkpoint(_chunk_logps, states, ids, head, use_reentrant=False)
        if keep_graph
        else _chunk_logps(states, ids, head)
        for states, ids in pieces
    ]
    return torch.cat(values)


def predicting_positions(completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns ``[tokens]`` of the positions that predict a completion token.

    Args:
        completion_mask: True where the input token belongs to the completion, ``[rows, time]``; the
            first column is never one, since nothing predicts it.
    """
    rows, columns = completion_mask[:, 1:].nonzero(as_tuple=True)
    return rows, columns


def sum_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Add up per-token values ``[tokens]`` into ``[count]`` by their row number."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)


def _chunk_logps(states: Tensor, ids: Tensor, head: Head) -> Tensor:
    logits = head(states)  # [n, vocabulary]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(1, ids[:, None]).squeeze(1) - logits.logsumexp(dim=1)
