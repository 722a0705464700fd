"""Objectives that see lengths or single tokens: against length bias, off-policy data and drift.

What they need beyond summed log-probs is computed in the same forward passes, only when asked for.
"""

from __future__ import annotations

from torch import Tensor

from lora_dpo.objectives._maths import logistic, tangent_exp
from lora_dpo.objectives._table import NonNegative, Positive, Share, Smoothing, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.stats import PairStats


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("lengths",),
    paper="Disentangling Length from Quality in Direct Preference Optimization (Park et al., 2024)",
    arxiv="2403.19159",
    equation="length-regularised DPO",
)
def rdpo(stats: PairStats, *, beta: Positive = 0.1, alpha: NonNegative = 0.01) -> Tensor:
    """Length-regularised DPO: a longer chosen answer earns less of a pull.

    ``-log s(beta * margin + alpha * (length_chosen - length_rejected))``

    When to use:
        Where longer answers win because they are longer: a pair that its length explains
        counts as learnt.

    Args:
        stats: log-probs and lengths of a batch of pairs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        alpha: per token of difference, in [0, inf); 0.005 to 0.05 is usual, 0 is ``dpo``.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference and lengths are equal.

    Source:
        arXiv:2403.19159; the sign is that of SimPO's comparison and of the public implementation: a
        pair that its length explains counts as learnt.

    Differs from:
        The copy in the alpha-DPO repository, which subtracts, multiplies alpha by beta, and passes
        batch sizes for lengths.
    """
    lengths = (stats.chosen_lengths - stats.rejected_lengths).to(stats.policy_chosen_logps.dtype)
    return logistic(beta * stats.margins + alpha * lengths)


def ld_rewards(
    stats: PairStats, *, beta: float, alpha: float, discount_reference: bool, **_: float
) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logratio`` with tokens beyond the shorter length discounted."""
    of_reference = alpha if discount_reference else 1.0
    rewards = []
    for side in ("chosen", "rejected"):
        sums = []
        for owner, rate in (("policy", alpha), ("reference", of_reference)):
            whole = getattr(stats, f"{owner}_{side}_logps")
            first = getattr(stats, f"{owner}_{side}_first_logps")
            sums.append(first + rate * (whole - first))
        rewards.append(beta * (sums[0] - sums[1]))
    return rewards[0], rewards[1]


@objective(
    rewards=ld_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("first_logps",),
    paper="Length Desensitization in Direct Preference Optimization (Liu et al., 2024)",
    arxiv="2409.06411",
    equation="the LD-DPO loss",
)
def ld_dpo(
    stats: PairStats,
    *,
    beta: Positive = 0.1,
    alpha: Share = 0.5,
    discount_reference: bool = True,
) -> Tensor:
    """DPO in which tokens beyond the length of the shorter answer count for less.

    A side's log-prob becomes ``first + alpha * (all - first)``, ``first`` being the sum over its first
    ``min(length_chosen, length_rejected)`` tokens; then ``dpo``.

    When to use:
        Where the policy becomes long-winded: tokens beyond the shorter answer's length count
        for less, and beta stays that of ``dpo``.

    Args:
        stats: log-probs of a batch of pairs, and those of first tokens; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        alpha: weight of the further tokens, in [0, 1]; 1 is ``dpo``.
        discount_reference: whether the reference's log-probs are treated alike.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference, if the reference is discounted too.

    Source:
        arXiv:2409.06411.

    Differs from:
        LLaMA-Factory and TRL 0.18 to 0.28, which discount the policy alone (then the margin is not 0
        at the start): discount_reference false.
    """
    chosen, rejected = ld_rewards(
        stats, beta=beta, alpha=alpha, discount_reference=discount_reference
    )
    return logistic(chosen - rejected)


def sampled_rewards(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * logratio`` over the tokens that were drawn."""
    return (
        beta * (stats.policy_chosen_sampled_logps - stats.reference_chosen_sampled_logps),
        beta * (stats.policy_rejected_sampled_logps - stats.reference_rejected_sampled_logps),
    )


