"""LoRA on a frozen linear layer as one function: the low-rank product is added in place.

peft's forward writes the base's result, copies it, scales the product and adds: three tensors of the
output's size for one. Here backward keeps the input alone, and the weight is made plain when needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_dpo.layers.work import Work
from lora_dpo.policy import REFERENCE


@dataclass(frozen=True)
class Part:
    """A frozen linear layer and the adapter that acts on it at this moment."""

    base: Any
    work: Work
    down: Tensor | None = None  # [rank, inputs]
    up: Tensor | None = None  # [outputs, rank]
    scale: float = 1.0

    def dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of computation: the layer's own, autocast's, or the input's."""
        own = getattr(self.base, "compute_dtype", None)
        if own is not None:
            return own  # type: ignore[no-any-return]
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W' + b + scale x A' B'`` of flat rows, ``[tokens, outputs]``."""
        weight, bias = self.work.weight(self.base).to(x.dtype), self.base.bias
        y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        if self.down is not None and self.up is not None:
            low = x @ self.down.to(x.dtype).t()
            y.addmm_(low, self.up.to(x.dtype).t(), alpha=self.scale)
        return y

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the two factors, in their own dtype."""
        if self.down is None or self.up is None:
            return None, None
        down, up = self.down.to(g.dtype), self.up.to(g.dtype)
        of_up = (g.t() @ (x @ down.t())).to(self.up.dtype).mul_(self.scale)
        of_down = ((g @ up).t() @ x).to(self.down.dtype).mul_(self.scale)
        return of_down, of_up

    def backward(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """Return the gradient of the input, added to ``into`` where that is given."""
        weight = self.work.weight(self.base).to(g.dtype)
        total = g @ weight if into is None else into.addmm_(g, weight)
        if self.down is not None and self.up is not None:
            total.addmm_(g @ self.up.to(g.dtype), self.down.to(g.dtype), alpha=self.scale)
        return total


def shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """Return rows, ``[tokens, width]``, behind the dimensions of ``x``; no view, to autograd.

    A model may change in place what a layer returns (Gemma 3n does), which autograd refuses of a view.
    """
    found: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return found


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor | None, up: Tensor | None, part: Part) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.part, ctx.dtype = part, part.dtype(x)
        ctx.save_for_backward(x)
        y = part.forward(flat.to(ctx.dtype))
        return shaped_as(x, y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1]).to(ctx.dtype)
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        of_down, of_up = ctx.part.gradients(flat, g)
        of_x = ctx.part.backward(g).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, of_down, of_up, None


def lora_linear(module: Any, work: Work, original: Any, x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """Return a LoRA layer's output; outside a batch of ours, by the library's own forward."""
    if not work.running or args or kw:
        out: Tensor = original(x, *args, **kw)
        return out
    part = part_of(module, work)
    y: Tensor = _LoraLinear.apply(x, part.down, part.up, part)  # type: ignore[no-untyped-call]
    return y


def part_of(module: Any, work: Work) -> Part:
    """Return a linear layer with the adapter that is active on it now, if any."""
    if not isinstance(module, LoraLayer):
        return Part(module, work)
    layer: Any = module
    if work.as_reference:
        name = REFERENCE if REFERENCE in layer.lora_A else None
    else:
        name = None if layer.disable_adapters else layer.active_adapters[0]
    if name is None or name not in layer.lora_A:
        return Part(layer.get_base_layer(), work)
    factors = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    return Part(layer.get_base_layer(), work, *factors, layer.scaling[name])


def obstacle(module: Any) -> str:
    """Return why a linear layer, with or without LoRA, keeps the library's forward; or nothing."""
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if type(base) is not nn.Linear and type(base).__name__ != "Linear4bit":
        return f"{type(base).__name__} layers"
    if any(p.requires_grad for p in base.parameters(recurse=False)):
        return "layers that are trained whole"
    for part in (module, base):
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return "layers with hooks"
    if not isinstance(module, LoraLayer):
        return ""
    layer: Any = module
    if any(getattr(d, "p", 0.0) > 0 for d in layer.lora_dropout.values()):
        return "LoRA dropout"
    if layer.lora_variant:
        return "DoRA"
    if any(layer.lora_bias.values()):
        return "LoRA biases"
    if layer.merged or len(layer.active_adapters) != 1:
        return "merged or several adapters"
    return ""


def take_linear(module: Any, work: Work) -> None:
    """Put our forward on one LoRA layer."""
    module.forward = partial(lora_linear, module, work, module.forward)
