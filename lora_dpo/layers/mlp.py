"""A gated MLP with LoRA on its projections as one function that keeps its input, gate and up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.layers.linear import Part, obstacle, part_of
from lora_dpo.layers.work import Work

NAMES = ("gate_proj", "up_proj", "down_proj")


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Callable[[Tensor], Tensor],
        parts: tuple[Part, Part, Part],
        *factors: Tensor | None,
    ) -> Tensor:
        gating, raising, last = parts
        ctx.dtype = gating.dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        gate, up = gating.forward(flat), raising.forward(flat)
        if last.work.recomputing and last.work.skips_last:
            # Nothing in the layer's backward reads this value. Should a model do so all the same,
            # it reads no numbers, and the proof before training sees that.
            y = flat.new_full((len(flat), last.base.out_features), torch.nan)
        else:
            active = activation(gate)
            y = last.forward(active * up if active is gate else active.mul_(up))
        ctx.parts, ctx.activation, ctx.shape, ctx.of = parts, activation, x.shape, x.dtype
        ctx.save_for_backward(flat, gate, up)
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        flat, gate, up = ctx.saved_tensors
        gating, raising, last = ctx.parts
        g = upstream.reshape(-1, upstream.shape[-1]).to(ctx.dtype)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        of_last = last.gradients(active.detach() * up, g)
        of_hidden = last.backward(g)
        of_up = of_hidden * active.detach()
        (of_gate,) = torch.autograd.grad(active, leaf, of_hidden.mul_(up))
        factors = [*gating.gradients(flat, of_gate), *raising.gradients(flat, of_up), *of_last]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = raising.backward(of_up, into=gating.backward(of_gate))
            of_x = of_x.view(ctx.shape).to(ctx.of)
        return of_x, None, None, *factors


def gated_mlp(module: Any, work: Work, original: Any, x: Tensor) -> Tensor:
    """Return the MLP's output; outside a batch of ours, by the library's own forward."""
    if not work.running:
        out: Tensor = original(x)
        return out
    gating, raising, last = (part_of(getattr(module, name), work) for name in NAMES)
    factors = (gating.down, gating.up, raising.down, raising.up, last.down, last.up)
    y: Tensor = _GatedMlp.apply(x, module.act_fn, (gating, raising, last), *factors)  # type: ignore[no-untyped-call]
    return y


def is_gated(module: nn.Module) -> bool:
    """Whether a module is ``down(act(gate(x)) * up(x))`` on layers that we can run."""
    parts = [getattr(module, name, None) for name in NAMES]
    if any(part is None or obstacle(part) for part in parts):
        return False
    children = {name for name, _ in module.named_children()}
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return (
        callable(getattr(module, "act_fn", None)) and not hooked and children <= {*NAMES, "act_fn"}
    )


def take_mlp(module: Any, work: Work) -> None:
    """Put our forward on one MLP."""
    module.forward = partial(gated_mlp, module, work, module.forward)
