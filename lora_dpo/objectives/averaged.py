"""Objectives without a reference on log-probs per token: the answer's own probability is the reward."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from lora_dpo.objectives._maths import log_odds, logistic, tangent_expm1
from lora_dpo.objectives._table import NonNegative, Number, Positive, Smoothing, objective
from lora_dpo.objectives.reference_free import scaled_mean_logps
from lora_dpo.stats import PairStats

_SIMPO = "SimPO: Simple Preference Optimization with a Reference-Free Reward (Meng et al., 2024)"


def _mean_gap(stats: PairStats) -> Tensor:
    return stats.policy_mean_chosen_logps - stats.policy_mean_rejected_logps


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    paper=_SIMPO,
    arxiv="2405.14734",
    equation="Eq. 6",
)
def simpo(
    stats: PairStats,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """Logistic loss on the difference of log-probs per token, with a target margin.

    ``-log s(beta * (mean_logp_chosen - mean_logp_rejected) - gamma)``

    When to use:
        Where no reference shall be read and lengths differ. Nothing holds the policy near the
        base: watch the length and the end of samples, and stop early.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: per nat and token, in (0, inf); 2 to 2.5, and 10 for later models.
        gamma: the target margin, in [0, inf), inside the sigmoid and not multiplied by beta;
            ``gamma / beta`` of 0.3 to 0.55 is usual.
        label_smoothing: as in ``dpo``, in [0, 0.5).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``-log s(-gamma)`` where both sides are equally likely per token.

    Source:
        arXiv:2405.14734 Eq. 6.

    Differs from:
        TRL's CPO trainer with simpo, which keeps an NLL term of weight 1 unless told not to and has
        beta 0.1; configs that give ``gamma_beta_ratio``, which is gamma / beta.
    """
    return logistic(beta * _mean_gap(stats) - gamma, label_smoothing)


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    smooth=False,
    paper=_SIMPO,
    arxiv="2405.14734",
    equation="the hinge of its code",
)
def simpo_hinge(stats: PairStats, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """SimPO with a hinge in place of the logistic loss.

    ``max(0, 1 - beta * (mean_logp_chosen - mean_logp_rejected) + gamma)``

    When to use:
        As ``simpo``, where pairs that are right by enough shall be left alone.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: as in ``simpo``, in (0, inf).
        gamma: as in ``simpo``, in [0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        0 with no gradient once the margin is above ``(1 + gamma) / beta`` nats a token.

    Source:
        The code of arXiv:2405.14734.
    """
    return relu(1 - beta * _mean_gap(stats) + gamma)


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    nll_weight=0.05,
    paper="CPO-SimPO: the code of CPO and SimPO put together (2024)",
    arxiv="2401.08417",
    equation="CPO with SimPO's loss (fe1ixxu/CPO_SIMPO)",
)
def cpo_simpo(stats: PairStats, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """SimPO with an SFT term that keeps the chosen answers likely.

    ``-log s(beta * (mean_logp_chosen - mean_logp_rejected) - gamma) + nll_weight * sft``

    When to use:
        As ``simpo``, where the chosen answers must stay likely: the SFT term holds them up.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: as in ``simpo``, in (0, inf).
        gamma: as in ``simpo``, in [0, inf).

    Returns:
        Losses ``[batch]`` of the preference part; ``nll_weight``, 0.05 unless given, adds the other.

    Limits:
        As ``simpo``.

    Source:
        The repository CPO_SIMPO by the author of arXiv:2401.08417, with the loss of arXiv:2405.14734.
    """
    return logistic(beta * _mean_gap(stats) - gamma)


def alphapo_rewards(
    stats: PairStats, *, beta: float, alpha: float, **_: float
) -> tuple[Tensor, Tensor]:
    """Implicit rewards ``beta * (1 - p ** -alpha) / alpha``, ``p`` the mean token probability."""
    sides = stats.policy_mean_chosen_logps, stats.policy_mean_rejected_logps
    if alpha == 0:
        return beta * sides[0], beta * sides[1]
    chosen, rejected = (-beta / alpha * tangent_expm1(-alpha * side) for side in sides)
    return chosen, rejected


@objective(
    rewards=alphapo_rewards,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="exponential",
    paper="AlphaPO: Reward Shape Matters for LLM Alignment (Gupta et al., 2025)",
    arxiv="2501.03884",
    equation="the AlphaPO loss",
)
def alphapo(
    stats: PairStats, *, beta: Positive = 2.5, gamma: NonNegative = 0.1, alpha: Number = 0.25
) -> Tensor:
    """SimPO with a reward of another shape: it slows the fall of likelihoods.

    ``-log s(beta * (r(mean_logp_chosen) - r(mean_logp_rejected)) - gamma)``,
    ``r(a) = (1 - exp(-alpha * a)) / alpha``

    When to use:
        As ``simpo``, where likelihoods of both sides fall too far: alpha bends the reward so
        that they fall less.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: per unit of r, in (0, inf).
        gamma: the target margin, in [0, inf).
        alpha: shape of the reward; 0 is ``simpo``, 0.25 in the paper; in (-inf, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        ``simpo`` as alpha goes to 0. Exponentials are continued by their tangent beyond 60 (float32)
        or 600 (float64).

    Source:
        arXiv:2501.03884.
    """
    chosen, rejected = alphapo_rewards(stats, beta=beta, alpha=alpha)
    return logistic(chosen - rejected - gamma)


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    paper="ORPO: Monolithic Preference Optimization without Reference Model (Hong et al., 2024)",
    arxiv="2403.07691",
    equation="Eq. 6 and 7",
)
def orpo(stats: PairStats, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0) -> Tensor:
    """SFT on the chosen side and an odds-ratio loss, in one step and without a reference.

    ``nll_weight * -mean_logp_chosen - beta * log s(log_odds(chosen) - log_odds(rejected))``,
    ``log_odds = log(p / (1 - p))`` of the mean token probability ``p``

    When to use:
        From a base model that has seen no SFT: one run does both, without a reference.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: weight of the odds-ratio loss, in (0, inf): lambda in the paper, alpha in its code.
        nll_weight: weight of the SFT part, in [0, inf); 0 leaves the odds-ratio loss alone.

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        Log-probs nearer to 0 than 1e-30 (float32) or 1e-300 (float64) count as these.

    Source:
        arXiv:2403.07691.

    Differs from:
        TRL, Liger and the authors' default, whose NLL runs over prompt and completion and is a mean
        over the batch's tokens; here, as in LLaMA-Factory, it is a row's mean over its completion.
        The authors' code counts one padding position too many, and TRL's gradient is NaN for a
        certain completion.
    """
    chosen, rejected = stats.policy_mean_chosen_logps, stats.policy_mean_rejected_logps
    return -nll_weight * chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def likelihoods(stats: PairStats, **_: float) -> tuple[Tensor, Tensor]:
    """Implicit rewards: inverse perplexities, in [0, 1]."""
    return stats.policy_mean_chosen_logps.exp(), stats.policy_mean_rejected_logps.exp()


@objective(
    rewards=likelihoods,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="bounded",
    paper="SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters (Xiao et al., 2025)",
    arxiv="2502.00883",
    equation="the SimPER loss",
)
def simper(stats: PairStats) -> Tensor:
    """Difference of inverse perplexities: no hyperparameter at all.

    ``-exp(mean_logp_chosen) + exp(mean_logp_rejected)``

    When to use:
        Where there is no reference and no time to tune: the learning rate is all that is left
        to choose.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.

    Returns:
        Losses ``[batch]``, in [-1, 1].

    Limits:
        0 where both sides are equally likely per token; gradients vanish for unlikely answers.

    Source:
        arXiv:2502.00883.
    """
    return stats.policy_mean_rejected_logps.exp() - stats.policy_mean_chosen_logps.exp()


@objective(
    rewards=scaled_mean_logps,
    data="paired",
    reference=False,
    logps="mean",
    monotone=True,
    extremes="linear",
    paper="ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood (Wang et al., 2024)",
    arxiv="2409.10571",
    equation="the ASFT loss",
)
def asft(stats: PairStats, *, beta: Positive = 1.0, nll_weight: NonNegative = 1.0) -> Tensor:
    """SFT with each side's own odds driven: chosen up, rejected down.

    ``nll_weight * -mean_logp_chosen + beta * (-log s(log_odds(chosen)) - log s(-log_odds(rejected)))``

    When to use:
        As ``orpo``, where each side's own likelihood shall be driven, not only the
        difference.

    Args:
        stats: log-probs and lengths of a batch of pairs; no reference is read.
        beta: weight of the two odds terms, in (0, inf): lambda in turbo-alignment.
        nll_weight: weight of the SFT part, in [0, inf).

    Returns:
        Losses ``[batch]``, non-negative.

    Limits:
        As ``orpo``; unbounded for a rejected answer that becomes certain.

    Source:
        arXiv:2409.10571, as turbo-alignment has it.
    """
    chosen, rejected = stats.policy_mean_chosen_logps, stats.policy_mean_rejected_logps
    odds = -logsigmoid(log_odds(chosen)) - logsigmoid(-log_odds(rejected))
    return -nll_weight * chosen + beta * odds
