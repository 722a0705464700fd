"""Objectives on preference pairs without a reference: the reference never runs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.objectives._table import Positive, Smoothing, objective
from lora_dpo.stats import PairStats


def scaled_logps(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logp`` of both sides."""
    return beta * stats.policy_chosen_logps, beta * stats.policy_rejected_logps


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
    z = beta * (stats.policy_chosen_logps - stats.policy_rejected_logps)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


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
