"""Functions that the objectives share, finite with finite gradients over the whole domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Above these, exp is continued by its tangent; products of a few such values still fit the type.
_EXP_CUTS = {torch.float32: 60.0, torch.float64: 600.0}
# Log-probs nearer to 0 count as these: the odds of a certain completion have no logarithm.
_CERTAIN = {torch.float32: -1e-30, torch.float64: -1e-300}


def logistic(z: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return ``-(1 - smoothing) * log sigmoid(z) - smoothing * log sigmoid(-z)``."""
    loss = -logsigmoid(z)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * logsigmoid(-z)


def tangent_exp(x: Tensor) -> Tensor:
    """Return ``exp(x)``, continued by its tangent beyond 60 (float32) or 600 (float64)."""
    return tangent_expm1(x) + 1


def tangent_expm1(x: Tensor) -> Tensor:
    """Return ``exp(x) - 1`` without loss of digits near 0, continued as ``tangent_exp``."""
    cut = _EXP_CUTS[x.dtype]
    return torch.expm1(x.clamp(max=cut)) + math.exp(cut) * (x - cut).clamp(min=0)


def log1mexp(x: Tensor) -> Tensor:
    """Return ``log(1 - exp(x))`` for ``x < 0``, with all digits of value and gradient."""
    near = x > -math.log(2)
    # both arms get arguments that they are exact for, so that neither sends NaN backwards
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -torch.ones_like(x))))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(x), x)))
    return torch.where(near, by_expm1, by_log1p)


def log_odds(mean_logps: Tensor) -> Tensor:
    """Return ``log(p / (1 - p))`` of ``p = exp(mean_logps)``; finite for a certain completion."""
    below = mean_logps.clamp(max=_CERTAIN[mean_logps.dtype])
    return below - log1mexp(below)


def sigmoid_gap(z: Tensor, rate: float) -> Tensor:
    """Return ``exp(log sigmoid(rate * z) - z)``, for ``rate >= 1``: no factor overflows."""
    return torch.exp(logsigmoid(rate * z) - z)
