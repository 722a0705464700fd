"""Objectives on whole log-probs without a reference: the reference never runs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from lora_dpo.objectives._maths import logistic
from lora_dpo.objectives._table import NonNegative, Positive, Smoothing, objective
from lora_dpo.stats import LabelledStats, PairStats


def scaled_logps(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logp`` of both sides."""
    return beta * stats.policy_chosen_logps, beta * stats.policy_rejected_logps


def scaled_mean_logps(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logp / length`` of both sides."""
    return beta * stats.policy_mean_chosen_logps, beta * stats.policy_mean_rejected_logps


def _gap(stats: PairStats) -> Tensor:
    return stats.policy_chosen_logps - stats.policy_rejected_logps


@objective(
    rewards=scaled_logps,
    data="paired",
    reference=False,
    logps="sum",
    monotone=True,
    extremes="linear",
    paper="Direct Preference Optimization (Rafailov et al., 2023)",
    arxiv="2305.18290",
    equation="Eq. 7 with a uniform reference",
)
def dpo_reference_free(
    stats: PairStats, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """DPO with a uniform distribution in place of the reference.

    ``-(1 - eps) * log sigmoid(beta * (logp_chosen - logp_rejected))
    - eps * log sigmoid(-beta * (logp_chosen - logp_rejected))``

    When to use:
        To see what the reference does, or to spare its pass. ``simpo``, ``cpo`` and ``orpo`` are made
        for work without a reference.

    Args:
        stats: log-probs of a batch of pairs, nats, each ``[batch]``; no reference is read.
        beta: scale of the margin, per nat, in (0, inf).
        label_smoothing: ``eps``, as in ``dpo``, in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        As ``dpo``, but the start value depends on the data: nothing holds the policy near where it
        began.

    Source:
        The ``reference_free`` switch of the DPO authors' code (arXiv:2305.18290, Eq. 7 with the
        reference terms left out).

    Differs from:
        TRL 0.29 and later, which dropped it.
    """
    return logistic(beta * _gap(stats), label_smoothing)


def mean_logps(stats: PairStats, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards without a scale: the log-prob per token of both sides."""
    return stats.policy_mean_chosen_logps, stats.policy_mean_rejected_logps


@objective(
    rewards=mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    reduction="tokens",
    nll_weight=None,
    paper="Iterative Reasoning Preference Optimization (Pang et al., 2024), its NLL term",
    arxiv="2404.19733",
    equation="Eq. 1, second term",
)
def sft(stats: PairStats) -> Tensor:
    """Supervised fine-tuning on the chosen side: negative log-likelihood per token.

    ``-logp_chosen / length_chosen``; a batch is averaged over tokens, not over rows.

    When to use:
        Before preference training, where the base is not ready for it (``lora-dpo inspect``
        tells); or as the yardstick that a preference loss has to beat.

    Args:
        stats: log-probs of a batch of pairs, nats, each ``[batch]``; only the chosen side is read.

    Returns:
        Losses ``[batch]``, nats a token, non-negative.

    Limits:
        0 for a certain completion; linear in the log-prob. The rejected side gets no gradient.

    Source:
        Maximum likelihood; as a term beside a preference loss: arXiv:2404.19733, Eq. 1 (there per
        row, with prompt and completion in the length).

    Differs from:
        LLaMA-Factory's ``pref_ftx`` and OpenRLHF, which average the means of the rows.
    """
    return -stats.policy_mean_chosen_logps


def mean_logp(stats: LabelledStats, **_: float) -> tuple[Tensor]:
    """Implicit rewards without a scale: the log-prob per token of single answers."""
    return (stats.policy_mean_logps,)


@objective(
    rewards=mean_logp,
    data="demonstrations",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    reduction="tokens",
    paper="Training language models to follow instructions with human feedback (Ouyang et al., 2022)",
    arxiv="2203.02155",
    equation="supervised fine-tuning on demonstrations",
)
def sft_demonstrations(stats: LabelledStats) -> Tensor:
    """Supervised fine-tuning on single answers: negative log-likelihood per token.

    ``-logp / length``; a batch is averaged over tokens, not over rows.

    When to use:
        Before preference training, where the data are instructions with answers, not pairs: as
        ``lora-dpo sft`` does.

    Args:
        stats: log-probs of a batch of single answers, nats, each ``[batch]``. Labels are not read:
            data asked for as ``demonstrations`` hold wanted answers alone.

    Returns:
        Losses ``[batch]``, nats a token, non-negative.

    Limits:
        0 for a certain completion; linear in the log-prob.

    Source:
        Maximum likelihood, as the first step of arXiv:2203.02155. The mean over the tokens of the
        optimiser step is what transformers, TRL's SFT and LLaMA-Factory take: a long answer
        counts by its length, and no split of the step changes the gradient.

    Differs from:
        ``sft``, its form on pairs, which runs the rejected side too, to report on it.
    """
    return -stats.policy_mean_logps


