"""From hidden states to log-probs of given tokens, without a ``[batch, time, vocabulary]`` tensor.

Only positions that predict a completion token go through the head, in chunks. Where the head is
frozen, a chunk's logits are built once: the gradient of each token's value with respect to its own
hidden state is taken on the spot, kept in place of the logits, and scaled in backward, which is exact
for every function of these values. Where the head is trained, logits are built again in backward.
The log-sum-exp is float32 whatever the dtype of the head. What needs the whole vocabulary beside the
log-prob (a KL, the confidence of a distribution) is taken from the same logits, if asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fixed:
    """Hidden states of the reference, ``[tokens, hidden]``, and its head."""

    hidden: Tensor
    head: Head


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
    return token_values(hidden, targets, head, chunk=chunk)["logps"]


def token_values(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    chunk: int = CHUNK_TOKENS,
    wants: Set[str] = frozenset(),
    fixed: Fixed | None = None,
    frozen_head: bool = False,
) -> dict[str, Tensor]:
    """Return ``logps`` and what else is wanted of each target token, each ``[tokens]``, nats.

    Args:
        hidden, targets, head, chunk: as in ``token_logps``.
        wants: ``confidences`` is ``log p(token) - log sum_v p(v)^2`` without gradient
            (arXiv:2406.11827, Eq. 4); ``kls`` is ``KL(reference || policy)`` of the whole
            distribution at that place (arXiv:2404.11999, Eq. 7).
        fixed: the reference, for ``kls``.
        frozen_head: whether no weight of the head is trained, so that nothing is recomputed.
    """
    names = ["logps", *sorted(wants & {"confidences", "kls"})]
    values = []
    for start in range(0, len(targets), chunk):
        here = slice(start, start + chunk)
        other = None if fixed is None else Fixed(fixed.hidden[here], fixed.head)
        arguments = (hidden[here], targets[here], head, names, other)
        if not torch.is_grad_enabled():
            values.append(_chunk_values(*arguments))
        elif frozen_head:
            values.append(_UnitGradient.apply(*arguments))  # type: ignore[no-untyped-call]
        else:
            values.append(checkpoint(_chunk_values, *arguments, use_reentrant=False))
    columns = dict(zip(names, torch.cat(values).unbind(dim=1), strict=True))
    return {name: v.detach() if name == "confidences" else v for name, v in columns.items()}


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


class _UnitGradient(torch.autograd.Function):
    """Values of a chunk with the gradient of each with respect to its own hidden state kept.

    A token's values depend on its own state alone, so the gradient of their sum over tokens has the
    gradient of every single one in its rows.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, ids: Tensor, head: Head, names: list[str], fixed: Fixed | None
    ) -> Tensor:
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            if names == ["logps"]:
                values, gradients = _logps_and_gradient(leaf, ids, head)
                carrying = [0]
            else:
                values = _chunk_values(leaf, ids, head, names, fixed)  # [tokens, values]
                carrying = [i for i, name in enumerate(names) if name != "confidences"]
                gradients = [
                    torch.autograd.grad(values[:, i].sum(), leaf, retain_graph=i != carrying[-1])[0]
                    for i in carrying
                ]
        ctx.carrying = carrying
        ctx.save_for_backward(*gradients)
        return values.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        total = None
        for i, unit in zip(ctx.carrying, ctx.saved_tensors, strict=True):
            part = unit * upstream[:, i, None].to(unit.dtype)
            total = part if total is None else total + part
        return total, None, None, None, None


def _logps_and_gradient(leaf: Tensor, ids: Tensor, head: Head) -> tuple[Tensor, list[Tensor]]:
    """Return log-probs ``[tokens, 1]`` and their gradient: ``onehot - p`` sent back through the head."""
    raw = head(leaf)
    with torch.no_grad():
        logits = _exact(raw)
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        logps = logits.gather(1, ids[:, None]) - normaliser
        slope = torch.sub(logits, normaliser).exp_().neg_()  # [tokens, vocabulary], -p
        slope.scatter_add_(1, ids[:, None], torch.ones_like(logps))
    return logps, list(torch.autograd.grad(raw, leaf, slope.to(raw.dtype)))


def _chunk_values(
    states: Tensor, ids: Tensor, head: Head, names: list[str], fixed: Fixed | None
) -> Tensor:
    logits = _exact(head(states))  # [n, vocabulary]
    normaliser = logits.logsumexp(dim=1)
    logps = logits.gather(1, ids[:, None]).squeeze(1) - normaliser
    found = {"logps": logps}
    if "confidences" in names:
        with torch.no_grad():
            squares = (2 * logits).logsumexp(dim=1) - 2 * normaliser
            found["confidences"] = logps.detach() - squares
    if "kls" in names:
        assert fixed is not None
        with torch.no_grad():
            other = _exact(fixed.head(fixed.hidden)).log_softmax(dim=1)
        ours = logits - normaliser[:, None]
        found["kls"] = (other.exp() * (other - ours)).sum(dim=1)
    return torch.stack([found[name] for name in names], dim=1)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
