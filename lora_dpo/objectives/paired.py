"""Objectives on the margin: chosen minus rejected log-ratio against the reference.

They are functions of one number, so a policy that equals its reference has the same loss on every
pair. The reference is required.
"""

from __future__ import annotations

import math
from typing import Annotated

from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid, relu

from lora_dpo.objectives._maths import logistic
from lora_dpo.objectives._table import Interval, Positive, Smoothing, objective
from lora_dpo.stats import PairStats

Target = Annotated[float, Interval(above=0.0, below=0.5)]


def scaled_logratios(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logratio`` of both sides (arXiv:2305.18290, section 4)."""
    return beta * stats.chosen_logratios, beta * stats.rejected_logratios


def scaled_mean_logratios(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logratio / length`` of both sides."""
    return beta * stats.mean_chosen_logratios, beta * stats.mean_rejected_logratios


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper="Direct Preference Optimization (Rafailov et al., 2023)",
    arxiv="2305.18290",
    equation="Eq. 7",
)
def dpo(stats: PairStats, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Logistic loss on the margin of the log-ratios; with label smoothing, conservative DPO.

    ``-(1 - eps) * log sigmoid(beta * margin) - eps * log sigmoid(-beta * margin)``

    When to use:
        The place to start: pairs of answers, a base or SFT model that could have written
        them, and the wish to stay near it. Change to another objective when a run's diagnosis
        names a failure.

    Args:
        stats: log-probs of a batch of pairs, nats, each ``[batch]``; a reference is required.
        beta: strength of the pull to the reference, per nat, in (0, inf). 0.1 is usual; 0.01 to
            0.05 is often better for 7B models, 0.5 for short answers.
        label_smoothing: ``eps``, the share of pairs believed to be labelled the wrong way round,
            in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference, whatever beta and eps. For eps = 0: 0 as the
        margin goes to plus infinity, ``beta * |margin|`` as it goes to minus infinity. For
        eps > 0 the least value stands at ``beta * margin = log((1 - eps) / eps)``.

    Source:
        arXiv:2305.18290 Eq. 7; label smoothing: Mitchell, "A note on DPO with noisy preferences
        and relationship to IPO" (2023), Eq. 3 (conservative DPO).

    Differs from:
        TRL 0.29 and later, where ``label_smoothing`` is accepted with the sigmoid loss and has no
        effect.
    """
    return logistic(beta * stats.margins, label_smoothing)


@objective(
    rewards=scaled_mean_logratios,
    data="paired",
    reference=True,
    logps="mean",
    monotone=True,
    extremes="linear",
    paper="Tulu 3: Pushing Frontiers in Open Language Model Post-Training (Lambert et al., 2024)",
    arxiv="2411.15124",
    equation="length-normalised DPO",
)
def dpo_norm(stats: PairStats, *, beta: Positive = 5.0, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Length-normalised DPO: the margin is that of the log-ratios per token.

    ``-log sigmoid(beta * (logratio_chosen / length_chosen - logratio_rejected / length_rejected))``

    When to use:
        Where chosen answers are longer (or shorter) as a rule and the policy learns the
        length: log-ratios count per token, whatever the length.

    Args:
        stats: log-probs and lengths of a batch of pairs; a reference is required.
        beta: per nat and token, in (0, inf). It multiplies a mean, so it is some fifty times that
            of ``dpo``: 5 is usual, and 0.1 would hardly train at all.
        label_smoothing: as in ``dpo``, in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        As ``dpo``, with the margin per token.

    Source:
        arXiv:2411.15124; first in the appendix of SimPO, arXiv:2405.14734. The default of
        beta is that of the authors' code (open-instruct).
    """
    return logistic(
        beta * (stats.mean_chosen_logratios - stats.mean_rejected_logratios), label_smoothing
    )


@objective(
    rewards=scaled_mean_logratios,
    data="paired",
    reference=True,
    logps="mean",
    monotone=False,
    extremes="quadratic",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences (Azar et al., 2023)",
    arxiv="2310.12036",
    equation="Eq. 17, on log-ratios per token",
)
def ipo(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """Squared distance of the per-token margin from a finite target, so that it cannot run away.

    ``(logratio_chosen / length_chosen - logratio_rejected / length_rejected - 1 / (2 * beta)) ** 2``

    When to use:
        Where one answer always wins, so that ``dpo`` would drive margins without end: the
        margin has a finite target. Lengths divide, so long and short answers have the same
        target per token.

    Args:
        stats: log-probs and lengths of a batch of pairs; a reference is required.
        beta: the paper's tau, in (0, inf); the target margin is ``1 / (2 * beta)`` nats a token.

    Returns:
        Losses ``[batch]``, nats squared, non-negative.

    Limits:
        ``1 / (2 * beta) ** 2`` where the policy equals the reference; 0 at the target; grows with the
        square of the distance on both sides.

    Source:
        arXiv:2310.12036 Eq. 17. The paper writes no length; TRL, whose code says that the authors
        confirmed the mean, HALOs and LLaMA-Factory divide by it.

    Differs from:
        OpenRLHF, NeMo-Aligner and the DPO authors' code, which sum: that is ``ipo_sum``, and its beta
        is not transferable.
    """
    margins = stats.mean_chosen_logratios - stats.mean_rejected_logratios
    return (margins - 1 / (2 * beta)) ** 2


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="quadratic",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences (Azar et al., 2023)",
    arxiv="2310.12036",
    equation="Eq. 17",
)
def ipo_sum(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """IPO as the paper writes it, on the margin of whole completions.

    ``(margin - 1 / (2 * beta)) ** 2``

    When to use:
        Where answers are of like length, or to repeat results of code that sums. Its beta is
        not that of ``ipo``.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: the paper's tau, in (0, inf); the target margin is ``1 / (2 * beta)`` nats.

    Returns:
        Losses ``[batch]``, nats squared, non-negative.

    Limits:
        ``1 / (2 * beta) ** 2`` where the policy equals the reference; 0 at the target.

    Source:
        arXiv:2310.12036 Eq. 17.
    """
    return (stats.margins - 1 / (2 * beta)) ** 2


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    smooth=False,
    paper="Statistical Rejection Sampling Improves Preference Optimization (Liu et al., 2023)",
    arxiv="2309.06657",
    equation="hinge loss on normalised likelihoods",
)
def hinge(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """Hinge loss on the scaled margin: no pull once a pair is right by a margin of 1.

    ``max(0, 1 - beta * margin)``

    When to use:
        Where pairs that are right by enough shall be left alone, so that only the others move
        the policy.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: the paper's gamma, per nat, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        1 where the policy equals the reference; 0 with no gradient above the margin ``1 / beta``.

    Source:
        arXiv:2309.06657 (RSO), the hinge loss on normalised likelihoods.

    Differs from:
        SLiC-HF (``slic_hf``), for which TRL's documents take it: that one has no reference and an
        NLL term.
    """
    return relu(1 - beta * stats.margins)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper="Provably Robust DPO: Aligning Language Models with Noisy Feedback (Ray Chowdhury et al., 2024)",
    arxiv="2403.00409",
    equation="the unbiased loss",
)
def robust(stats: PairStats, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> Tensor:
    """DPO made unbiased for a known share of flipped labels.

    ``(-(1 - eps) * log sigmoid(beta * margin) + eps * log sigmoid(-beta * margin)) / (1 - 2 * eps)``

    When to use:
        Where a known share of the labels is flipped at random. Where the share is a guess,
        ``dpo`` with label_smoothing has a lower bound and this has none.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        label_smoothing: ``eps``, the share of labels that are flipped, in [0, 0.5).

    Returns:
        Losses ``[batch]``; of one pair it may be negative, and it has no lower bound.

    Limits:
        ln 2 where the policy equals the reference. Its mean over pairs of which a share eps is
        flipped is the DPO loss on the clean pairs. ``-eps / (1 - 2 * eps) * beta * margin`` as the
        margin goes to plus infinity: clean data and a wrong eps let it run away.

    Source:
        arXiv:2403.00409, the unbiased loss of section 3.

    Differs from:
        Conservative DPO (``dpo`` with label_smoothing), which has the other sign before eps.
    """
    z = beta * stats.margins
    right, wrong = logsigmoid(z), logsigmoid(-z)
    return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=False,
    extremes="bounded",
    paper="Towards Efficient Exact Optimization of Language Model Alignment (Ji et al., 2024)",
    arxiv="2402.00856",
    equation="EXO on pairs, smoothed labels",
)
def exo_pair(stats: PairStats, *, beta: Positive = 0.1, label_smoothing: Target = 1e-3) -> Tensor:
    """Reverse KL from the policy's preference to the labels': EXO on pairs.

    ``s(z) * (log s(z) - log(1 - eps)) + s(-z) * (log s(-z) - log(eps))``, ``z = beta * margin`` and
    ``s`` the sigmoid

    When to use:
        Where the margin shall settle at a finite value that the label's certainty sets, and
        pairs far on the wrong side shall pull little.

    Args:
        stats: log-probs of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        label_smoothing: ``eps``, the probability that the label is wrong, in (0, 0.5); the KL to a
            label without doubt is infinite.

    Returns:
        Losses ``[batch]``, nats, non-negative.

    Limits:
        0 at ``beta * margin = log((1 - eps) / eps)``; ``-log(eps)`` as the margin goes to minus
        infinity, with vanishing gradient.

    Source:
        arXiv:2402.00856, the pairwise form with the labels smoothed by eps.

    Differs from:
        The authors' code, whose target of logits (0, -10) does not add up to 1, and TRL before 0.29,
        which set eps silently and kept it for the losses that followed.
    """
    z = beta * stats.margins
    right = sigmoid(z) * (logsigmoid(z) - math.log1p(-label_smoothing))
    return right + sigmoid(-z) * (logsigmoid(-z) - math.log(label_smoothing))