_CPO = "Contrastive Preference Optimization: Pushing the Boundaries of LLM Translation (Xu et al., 2024)"


@objective(
    rewards=scaled_logps,
    data="paired",
    reference=False,
    logps="sum",
    monotone=True,
    extremes="linear",
    nll_weight=1.0,
    paper=_CPO,
    arxiv="2401.08417",
    equation="the CPO loss",
)
def cpo(stats: PairStats, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """DPO with a uniform reference, and an SFT term that keeps the chosen answers likely.

    ``-log s(beta * (logp_chosen - logp_rejected)) + nll_weight * sft``

    When to use:
        Where no reference shall be read and chosen answers are good enough to be imitated:
        the SFT term does that.

    Args:
        stats: log-probs of a batch of pairs; no reference is read.
        beta: per nat, in (0, inf).
        label_smoothing: as in ``dpo``, in [0, 0.5).

    Returns:
        Losses ``[batch]`` of the preference part; ``nll_weight``, 1 unless given, adds the other.

    Limits:
        As ``dpo_reference_free``.

    Source:
        arXiv:2401.08417; log-probs are summed, as in the authors' code and TRL.
    """
    return logistic(beta * _gap(stats), label_smoothing)


@objective(
    rewards=scaled_logps,
    data="paired",
    reference=False,
    logps="sum",
    monotone=True,
    extremes="linear",
    smooth=False,
    nll_weight=1.0,
    paper=_CPO,
    arxiv="2401.08417",
    equation="its hinge variant",
)
def cpo_hinge(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """CPO with a hinge in place of the logistic loss.

    ``max(0, 1 - beta * (logp_chosen - logp_rejected)) + nll_weight * sft``

    When to use:
        As ``cpo``, where pairs that are right by enough shall be left alone.

    Args:
        stats: log-probs of a batch of pairs; no reference is read.
        beta: per nat, in (0, inf).

    Returns:
        Losses ``[batch]`` of the preference part; ``nll_weight``, 1 unless given, adds the other.

    Limits:
        0 with no gradient above a difference of ``1 / beta`` nats.

    Source:
        The code of arXiv:2401.08417 and TRL.
    """
    return relu(1 - beta * _gap(stats))


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=False,
    extremes="quadratic",
    nll_weight=1.0,
    paper=_CPO,
    arxiv="2401.08417",
    equation="its IPO variant",
)
def cpo_ipo(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """CPO with IPO's squared distance, on log-probs per token.

    ``(mean_logp_chosen - mean_logp_rejected - 1 / (2 * beta)) ** 2 + nll_weight * sft``

    When to use:
        As ``cpo``, where the difference shall have a finite target.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: the target is ``1 / (2 * beta)`` nats a token, in (0, inf).

    Returns:
        Losses ``[batch]`` of the preference part; ``nll_weight``, 1 unless given, adds the other.

    Limits:
        0 at the target.

    Source:
        The code of arXiv:2401.08417 and TRL.
    """
    gap = stats.policy_mean_chosen_logps - stats.policy_mean_rejected_logps
    return (gap - 1 / (2 * beta)) ** 2


def plain_logps(stats: PairStats, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards without a scale: the log-probs of both sides."""
    return stats.policy_chosen_logps, stats.policy_rejected_logps


@objective(
    rewards=plain_logps,
    data="paired",
    reference=False,
    logps="sum",
    monotone=True,
    extremes="linear",
    smooth=False,
    paper="SLiC-HF: Sequence Likelihood Calibration with Human Feedback (Zhao et al., 2023)",
    arxiv="2305.10425",
    equation="rank calibration with a likelihood term",
)
def slic_hf(
    stats: PairStats, *, delta: NonNegative = 1.0, regularisation: NonNegative = 0.1
) -> Tensor:
    """Hinge on the difference of whole log-probs, with a likelihood term on the chosen side.

    ``max(0, delta - logp_chosen + logp_rejected) - regularisation * logp_chosen``

    When to use:
        To repeat SLiC-HF: whole log-probs without a reference, held by a likelihood term.

    Args:
        stats: log-probs of a batch of pairs; no reference is read.
        delta: the margin, nats, in [0, inf).
        regularisation: weight of the likelihood term, per nat, in [0, inf): lambda in the paper.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``-regularisation * logp_chosen`` once the difference is above delta.

    Source:
        arXiv:2305.10425.

    Differs from:
        TRL's ``hinge``, which its documents call SLiC: that is ``hinge`` here, with a reference.
    """
    return relu(delta - _gap(stats)) - regularisation * stats.policy_chosen_logps
