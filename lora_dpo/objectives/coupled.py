"""Objectives on pairs whose loss depends on the whole batch, or on what came before it.

A batch is always a whole optimiser step, whatever the micro-batch: the trainer differentiates with
respect to the statistics of all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.objectives._maths import logistic
from lora_dpo.objectives._table import NonNegative, Positive, Share, Smoothing, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.objectives.reference_free import scaled_mean_logps
from lora_dpo.objectives.running import running_mean, with_rows
from lora_dpo.stats import PairStats

State = Mapping[str, float]
_KEPT = 0.9  # of running means and spreads, a step


def _sorted_gaps(left: Tensor, right: Tensor) -> Tensor:
    """Return i-th smallest of ``left`` minus i-th smallest of ``right``, in the rows of ``left``."""
    values, order = left.sort()
    return (values - right.sort().values)[order.argsort()]


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    couples_rows=True,
    paper="Distributional Preference Alignment of LLMs via Optimal Transport (Melnyk et al., 2024)",
    arxiv="2406.05882",
    equation="AOT on pairs",
)
def aot(stats: PairStats, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0) -> Tensor:
    """The policy's margins as a distribution are drawn above the reference's, quantile by quantile.

    ``-log s(beta * (sort(policy margins) - sort(reference margins)))``

    When to use:
        Where the distribution of margins shall rise above the reference's as a whole, and
        single pairs matter less. Steps must hold many pairs: with one it is ``dpo``.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf); 0.01 in the paper.
        label_smoothing: as in ``dpo``, in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative; a row's is that of the quantile on which its policy margin
        stands.

    Limits:
        ln 2 where the policy equals the reference; ``dpo`` for a batch of one.

    Source:
        arXiv:2406.05882.

    Differs from:
        TRL, which lists the losses in sorted order; and see ``aot_unpaired`` for its names.
    """
    policy = stats.policy_chosen_logps - stats.policy_rejected_logps
    fixed = stats.reference_chosen_logps - stats.reference_rejected_logps
    return logistic(beta * _sorted_gaps(policy, fixed), label_smoothing)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    couples_rows=True,
    paper="Distributional Preference Alignment of LLMs via Optimal Transport (Melnyk et al., 2024)",
    arxiv="2406.05882",
    equation="AOT on unpaired distributions",
)
def aot_unpaired(
    stats: PairStats, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """The log-ratios of chosen answers as a distribution are drawn above those of rejected ones.

    ``-log s(beta * (sort(logratios_chosen) - sort(logratios_rejected)))``

    When to use:
        Where good and bad answers belong to different prompts, as many of each. Steps must
        hold many of them.

    Args:
        stats: log-probs of a batch of pairs, of which the two sides need not belong together; a
            reference is required.
        beta: per nat, in (0, inf); 0.01 in the paper.
        label_smoothing: as in ``dpo``, in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative, in the rows of the chosen side.

    Limits:
        ln 2 where the policy equals the reference; ``dpo`` for a batch of one.

    Source:
        arXiv:2406.05882.

    Differs from:
        Old TRL, where it was called ``aot_pair``; the names were swapped since.
    """
    gaps = _sorted_gaps(stats.chosen_logratios, stats.rejected_logratios)
    return logistic(beta * gaps, label_smoothing)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="bounded",
    couples_rows=True,
    paper="Towards Robust Alignment of Language Models: Distributionally Robustifying DPO (Wu et al., 2024)",
    arxiv="2407.07880",
    equation="the Dr. DPO loss",
)
def dr_dpo(stats: PairStats, *, beta: Positive = 0.1, beta_prime: Positive = 1.0) -> Tensor:
    """DPO in which pairs of high loss count for less: they may be labelled wrongly.

    ``-b * log mean(exp(-dpo / b))`` over the batch

    When to use:
        Where an unknown share of pairs is labelled the wrong way round. Steps must hold many
        pairs, for the doubtful ones are found by comparison.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        beta_prime: ``b``, in (0, inf); large values give ``dpo``, small ones trust few pairs.

    Returns:
        Losses ``[batch]``, non-negative, all equal: the batch has one loss.

    Limits:
        ln 2 where the policy equals the reference.

    Source:
        arXiv:2407.07880.

    Differs from:
        The authors' code, which overflows where all losses are above some 700 (float64) or 88
        (float32) times b.
    """
    losses = logistic(beta * stats.margins)
    whole = beta_prime * (math.log(len(losses)) - torch.logsumexp(-losses / beta_prime, dim=0))
    return whole.expand(len(losses))


def _rewards_of_pairs(stats: PairStats, beta: float) -> Tensor:
    return torch.cat([beta * stats.chosen_logratios, beta * stats.rejected_logratios]).detach()


def _with_pair_rewards(state: State, stats: PairStats, *, beta: float) -> State:
    return with_rows(state, _rewards_of_pairs(stats, beta))


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    couples_rows=True,
    initial_state={"count": 0.0, "mean": 0.0},
    update=_with_pair_rewards,
    paper="Binary Classifier Optimization for Large Language Model Alignment (Jung et al., 2024)",
    arxiv="2404.04656",
    equation="the pair loss with reward shift",
)
def bco_pair_running(stats: PairStats, state: State, *, beta: Positive = 0.01) -> Tensor:
    """Binary classifications of both sides around the running mean of all rewards.

    ``-log s(beta * logratio_chosen - d) - log s(-(beta * logratio_rejected - d))``, ``d`` the mean of
    all rewards so far, this batch's included, without gradient

    When to use:
        As ``bco_pair``, where rewards of both sides drift together: their running mean is
        taken off first.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        state: number and mean of the rewards of earlier steps.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        2 ln 2 where the policy equals the reference and has always done so.

    Source:
        arXiv:2404.04656; TRL before 0.29.
    """
    shift = running_mean(state, _rewards_of_pairs(stats, beta))
    chosen, rejected = beta * stats.chosen_logratios, beta * stats.rejected_logratios
    return -logsigmoid(chosen - shift) - logsigmoid(-(rejected - shift))


def _spread(values: Tensor) -> Tensor:
    """Return the standard deviation; 0 of a single value, whose spread is not known."""
    return values.std() if len(values) > 1 else values.new_zeros(())


def _eased(state: State, values: Tensor) -> dict[str, Tensor]:
    """Return running mean and spread after a batch."""
    fresh = {"mean": values.mean(), "std": _spread(values)}
    return {name: _KEPT * state[name] + (1 - _KEPT) * value for name, value in fresh.items()}


def _after_margins(state: State, stats: PairStats, **_: float) -> State:
    return {name: float(value) for name, value in _eased(state, stats.margins).items()}


def draw(weights: Tensor, count: int) -> Tensor:
    """Return which rows a draw of ``count`` without replacement by log-weights takes, bool."""
    noise = -torch.log(torch.empty_like(weights).exponential_())  # Gumbel
    chosen = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
    chosen[(weights + noise).topk(count).indices] = True
    return chosen


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="bounded",
    couples_rows=True,
    initial_state={"mean": 0.0, "std": 1.0},
    update=_after_margins,
    paper="beta-DPO: Direct Preference Optimization with Dynamic beta (Wu et al., 2024)",
    arxiv="2407.08639",
    equation="batch-level beta with data filtering",
)
def beta_dpo(
    stats: PairStats,
    state: State,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    rho: Share = 0.2,
) -> Tensor:
    """DPO with outlying pairs left out at random, and a beta that follows the batch's margin.

    A share ``1 - rho`` of the pairs is drawn with weights ``exp(-((margin - M) / S) ** 2 / 2)``; over
    these, ``-log s(b * margin)`` with ``b = beta * (1 + alpha * (mean margin - M))``, at least 0.001.

    When to use:
        Where pairs are of mixed quality: outlying margins are left out at random, and beta
        follows the step's mean. Steps must hold many pairs.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        state: running mean M and spread S of the margins, of which a step keeps 0.9.
        beta: before adaptation, in (0, inf).
        alpha: strength of the adaptation, per nat, in [0, inf); 0.6 in the paper.
        rho: share of pairs left out, in [0, 1]; at least one pair is always kept.

    Returns:
        Losses ``[batch]``: 0 for pairs left out, and scaled so that the mean over all rows is that
        over the pairs kept.

    Limits:
        ln 2, in the mean, where the policy equals the reference.

    Source:
        arXiv:2407.08639 and its code. Rewards are reported with the unadapted beta.

    Differs from:
        The authors' code, which fails where all weights underflow and for a batch of one pair.
    """
    margins = stats.margins.detach()
    count = max(1, int(len(margins) * (1 - rho)))
    spread = max(state["std"], 1e-6)
    kept = draw(-(((margins - state["mean"]) / spread) ** 2) / 2, count)
    moved = 1 + alpha * (margins[kept].mean() - state["mean"])
    adapted = (beta * moved).clamp(min=1e-3)
    losses = logistic(adapted * stats.margins)
    return torch.where(kept, losses * (len(margins) / count), torch.zeros_like(losses))


def _mean_gaps(stats: PairStats) -> Tensor:
    return (stats.mean_chosen_logratios - stats.mean_rejected_logratios).detach()


def _after_mean_gaps(state: State, stats: PairStats, **_: float) -> State:
    return {name: float(value) for name, value in _eased(state, _mean_gaps(stats)).items()}


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=True,
    logps="mean",
    monotone=True,
    extremes="linear",
    couples_rows=True,
    initial_state={"mean": 0.0, "std": 0.0},
    update=_after_mean_gaps,
    paper="alpha-DPO: Adaptive Reward Margin is What Direct Preference Optimization Needs (Wu et al., 2024)",
    arxiv="2410.10148",
    equation="the alpha-DPO loss",
)
def alpha_dpo(
    stats: PairStats,
    state: State,
    *,
    beta: Positive = 2.5,
    alpha: NonNegative = 0.2,
    gamma_beta_ratio: NonNegative = 0.6,
) -> Tensor:
    """SimPO whose target margin is larger where policy and reference already differ.

    ``-log s(beta * (mean_logp_chosen - mean_logp_rejected - g - alpha * (q - M) / S))``, ``q`` the
    margin of log-ratios per token, standardised by its running mean and spread, without gradient

    When to use:
        As ``simpo``, where one target margin for all pairs is too coarse and a reference can
        be afforded.

    Args:
        stats: log-probs and lengths of a batch of pairs; a reference is required.
        state: running mean and spread of q, of which a step keeps 0.9.
        beta: per nat and token, in (0, inf); 2.5 or 10 in the paper.
        alpha: weight of the adaptive part, in [0, inf); 0.05 to 0.2 in the paper, 0 is ``simpo``.
        gamma_beta_ratio: ``g``, the fixed target, nats a token, in [0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``simpo`` where the policy equals the reference: q has no spread then, and adds nothing.

    Source:
        arXiv:2410.10148 and its code, which multiplies the adaptive part by beta.

    Differs from:
        The authors' code at the first step and for a batch of one pair, where it gives NaN.
    """
    gaps = _mean_gaps(stats)
    after = _eased(state, gaps)
    spread = torch.as_tensor(after["std"])
    known = spread > 0
    standardised = torch.where(
        known, (gaps - after["mean"]) / torch.where(known, spread, 1.0), torch.zeros_like(gaps)
    )
    chosen, rejected = stats.policy_mean_chosen_logps, stats.policy_mean_rejected_logps
    return logistic(beta * (chosen - rejected - gamma_beta_ratio - alpha * standardised))