@objective(
    rewards=sampled_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("sampled_logps",),
    paper="Eliminating Biased Length Reliance of DPO via Down-Sampled KL Divergence (Lu et al., 2024)",
    arxiv="2406.10957",
    equation="the down-sampled loss",
)
def sampo(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """DPO on as many random tokens of each side as the shorter one has.

    ``-log s(beta * (sampled logratio_chosen - sampled logratio_rejected))``

    When to use:
        As ``ld_dpo``, without a setting: as many random tokens of each side are read. The
        draw adds noise, and log-probs of the reference cannot be stored.

    Args:
        stats: log-probs of a batch of pairs over the drawn tokens; a reference is required.
        beta: as in ``dpo``, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference; ``dpo`` where both sides are equally long.

    Source:
        arXiv:2406.10957.

    Differs from:
        The authors' code, which draws other tokens for the reference than for the policy and so adds
        noise to every log-ratio.
    """
    chosen, rejected = sampled_rewards(stats, beta=beta)
    return logistic(chosen - rejected)


@objective(
    rewards=scaled_logratios,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("confidences",),
    paper="WPO: Enhancing RLHF with Weighted Preference Optimization (Zhou et al., 2024)",
    arxiv="2406.11827",
    equation="weighted DPO, sampled alignment",
)
def wpo(
    stats: PairStats,
    *,
    beta: Positive = 0.01,
    label_smoothing: Smoothing = 0.0,
    clamp: bool = True,
) -> Tensor:
    """DPO whose pairs weigh by how likely the policy itself would write them.

    ``w_chosen * w_rejected * dpo``, ``w = exp(mean_t(log pi(y_t) - log sum_v pi(v) ** 2))``, without
    gradient

    When to use:
        Where the answers come from other models: pairs that the policy would hardly write
        itself count for less.

    Args:
        stats: log-probs of a batch of pairs and the sides' confidences; a reference is required.
        beta: as in ``dpo``, in (0, inf); 0.01 in the paper.
        label_smoothing: as in ``dpo``, in [0, 0.5).
        clamp: whether the product of weights is held to at most 1.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``ln 2`` times the weight where the policy equals the reference.

    Source:
        arXiv:2406.11827, the sampled alignment of its section 3; the clamp is that of its code.

    Differs from:
        TRL 0.29 and later, which does not clamp.
    """
    together = (stats.chosen_confidences + stats.rejected_confidences).detach()
    weights = tangent_exp(together.clamp(max=0.0) if clamp else together)
    return weights * logistic(beta * stats.margins, label_smoothing)


def tdpo_rewards(stats: PairStats, *, beta: float, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * (logratio + KL)`` of both sides (arXiv:2404.11999, its code)."""
    return (
        beta * (stats.chosen_logratios + stats.policy_chosen_kls),
        beta * (stats.rejected_logratios + stats.policy_rejected_kls),
    )


@objective(
    rewards=tdpo_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("kls",),
    paper="Token-level Direct Preference Optimization (Zeng et al., 2024)",
    arxiv="2404.11999",
    equation="TDPO1",
)
def tdpo1(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
    """Token-level DPO: the margin less the difference of the sides' forward KLs.

    ``-log s(beta * (margin - (KL_rejected - KL_chosen)))``, ``KL = sum_t KL(reference_t || policy_t)``

    When to use:
        Where the policy drifts from its reference token by token though sums look fine: the
        sides' KLs enter the margin.

    Args:
        stats: log-probs of a batch of pairs and the sides' KLs; a reference is required.
        beta: as in ``dpo``, in (0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference.

    Source:
        arXiv:2404.11999 and its code.
    """
    difference = stats.policy_rejected_kls - stats.policy_chosen_kls
    return logistic(beta * (stats.margins - difference))


@objective(
    rewards=tdpo_rewards,
    data="paired",
    reference=True,
    logps="sum",
    monotone=True,
    extremes="linear",
    needs=("kls",),
    paper="Token-level Direct Preference Optimization (Zeng et al., 2024)",
    arxiv="2404.11999",
    equation="TDPO2",
)
def tdpo2(stats: PairStats, *, beta: Positive = 0.1, alpha: NonNegative = 0.5) -> Tensor:
    """TDPO1 with a weight on the KLs, whose gradient goes through the rejected side alone.

    ``-log s(beta * (margin - alpha * (KL_rejected - stop_gradient(KL_chosen))))``

    When to use:
        As ``tdpo1``, where the weight of the KLs shall be set: alpha 0 is ``dpo``.

    Args:
        stats: log-probs of a batch of pairs and the sides' KLs; a reference is required.
        beta: as in ``dpo``, in (0, inf).
        alpha: weight of the KLs, in [0, inf); 0.5 in the paper, 0 is ``dpo``.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ln 2 where the policy equals the reference.

    Source:
        arXiv:2404.11999 and its code.
    """
    difference = stats.policy_rejected_kls - stats.policy_chosen_kls.detach()
    return logistic(beta * (stats.margins - alpha * difference))
