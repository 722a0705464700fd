"""A decoder layer that keeps its input alone until backward, and policy and reference layer by layer.

Each weight is made plain twice a micro-batch: once for policy and reference together, and once for
the recomputation and the backward pass that follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from lora_dpo.layers.work import Work
from lora_dpo.randomness import forked, random_state, restore_random

Call = Callable[[Tensor], Tensor]


class _Recomputed(torch.autograd.Function):
    """Runs a layer without a graph, and again with one when its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: Call, work: Work, *weights: Tensor) -> Tensor:
        ctx.call, ctx.work, ctx.weights = call, work, weights
        device = hidden.device.type
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.random = random_state() if work.random else None
        ctx.save_for_backward(hidden)
        return call(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        work: Work = ctx.work
        leaf = hidden.detach().requires_grad_(ctx.needs_input_grad[0])
        device, enabled, dtype = ctx.autocast
        with work.keeping_weights(), forked(enabled=work.random):
            if ctx.random is not None:
                restore_random(ctx.random)
            again = work.turned(running=True, recomputing=True)
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled), again:
                out = ctx.call(leaf)
            wanted = [leaf, *ctx.weights] if leaf.requires_grad else list(ctx.weights)
            found = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
        of_hidden, of_weights = (found[0], found[1:]) if leaf.requires_grad else (None, found)
        return of_hidden, None, None, *of_weights


def run_layer(
    layer: Any, work: Work, place: tuple[int, bool], hidden: Tensor, *args: Any, **kw: Any
) -> Any:
    """Run a decoder layer for the policy and, in a fused pass, for the reference.

    Args:
        layer: the decoder layer.
        work: what the layers share.
        place: the number of the layer, and whether it is the last.
        hidden: its input, ``[rows, time, hidden]``; of the policy.
        args, kw: what the model hands to the layer beside.

    Returns:
        What the layer returns. The last one of a fused pass returns the reference's rows behind
        the policy's.
    """
    forward = type(layer).forward
    if not (work.running and torch.is_grad_enabled()):
        return forward(layer, hidden, *args, **kw)
    wraps: list[type] = []

    def call(states: Tensor) -> Tensor:
        out = forward(layer, states, *args, **kw)
        if isinstance(out, Tensor):
            return out
        if len(out) != 1:
            raise NotImplementedError("a layer that returns more than its states")
        wraps.append(type(out))
        return out[0]  # type: ignore[no-any-return]

    number, is_last = place
    with work.keeping_weights() if work.fused else nullcontext():
        if number < work.recomputed:
            out = _recomputed(layer, work, hidden, call)
        else:
            moved = number < work.recomputed + work.moved
            # what all layers share, and what a weight of its own may be saved as a view of
            beside = chain(tree_iter((args, kw)), layer.parameters(), layer.buffers())
            with work.offload(hidden.device).layer(beside) if moved else nullcontext():
                out = call(hidden)
        work.passed()
        if work.fused:
            theirs = hidden.detach() if work.reference_state is None else work.reference_state
            with torch.no_grad(), work.turned(as_reference=True):
                work.reference_state = call(theirs)
    if work.fused and is_last:
        assert work.reference_state is not None
        out, work.reference_state = torch.cat([out, work.reference_state]), None
    return wraps[0]([out]) if wraps else out


def _recomputed(layer: Any, work: Work, hidden: Tensor, call: Call) -> Tensor:
    weights = [p for p in layer.parameters() if p.requires_grad]
    with work.offload(hidden.device).layer() if work.offloaded else nullcontext():
        out: Tensor = _Recomputed.apply(hidden, call, work, *weights)  # type: ignore[no-untyped-call]
    return out


def take_layer(layer: Any, work: Work, place: tuple[int, bool]) -> None:
    """Put our forward on one decoder layer, and the library's checkpointing of it out of the way."""
    layer.forward = partial(run_layer, layer, work, place)
    layer.gradient_checkpointing = False


def decoder_layers(causal: nn.Module) -> list[Any]:
    """Return the decoder layers of a model, in order; none where they stand in several lists."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [
        list(m)
        for m in causal.modules()
        if isinstance(m, nn.ModuleList)
        and len(m)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in m)
    ]
    return lists[0] if len(lists) == 1 else []
