"""Other divergences than the reverse KL, and losses of other shapes, on log-ratios."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

from lora_dpo.objectives._maths import logistic, sigmoid_gap, tangent_exp, tangent_expm1
from lora_dpo.objectives._table import Interval, Positive, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.stats import PairStats

Exponent = Annotated[float, Interval(above=0.0, below=1.0, includes_upper=True)]
_PAPER = (
    "Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints (Wang et al., 2023)"
)


def forward_kl_rewards(stats: PairStats, *, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * f'(u) = -beta / u``, ``u = exp(logratio)``."""
    chosen, rejected = tangent_exp(-stats.chosen_logratios), tangent_exp(-stats.rejected_logratios)
    return -beta * chosen, -beta * rejected


def js_rewards(stats: PairStats, *, beta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * f'(u) = beta * log(2u / (1 + u))``, ``u = exp(logratio)``."""
    chosen, rejected = logsigmoid(stats.chosen_logratios), logsigmoid(stats.rejected_logratios)
    return beta * (chosen + math.log(2)), beta * (rejected + math.log(2))


def alpha_rewards(stats: PairStats, *, beta: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * f'(u) = beta * (1 - u ** -alpha) / alpha``."""
    sides = stats.chosen_logratios, stats.rejected_logratios
    chosen, rejected = (-beta / alpha * tangent_expm1(-alpha * side) for side in sides)
    return chosen, rejected


@objective(
    rewards=forward_kl_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="exponential",
    paper=_PAPER,
    arxiv="2309.16240",
    equation="Table 1, forward KL",
)
def fdpo_forward_kl(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """DPO under a forward KL constraint: mass-covering, it keeps diversity.

    ``-log s(beta * (exp(-logratio_rejected) - exp(-logratio_chosen)))``

    When to use:
        Where the variety of answers must be kept: what the reference may say is not given up.
        The loss is exponential, so watch the gradient norm.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per unit of density ratio, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference; exponential in a falling chosen log-ratio. The
        exponential is continued by its tangent beyond 60 nats in float32 and 600 in float64, so that
        a pair far away has a finite gradient that leads back.

    Source:
        arXiv:2309.16240, ``f'(u) = -1 / u``.

    Differs from:
        Every public implementation beyond some 88 nats in float32, where they give infinities.
    """
    chosen, rejected = forward_kl_rewards(stats, beta=beta)
    return logistic(chosen - rejected)


@objective(
    rewards=js_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper=_PAPER,
    arxiv="2309.16240",
    equation="Table 1, Jensen-Shannon",
)
def fdpo_js(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """DPO under a Jensen-Shannon constraint: between forward and reverse KL.

    ``-log s(beta * (log s(logratio_chosen) - log s(logratio_rejected)))``

    When to use:
        Between ``dpo`` and ``fdpo_forward_kl``, without exponentials: the reward of an answer
        is bounded above.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference. The reward of a side is bounded above by
        ``beta * ln 2``, so chosen answers are not pushed up for ever.

    Source:
        arXiv:2309.16240, ``f'(u) = log(2u / (1 + u))``.
    """
    chosen, rejected = js_rewards(stats, beta=beta)
    return logistic(chosen - rejected)


@objective(
    rewards=alpha_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="exponential",
    paper=_PAPER,
    arxiv="2309.16240",
    equation="Table 1, alpha-divergence",
)
def fdpo_alpha(stats: PairStats, *, beta: Positive = 0.1, alpha: Exponent = 0.5) -> Tensor:
    """DPO under an alpha-divergence: from reverse KL (alpha to 0) to forward KL (alpha 1).

    ``-log s(beta * (exp(-alpha * logratio_rejected) - exp(-alpha * logratio_chosen)) / alpha)``

    When to use:
        Where something between ``dpo`` (small alpha) and ``fdpo_forward_kl`` (alpha 1) is
        wanted.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: as in ``dpo`` for small alpha, in (0, inf).
        alpha: the divergence, in (0, 1].

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference; ``dpo`` as alpha goes to 0. Exponentials are
        continued as in ``fdpo_forward_kl``.

    Source:
        arXiv:2309.16240, ``f'(u) = (1 - u ** -alpha) / alpha``, with the authors' alpha.

    Differs from:
        TRL 0.29 and later, whose coefficient is 1 - alpha of the authors' code.
    """
    chosen, rejected = alpha_rewards(stats, beta=beta, alpha=alpha)
    return logistic(chosen - rejected)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="linear",
    paper="Discovering Preference Optimization Algorithms with and for Large Language Models (Lu et al., 2024)",
    arxiv="2406.08414",
    equation="DiscoPOP (LRML)",
)
def discopop(stats: PairStats, *, beta: Positive = 0.05, tau: Exponent = 0.05) -> Tensor:
    """Blend of logistic and exponential loss, found by a language model.

    ``(1 - m) * -log s(z) + m * exp(-z)``, ``z = beta * margin``, ``m = s(z / tau)``

    When to use:
        To try a loss that was found by search. It is not convex: hold it against ``dpo`` on
        held-out pairs.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf); 0.05 in the paper.
        tau: temperature of the blend, in (0, 1]; 0.05 in the paper.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``(ln 2 + 1) / 2`` where the policy equals the reference. It is not convex, and has a local
        least value at a slightly negative margin.

    Source:
        arXiv:2406.08414, log-ratio modulated loss.

    Differs from:
        Public implementations below z = -88 in float32, where they give NaN.
    """
    z = beta * stats.margins
    return sigmoid(-z / tau) * -logsigmoid(z) + sigmoid_gap(z, 1 / tau)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="logarithmic",
    paper="RainbowPO: A Unified Framework for Combining Preference Optimization (Zhao et al., 2024)",
    arxiv="2410.04203",
    equation="the Cauchy link",
)
def cauchy(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """Preferences with Cauchy noise in place of logistic noise: outliers pull little.

    ``-log(atan(beta * margin) / pi + 1/2)``

    When to use:
        Where some pairs are outliers or wrongly labelled and their share is unknown: a wrong
        margin pulls only with its logarithm.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference; ``log(pi * beta * |margin|)`` as the margin goes to
        minus infinity.

    Source:
        arXiv:2410.04203 and its code.
    """
    z = beta * stats.margins
    return -torch.log(torch.atan2(torch.ones_like(z), -z) / math.pi)
