"""Objectives that read how much better an answer is: the scores of the data, not only their order."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

from lora_dpo.objectives._maths import logistic
from lora_dpo.objectives._table import Interval, NonNegative, Positive, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.stats import PairStats

Weight = Annotated[float, Interval(above=0.0, below=1.0, includes_upper=True)]
_REWARD_AWARE = "Reward-aware Preference Optimization (Sun et al., 2025)"


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("scores",),
    paper="Direct Preference Optimization with an Offset (Amini et al., 2024)",
    arxiv="2402.10571",
    equation="the ODPO loss with f = log",
)
def odpo(stats: PairStats, *, beta: Positive = 0.1, alpha: Positive = 1.0) -> Tensor:
    """DPO with an offset: the better the chosen answer, the larger its margin must be.

    ``-log s(beta * margin - alpha * log(score_chosen - score_rejected))``

    When to use:
        Where the data hold scores and a pair that is hardly decided shall ask for less than a
        clear one.

    Args:
        stats: log-probs and scores of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        alpha: weight of the offset, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        0 as the difference of the scores goes to 0: a pair whose scores do not put chosen first asks
        for nothing, and one whose scores contradict its labels is treated alike.

    Source:
        arXiv:2402.10571 and its code.
    """
    offsets = alpha * torch.log(stats.score_gaps.clamp(min=0))
    return logistic(beta * stats.margins - offsets)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("scores",),
    paper="Llama 2: Open Foundation and Fine-Tuned Chat Models (Touvron et al., 2023), its margin",
    arxiv="2307.09288",
    equation="Eq. 2, on implicit rewards",
)
def dpo_margin(stats: PairStats, *, beta: Positive = 0.1, eta: NonNegative = 1.0) -> Tensor:
    """DPO whose margin must exceed the difference of the scores.

    ``-log s(beta * margin - eta * (score_chosen - score_rejected))``

    When to use:
        Where the data hold scores on the scale of a reward: the policy's margin must exceed
        their difference.

    Args:
        stats: log-probs and scores of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        eta: from scores to rewards, in [0, inf); 0 is ``dpo``.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``-log s(-eta * gap)`` where the policy equals the reference.

    Source:
        The margin of reward models in arXiv:2307.09288 Eq. 2, put into DPO (turbo-alignment).
    """
    return logistic(beta * stats.margins - eta * stats.score_gaps)


def modpo_rewards(stats: PairStats, *, beta: float, weight: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards of the labels' objective: ``(beta * logratio - (1 - w) * score) / w``."""
    chosen = beta * stats.chosen_logratios - (1 - weight) * stats.chosen_scores
    rejected = beta * stats.rejected_logratios - (1 - weight) * stats.rejected_scores
    return chosen / weight, rejected / weight


@objective(
    rewards=modpo_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("scores",),
    paper="Beyond One-Preference-Fits-All Alignment: Multi-Objective DPO (Zhou et al., 2023)",
    arxiv="2310.03708",
    equation="the MODPO loss with two objectives",
)
def modpo(stats: PairStats, *, beta: Positive = 0.1, weight: Weight = 0.5) -> Tensor:
    """DPO on one of two objectives, the other being in the scores.

    ``-log s((beta * margin - (1 - w) * (score_chosen - score_rejected)) / w)``

    When to use:
        Where there are two aims: the labels are of one, the scores are the other's reward
        model, and ``weight`` trades them.

    Args:
        stats: log-probs of a batch of pairs, and scores by the other objective's reward model; a
            reference is required.
        beta: as in ``dpo``, in (0, inf).
        weight: ``w``, of the objective that the labels are of, in (0, 1]; 1 is ``dpo``.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``-log s(-(1 - w) / w * gap)`` where the policy equals the reference.

    Source:
        arXiv:2310.03708 and its code.
    """
    chosen, rejected = modpo_rewards(stats, beta=beta, weight=weight)
    return logistic(chosen - rejected)


