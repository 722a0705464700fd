"""A frozen norm that keeps its input as it came, and no float32 copy of it, until backward.

The libraries' root-mean-square norms compute in float32, and autograd keeps what they compute: twice the
bytes of the input that the residual stream holds anyhow. Backward norms it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import rms_norm

from lora_dpo.layers.work import Work

Norm = Callable[[Tensor], Tensor]
_SAMPLE = 4  # rows on which a norm is compared with torch's
_FEW = 2**21  # numbers that are normed again at one time, where that takes several kernels
_ALL = 2**62


class _KeepsItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, rows: int) -> Tensor:
        device = x.device.type
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.norm, ctx.rows = norm, rows
        ctx.save_for_backward(x)
        return norm(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        flat, g = (value.reshape(-1, x.shape[-1]) for value in (x, upstream))
        device, enabled, dtype = ctx.autocast
        of_x = []
        for part, of_part in zip(flat.split(ctx.rows), g.split(ctx.rows), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
                out = ctx.norm(leaf)
            of_x += torch.autograd.grad(out, leaf, of_part)
        whole = torch.cat(of_x) if len(of_x) > 1 else of_x[0]
        return whole.view(x.shape), None, None


def frozen_norm(
    module: Any, work: Work, original: Norm, eps: float | None, x: Tensor, *args: Any, **kw: Any
) -> Tensor:
    """Return the norm of ``x``; outside a batch of ours, by the library's own forward."""
    if not work.running or args or kw:
        return original(x, *args, **kw)
    norm, rows = original, max(_FEW // x.shape[-1], 1)
    if eps is not None and x.dtype == module.weight.dtype and _has_kernel(x):
        norm, rows = partial(_fused, module.weight, eps), _ALL
    if not (torch.is_grad_enabled() and x.requires_grad):
        return norm(x)
    out: Tensor = _KeepsItsInput.apply(x, norm, rows)  # type: ignore[no-untyped-call]
    return out


def _has_kernel(x: Tensor) -> bool:
    """Whether torch norms on this device in one kernel; elsewhere the library's steps are as good."""
    return x.is_cuda


def _fused(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """Norm in the dtype of ``x``, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, weight.shape, weight, eps)


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of rows by themselves, with nothing that is trained or hooked.

    torch's own norms keep no more than their input as they are.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    frozen = not any(p.requires_grad or p.dim() > 1 for p in module.parameters())
    kind = type(module)
    named = kind.__name__.endswith("Norm") and not kind.__module__.startswith("torch.")
    return named and frozen and not hooked and not list(module.children())


@torch.no_grad()
def epsilon_of(module: Any) -> float | None:
    """Return what a norm adds to the mean square, if it computes what ``rms_norm`` does; else None.

    That is found by its values, in float32: on random rows, of which one is so small that epsilon
    counts.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if isinstance(weight, FakeTensor) or weight.is_meta:
        return None  # it has no values
    rows = torch.linspace(-2, 3, _SAMPLE * len(weight), device=weight.device).sin()
    rows = (
        rows.view(_SAMPLE, -1)
        * torch.tensor([1.0, 30.0, eps**0.5, 1.0], device=weight.device)[:, None]
    )
    try:
        found = module(rows)
        expected = rms_norm(rows, weight.shape, weight.float(), eps)
        return eps if torch.allclose(found, expected, rtol=1e-4, atol=1e-5) else None
    except Exception:  # whatever a norm of another kind says to it
        return None


def take_norm(module: Any, work: Work) -> None:
    """Put our forward on one norm."""
    eps = epsilon_of(module)
    module.forward = partial(frozen_norm, module, work, module.forward, eps)
