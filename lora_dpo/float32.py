"""A 16-bit model that computes in float32 for a while, without a float32 copy of its weights.

What is compared there is the mathematics and not its rounding: a merge with the policy, the fast layers
with the library's. A 4-bit weight is made plain in the model's own dtype, as it is in training; large 16-bit
ones are made float32 a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_dpo.heads import IN_FLOAT32, causal_lm
from lora_dpo.policy import plain_weight, quant_state

BLOCK = 2**22  # elements of a weight that are float32 at one time
HALVES = (torch.bfloat16, torch.float16)


def computes_in_float32(model: nn.Module) -> bool:
    """Whether ``float32_compute`` can do so: no weight elsewhere, dealt out, or of 8-bit kernels."""
    return all(
        weight.device.type != "meta" and type(weight).__name__ not in ("DTensor", "Int8Params")
        for weight in causal_lm(model).parameters()
    )


@contextmanager
def float32_compute(model: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block, with the weights that the model's own dtype makes of them.

    Everything is put back bit for bit.
    """
    causal = causal_lm(model)
    with ExitStack() as undone:
        undone.enter_context(_set(causal, IN_FLOAT32, True))
        undone.enter_context(_no_tf32())
        for module in causal.modules():
            if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
                undone.enter_context(_set(module, "compute_dtype", torch.float32))
            large = _is_large(module)
            if large:
                own = _looked_up if isinstance(module, nn.Embedding) else _times
                undone.enter_context(_set(module, "forward", partial(own, module, module.forward)))
            for name, parameter in module.named_parameters(recurse=False):
                if _is_half(parameter) and not (large and name == "weight"):
                    undone.enter_context(_widened(parameter))
        yield


def _is_large(module: Any) -> bool:
    """Whether a module's weight is frozen, of 16 bits or 4 that become so, and read by us in its stead."""
    if type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer"):  # peft's own
        state = quant_state(module)
        return state is not None and state.dtype in HALVES
    alone = type(module) is nn.Linear and "forward" not in vars(module)  # nobody fetches its weight
    if not alone and not isinstance(module, nn.Embedding):
        return False
    return _is_half(module.weight) and not module.weight.requires_grad


def _is_half(parameter: nn.Parameter) -> bool:
    """Whether these are floats of 16 bits; packed 4-bit weights can be stored as such."""
    return parameter.dtype in HALVES and type(parameter).__name__ != "Params4bit"


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


@contextmanager
def _widened(parameter: nn.Parameter) -> Iterator[None]:
    kind = parameter.dtype
    parameter.data = parameter.data.float()
    try:
        yield
    finally:
        parameter.data = parameter.data.to(kind)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Multiply float32 matrices on a card in float32, whatever is set for training."""
    backend: Any = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _looked_up(module: nn.Module, forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return forward(ids).float()


def _times(module: Any, forward: Any, x: Tensor) -> Tensor:
    y: Tensor = _InBlocks.apply(x.float(), module)  # type: ignore[no-untyped-call]
    return y


class _InBlocks(torch.autograd.Function):
    """``x W' + b`` of float32 rows and a frozen weight, some of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module, weight = module, plain_weight(module)
        y = x.new_empty(*x.shape[:-1], len(weight))
        for rows in _blocks(weight):
            own = None if module.bias is None else module.bias[rows].float()
            y[..., rows] = linear(x, weight[rows].float(), own)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        weight = plain_weight(ctx.module)
        total = g.new_zeros(*g.shape[:-1], weight.shape[1])
        for rows in _blocks(weight):
            total += g[..., rows] @ weight[rows].float()
        return total, None


def _blocks(weight: Tensor) -> list[slice]:
    height = max(1, BLOCK // weight.shape[1])
    return [slice(start, start + height) for start in range(0, len(weight), height)]
