"""Objectives that look at each side's own log-ratio, not only at their difference.

They can hold the chosen side up, which losses of the margin alone let sink along with the rejected.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from lora_dpo.objectives._maths import logistic
from lora_dpo.objectives._table import Interval, NonNegative, Positive, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.stats import PairStats

Shift = Annotated[float, Interval(above=0.0, below=1.0, includes_upper=True)]


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="linear",
    paper="Noise Contrastive Alignment of Language Models with Explicit Rewards (Chen et al., 2024)",
    arxiv="2402.05369",
    equation="NCA with two answers",
)
def nca_pair(stats: PairStats, *, beta: Positive = 0.01) -> Tensor:
    """Noise contrastive alignment on pairs: the chosen likelihood is kept from falling.

    ``-log s(r_chosen) - 0.5 * log s(-r_chosen) - 0.5 * log s(-r_rejected)``, ``r = beta * logratio``

    When to use:
        Where chosen answers must not become less likely: their own log-ratio has a finite
        target above 0.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf); 0.01 in the paper.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        2 ln 2 where the policy equals the reference; least in the chosen side at ``r_chosen = ln 2``.

    Source:
        arXiv:2402.05369 and its code. The same paper's InfoNCA on pairs is ``dpo``.
    """
    chosen, rejected = beta * stats.chosen_logratios, beta * stats.rejected_logratios
    return -logsigmoid(chosen) - logsigmoid(-chosen) / 2 - logsigmoid(-rejected) / 2


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper="Binary Classifier Optimization for Large Language Model Alignment (Jung et al., 2024)",
    arxiv="2404.04656",
    equation="the pair loss without reward shift",
)
def bco_pair(stats: PairStats, *, beta: Positive = 0.01) -> Tensor:
    """Two binary classifications: chosen above the reference, rejected below it.

    ``-log s(beta * logratio_chosen) - log s(-beta * logratio_rejected)``

    When to use:
        Where each answer shall count as good or bad by itself: chosen is held above the
        reference, which ``dpo`` does not ask for.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        2 ln 2 where the policy equals the reference.

    Source:
        arXiv:2404.04656 without its reward shift; with it: ``bco_pair_running``, and ``bco`` for
        unpaired rows.

    Differs from:
        TRL before 0.29, whose ``bco_pair`` had the running shift.
    """
    return -logsigmoid(beta * stats.chosen_logratios) - logsigmoid(-beta * stats.rejected_logratios)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="quadratic",
    paper="Self-Play Preference Optimization for Language Model Alignment (Wu et al., 2024)",
    arxiv="2405.00675",
    equation="the loss with win rates 1 and 0",
)
def sppo_hard(stats: PairStats, *, beta: Positive = 1e-3) -> Tensor:
    """Each side's log-ratio is drawn to a target of its own.

    ``(logratio_chosen - 1 / (2 * beta)) ** 2 + (logratio_rejected + 1 / (2 * beta)) ** 2``

    When to use:
        Where both sides shall have a target of their own, so that chosen rises and does not
        only fall less than rejected.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: ``1 / eta`` of the paper, in (0, inf).

    Returns:
        Losses ``[batch]``, nats squared, non-negative.

    Limits:
        ``1 / (2 * beta ** 2)`` where the policy equals the reference, 0 at the targets.

    Source:
        arXiv:2405.00675, the loss of its algorithm with win rates 1 and 0.

    Differs from:
        The authors' code, which takes half of it (``sppo`` here, which reads win rates).
    """
    target = 1 / (2 * beta)
    return (stats.chosen_logratios - target) ** 2 + (stats.rejected_logratios + target) ** 2


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="bounded",
    paper="Anchored Preference Optimization and Contrastive Revisions (D'Oosterlinck et al., 2024)",
    arxiv="2408.06266",
    equation="APO-zero",
)
def apo_zero(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """Pushes chosen above the reference and rejected below it: for data better than the model.

    ``1 - s(beta * logratio_chosen) + s(beta * logratio_rejected)``

    When to use:
        Where chosen answers are better than what the model writes now, as those of a stronger
        model or of a careful editor.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, in (0, 2).

    Limits:
        1 where the policy equals the reference; gradients vanish far from it on either side.

    Source:
        arXiv:2408.06266, APO-zero.
    """
    return sigmoid(-beta * stats.chosen_logratios) + sigmoid(beta * stats.rejected_logratios)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="bounded",
    paper="Anchored Preference Optimization and Contrastive Revisions (D'Oosterlinck et al., 2024)",
    arxiv="2408.06266",
    equation="APO-down",
)
def apo_down(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """Pushes both sides down, rejected further: for a model that is better than the data.

    ``s(beta * logratio_chosen) + 1 - s(beta * margin)``

    When to use:
        Where the model already writes better answers than the chosen ones, and shall only
        learn what is worse.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, in (0, 2).

    Limits:
        1 where the policy equals the reference.

    Source:
        arXiv:2408.06266, APO-down.
    """
    return sigmoid(beta * stats.chosen_logratios) + sigmoid(-beta * stats.margins)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    smooth=False,
    paper="Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive (Pal et al., 2024)",
    arxiv="2402.13228",
    equation="the DPOP loss",
)
def dpop(stats: PairStats, *, beta: Positive = 0.3, dpop_lambda: NonNegative = 50.0) -> Tensor:
    """DPO-positive: DPO with a penalty on a chosen log-prob below the reference's.

    ``-log s(beta * (margin - lambda * max(0, -logratio_chosen)))``

    When to use:
        Where chosen and rejected are nearly the same text (sums, code, small edits), so that
        pushing one down pushes the other down too.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf); 0.3 in the paper.
        dpop_lambda: weight of the penalty, in [0, inf); 5 to 500 in the paper, 0 is ``dpo``.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference. The penalty has a kink there; its derivative at
        the kink is taken as 0, so the first step is DPO's.

    Source:
        arXiv:2402.13228; the penalty is inside the factor beta.

    Differs from:
        Ports that put the penalty outside beta, and those with ``maximum``, whose derivative at the
        kink is half of the penalty's.
    """
    return logistic(beta * (stats.margins - dpop_lambda * relu(-stats.chosen_logratios)))


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper="DPO-Shift: Shifting the Distribution of Direct Preference Optimization (Yang et al., 2025)",
    arxiv="2502.07599",
    equation="the DPO-Shift loss",
)
def dpo_shift(stats: PairStats, *, beta: Positive = 0.1, shift: Shift = 0.75) -> Tensor:
    """DPO whose rejected side counts for less, so that the chosen side falls less.

    ``-log s(beta * (logratio_chosen - f * logratio_rejected))``

    When to use:
        Where chosen answers sink together with the rejected ones. A smaller shift holds
        chosen up more, and separates less.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: per nat, in (0, inf).
        shift: ``f``, weight of the rejected side, in (0, 1]; 1 is ``dpo``.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference.

    Source:
        arXiv:2502.07599 and its code, with a fixed f; its linear schedules of f are not offered.
    """
    return logistic(beta * (stats.chosen_logratios - shift * stats.rejected_logratios))


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="quadratic",
    paper="Cal-DPO: Calibrated Direct Preference Optimization (Xiao et al., 2024)",
    arxiv="2412.14516",
    equation="the Cal-DPO loss",
)
def cal_dpo(stats: PairStats, *, beta: Positive = 1e-3, calibration: NonNegative = 0.5) -> Tensor:
    """Logistic loss on the plain margin, with each side's log-ratio drawn to a calibrated value.

    ``-log s(margin) + c * ((logratio_chosen - 1 / (2 * beta)) ** 2
    + (logratio_rejected + 1 / (2 * beta)) ** 2)``

    When to use:
        Where rewards shall have an absolute scale and not only the right difference, and
        chosen shall not sink.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: sets the targets ``1 / (2 * beta)`` nats, in (0, inf); 0.001 to 0.002 in the paper.
        calibration: ``c``, weight of the squared distances, in [0, inf); 0.5 in the authors' code.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``ln 2 + c / (2 * beta ** 2)`` where the policy equals the reference.

    Source:
        arXiv:2412.14516 and its code. There the squared distances are a mean over the batch; a mean
        of these losses is the same, and rows do not touch each other.

    Differs from:
        turbo-alignment, where c is 1.
    """
    target = 1 / (2 * beta)
    distance = (stats.chosen_logratios - target) ** 2 + (stats.rejected_logratios + target) ** 2
    return -logsigmoid(stats.margins) + calibration * distance
