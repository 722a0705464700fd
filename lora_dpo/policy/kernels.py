"""Whether the 4-bit kernels of this machine are right: a real weight there and back."""

from __future__ import annotations

from typing import Any

import torch

from lora_dpo.policy.bases import default_device, guard_cpu_kernels, import_bitsandbytes

SIDE = 128


def nf4_round_trip(device: torch.device | None = None) -> float:
    """Return the relative error (rms) of a random weight in NF4; some 0.09 where all is well."""
    import_bitsandbytes()
    from bitsandbytes import functional

    weight = _weight(device or default_device())
    stored, state = functional.quantize_4bit(weight, quant_type="nf4")
    back = functional.dequantize_4bit(stored, state)
    return float((back - weight).norm() / weight.norm())


def nf4_layer_error(device: torch.device | None = None) -> float:
    """Return how far a 4-bit layer's gradient is from that of its dequantised weight (relative).

    An evaluation goes first, since on some CPUs that is what rewrites an unguarded layer.
    """
    bitsandbytes = import_bitsandbytes()
    from bitsandbytes import functional

    device = device or default_device()
    weight = _weight(device)
    layer = bitsandbytes.nn.Linear4bit(
        SIDE, SIDE, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    guard_cpu_kernels(layer)
    plain = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = _weight(device, seed=1)[:4].requires_grad_()
    with torch.no_grad():
        layer.eval()(x)
    (found,) = torch.autograd.grad(layer.train()(x).square().sum(), x)
    (expected,) = torch.autograd.grad((x @ plain.T).square().sum(), x)
    return float((found - expected).norm() / expected.norm())


def _weight(device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIDE, SIDE, generator=generator).to(device)


def repacks_on_cpu() -> bool:
    """Whether bitsandbytes would rewrite unguarded 4-bit layers on this machine's CPU."""
    functional: Any = import_bitsandbytes().functional
    return not torch.cuda.is_available() and bool(functional.has_avx512bf16())
