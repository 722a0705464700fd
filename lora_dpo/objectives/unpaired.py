"""Objectives on single answers with a thumb up or down."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

from lora_dpo.objectives._table import NonNegative, Positive, Share, objective
from lora_dpo.objectives.running import running_mean, with_rows
from lora_dpo.stats import LabelledStats

State = Mapping[str, float]
_KTO = "KTO: Model Alignment as Prospect Theoretic Optimization (Ethayarajh et al., 2024)"


def labelled_rewards(stats: LabelledStats, *, beta: float, **_: float) -> tuple[Tensor]:
    """Implicit rewards ``beta * logratio`` of the rows."""
    return (beta * stats.logratios,)


def _weighed(stats: LabelledStats, wanted: Tensor, unwanted: Tensor) -> Tensor:
    return torch.where(stats.labels, wanted, unwanted)


@objective(
    rewards=labelled_rewards,
    data="unpaired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="bounded",
    needs=("mismatched",),
    couples_rows=True,
    paper=_KTO,
    arxiv="2402.01306",
    equation="the KTO loss",
)
def kto(
    stats: LabelledStats,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """Wanted answers are drawn above a baseline and unwanted ones below it, each with its weight.

    ``w_d * (1 - s(beta * (logratio - z0)))`` of wanted rows, ``w_u * (1 - s(beta * (z0 - logratio)))``
    of the others; ``z0`` is the mean log-ratio of mismatched completions over the batch, at least 0,
    without gradient: an estimate of the KL to the reference.

    When to use:
        Thumbs up and down without pairs, in unequal numbers too. Rows far on the wrong side
        pull little.

    Args:
        stats: log-probs, labels, and log-probs of mismatched completions; a reference is required.
        beta: per nat, in (0, inf).
        desirable_weight: of wanted rows, in [0, inf). Without weights of yours the trainer balances
            unequal classes: the rarer one gets larger / smaller.
        undesirable_weight: of unwanted rows, in [0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        Half the row's weight where the policy equals the reference; gradients vanish far from the
        baseline. With equal weights and shares the optimum lies at infinity, not at a finite policy.

    Source:
        arXiv:2402.01306.

    Differs from:
        TRL and HALOs in the batch: z0 is over the whole optimiser step, so micro-batch 1 works and
        gradient accumulation changes nothing.
    """
    baseline = stats.mismatched_logratios.mean().clamp(min=0).detach()
    above = beta * (stats.logratios - baseline)
    return _weighed(stats, desirable_weight * sigmoid(-above), undesirable_weight * sigmoid(above))


def _eased_logratio(
    state: State, stats: LabelledStats, *, decay: float, **_: float
) -> dict[str, float]:
    mean = float(stats.logratios.double().mean())
    return {
        "sum": decay * state["sum"] + (1 - decay) * mean,
        "weight": decay * state["weight"] + (1 - decay),
    }


@objective(
    rewards=labelled_rewards,
    data="unpaired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="bounded",
    initial_state={"sum": 0.0, "weight": 0.0},
    update=_eased_logratio,
    paper=_KTO,
    arxiv="2402.01306",
    equation="the KTO loss with a running baseline",
)
def kto_running(
    stats: LabelledStats,
    state: State,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    decay: Share = 0.9,
) -> Tensor:
    """KTO whose baseline is the running mean of the rows' own log-ratios: no further forward pass.

    As ``kto``, with ``z0 = max(0, running mean of logratio over earlier steps)``

    When to use:
        As ``kto``, at two thirds of its cost: the baseline needs no forward pass of its own.

    Args:
        stats: log-probs and labels; a reference is required.
        state: the running sum and its weight, which corrects for the first steps.
        beta: per nat, in (0, inf).
        desirable_weight: of wanted rows, in [0, inf), as in ``kto``.
        undesirable_weight: of unwanted rows, in [0, inf).
        decay: share of the running mean that a step keeps, in [0, 1].

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        Half the row's weight where the policy equals the reference.

    Source:
        arXiv:2402.01306, with the baseline of BCO (arXiv:2404.04656) in place of the estimated KL. It
        costs a third less than ``kto``, and is no estimate of the KL: unwanted rows pull it down.
    """
    mean = state["sum"] / state["weight"] if state["weight"] else 0.0
    above = beta * (stats.logratios - max(mean, 0.0))
    return _weighed(stats, desirable_weight * sigmoid(-above), undesirable_weight * sigmoid(above))


def _with_rewards(state: State, stats: LabelledStats, *, beta: float, **_: float) -> State:
    return with_rows(state, beta * stats.logratios.detach())


@objective(
    rewards=labelled_rewards,
    data="unpaired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    couples_rows=True,
    initial_state={"count": 0.0, "mean": 0.0},
    update=_with_rewards,
    paper="Binary Classifier Optimization for Large Language Model Alignment (Jung et al., 2024)",
    arxiv="2404.04656",
    equation="the BCO loss with reward shift",
)
def bco(
    stats: LabelledStats,
    state: State,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """A binary classifier of thumbs, whose logit is the reward less the running mean of rewards.

    ``-log s(beta * logratio - d)`` of wanted rows, ``-log s(-(beta * logratio - d))`` of the others;
    ``d`` is the mean of all rewards so far, this batch's included, without gradient

    When to use:
        Thumbs up and down, where rows far on the wrong side shall keep their pull.

    Args:
        stats: log-probs and labels; a reference is required.
        state: number and mean of the rewards of earlier steps.
        beta: per nat, in (0, inf).
        desirable_weight: of wanted rows, in [0, inf), as in ``kto``.
        undesirable_weight: of unwanted rows, in [0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 times the weight where the policy equals the reference and has always done so.

    Source:
        arXiv:2404.04656; its importance weights from a classifier of prompts (UDM) are not offered.

    Differs from:
        TRL, which keeps the running mean in float32 and has no class weights.
    """
    shift = running_mean(state, beta * stats.logratios.detach())
    logits = beta * stats.logratios - shift
    return _weighed(
        stats, -desirable_weight * logsigmoid(logits), -undesirable_weight * logsigmoid(-logits)
    )


@objective(
    rewards=labelled_rewards,
    data="unpaired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="bounded",
    paper="Anchored Preference Optimization and Contrastive Revisions (D'Oosterlinck et al., 2024)",
    arxiv="2408.06266",
    equation="APO-zero on single answers",
)
def apo_zero_unpaired(
    stats: LabelledStats,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Tensor:
    """KTO with the reference itself for a baseline: wanted rows above it, unwanted below.

    ``w_d * (1 - s(beta * logratio))`` of wanted rows, ``w_u * s(beta * logratio)`` of the others

    When to use:
        Thumbs up and down, where wanted answers are better than the model's own: the
        reference itself is the baseline.

    Args:
        stats: log-probs and labels; a reference is required.
        beta: per nat, in (0, inf).
        desirable_weight: of wanted rows, in [0, inf), as in ``kto``.
        undesirable_weight: of unwanted rows, in [0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        Half the row's weight where the policy equals the reference.

    Source:
        arXiv:2408.06266, as TRL's KTO trainer has it.
    """
    logits = beta * stats.logratios
    return _weighed(
        stats, desirable_weight * sigmoid(-logits), undesirable_weight * sigmoid(logits)
    )