def rebel_rewards(stats: PairStats, *, eta: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``logratio / eta``: the scale of the scores."""
    return stats.chosen_logratios / eta, stats.rejected_logratios / eta


@objective(
    rewards=rebel_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="quadratic",
    needs=("scores",),
    paper="REBEL: Reinforcement Learning via Regressing Relative Rewards (Gao et al., 2024)",
    arxiv="2404.16767",
    equation="the regression of relative rewards",
)
def rebel(stats: PairStats, *, eta: Positive = 1.0) -> Tensor:
    """Regression of the margin on the difference of the scores.

    ``(margin - eta * (score_chosen - score_rejected)) ** 2``

    When to use:
        Where scores are rewards, and the policy shall follow them by a finite step; several
        rounds, each from the last policy, make the method of its paper.

    Args:
        stats: log-probs and scores of a batch of pairs; a reference is required.
        eta: nats for a unit of score, in (0, inf): the step from reference to optimum.

    Returns:
        Losses ``[batch]``, nats squared, non-negative.

    Limits:
        0 at ``policy = reference * exp(eta * score) / Z``.

    Source:
        arXiv:2404.16767 and its code, which scales by eta; there the reference is the policy of the
        iteration before.
    """
    return (stats.margins - eta * stats.score_gaps) ** 2


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="linear",
    needs=("scores",),
    paper=_REWARD_AWARE,
    arxiv="2502.00203",
    equation="backward KL",
)
def rpo_bwd_kl(stats: PairStats, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    """KL from the preference that the scores imply to the policy's.

    ``KL(Bernoulli(s(eta * gap)) || Bernoulli(s(beta * margin)))``, gap being that of the scores

    When to use:
        Where the policy shall prefer as strongly as the scores do, and no more.

    Args:
        stats: log-probs and scores of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        eta: from scores to rewards, in (0, inf).

    Returns:
        Losses ``[batch]``, nats, non-negative.

    Limits:
        0 at ``beta * margin = eta * gap``.

    Source:
        arXiv:2502.00203 (NeMo-Aligner's ``rpo_bwd_kl``).
    """
    z, target = beta * stats.margins, eta * stats.score_gaps
    right = sigmoid(target) * (logsigmoid(target) - logsigmoid(z))
    return right + sigmoid(-target) * (logsigmoid(-target) - logsigmoid(-z))


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="bounded",
    needs=("scores",),
    paper=_REWARD_AWARE,
    arxiv="2502.00203",
    equation="forward KL",
)
def rpo_fwd_kl(stats: PairStats, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    """KL from the policy's preference to the one that the scores imply.

    ``KL(Bernoulli(s(beta * margin)) || Bernoulli(s(eta * gap)))``

    When to use:
        As ``rpo_bwd_kl``, where pairs far on the wrong side shall pull little.

    Args:
        stats: log-probs and scores of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        eta: from scores to rewards, in (0, inf).

    Returns:
        Losses ``[batch]``, nats, non-negative.

    Limits:
        0 at ``beta * margin = eta * gap``; bounded as the margin goes to minus infinity.

    Source:
        arXiv:2502.00203 (NeMo-Aligner's ``rpo_fwd_kl``).
    """
    z, target = beta * stats.margins, eta * stats.score_gaps
    right = sigmoid(z) * (logsigmoid(z) - logsigmoid(target))
    return right + sigmoid(-z) * (logsigmoid(-z) - logsigmoid(-target))


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="quadratic",
    needs=("scores",),
    paper=_REWARD_AWARE,
    arxiv="2502.00203",
    equation="squared distance",
)
def rpo_sq(stats: PairStats, *, beta: Positive = 0.1, eta: Positive = 1.0) -> Tensor:
    """Squared distance of the implicit reward's margin from that of the scores.

    ``(beta * margin - eta * (score_chosen - score_rejected)) ** 2``

    When to use:
        As ``rpo_bwd_kl``, where pairs far from their target shall pull most.

    Args:
        stats: log-probs and scores of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        eta: from scores to rewards, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        0 at ``beta * margin = eta * gap``.

    Source:
        arXiv:2502.00203 (NeMo-Aligner's ``rpo_sq``).
    """
    return (beta * stats.margins - eta * stats.score_gaps) ** 2


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="quadratic",
    needs=("scores",),
    paper="Self-Play Preference Optimization for Language Model Alignment (Wu et al., 2024)",
    arxiv="2405.00675",
    equation="the loss of the algorithm",
)
def sppo(stats: PairStats, *, beta: Positive = 1e-3) -> Tensor:
    """Each side's log-ratio is drawn to a target set by its win rate.

    ``((logratio_chosen - (p_chosen - 1/2) / beta) ** 2
    + (logratio_rejected - (p_rejected - 1/2) / beta) ** 2) / 2``

    When to use:
        Where each prompt has several sampled answers, and their win rates against each other
        stand in the data.

    Args:
        stats: log-probs of a batch of pairs, and scores that are win rates in [0, 1] against the
            policy's other answers; a reference is required.
        beta: ``1 / eta`` of the paper, in (0, inf).

    Returns:
        Losses ``[batch]``, nats squared, non-negative.

    Limits:
        0 at ``logratio = (p - 1/2) / beta`` of both sides.

    Source:
        arXiv:2405.00675 and its code. ``sppo_hard`` is twice this at win rates 1 and 0.
    """
    wanted = (stats.chosen_scores - 0.5) / beta
    unwanted = (stats.rejected_scores - 0.5) / beta
    chosen = (stats.chosen_logratios - wanted) ** 2
    return (chosen + (stats.rejected_logratios - unwanted) ** 2) / 2
