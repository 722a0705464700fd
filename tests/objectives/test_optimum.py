"""Where the minima of the objectives stand, against closed forms on a finite space of answers.

A world is one prompt, K answers with rewards ``r``, a reference and lengths, and preferences that
follow Bradley-Terry exactly: every ordered pair ``(y, y')`` is a row that weighs
``P(y > y') = sigmoid(r(y) - r(y'))``, so the mean over rows is the expectation, without sampling
noise, and every unordered pair weighs the same (the uniform opponents that IPO's theorem needs).

Most closed forms follow from one remark. For a loss ``f(z(y) - z(y'))`` on a score ``z`` of single
answers, the weighted pair ``{y, y'}`` contributes ``P f(d) + (1 - P) f(-d)``. If one ``z`` has all
its differences at the minima of these terms, it is the minimum of the sum. The logistic loss has
its minimum at ``d = logit P = r(y) - r(y')``, hence ``z = r + const``; which policy has that score,
and the constant from ``sum pi = 1``, is then algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from lora_dpo import objectives
from lora_dpo.objectives import BoundObjective
from lora_dpo.stats import LabelledStats
from tests.objectives.worlds import (
    FIVE,
    FOUR,
    TWO,
    World,
    assert_reaches,
    minimum,
    normalised_by,
    tilted,
    total_variation,
)

WORLDS = pytest.mark.parametrize("world", [FOUR, FIVE], ids=["four", "five"])


def bind(name: str, **values: float) -> BoundObjective:
    """Return an objective of the table with hyperparameters."""
    return objectives.get(name).bind(**values)


# ---- summed log-probs and a reference ------------------------------------------------------------


@WORLDS
@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_dpo_reaches_the_reference_tilted_by_reward_over_beta(world: World, beta: float) -> None:
    """The logistic minimum: ``beta * h = r + const``, so ``pi = ref * exp(r / beta) / Z``."""
    assert_reaches(world, bind("dpo", beta=beta), tilted(world, world.rewards / beta))


@WORLDS
def test_dpo_without_reference_reaches_the_tilted_uniform_distribution(world: World) -> None:
    """As ``dpo`` with a uniform reference, whatever the policy began at."""
    expected = (world.rewards / 0.5).log_softmax(0)
    assert_reaches(world, bind("dpo_reference_free", beta=0.5), expected)


def test_conservative_dpo_reaches_the_smoothed_preference() -> None:
    """Two answers: ``beta * gap = logit((1 - eps) P + eps (1 - P))``, the preference it is told."""
    told = 0.9 * TWO.wins[1, 0] + 0.1 * TWO.wins[0, 1]
    gap = torch.stack([torch.zeros(()).double(), torch.logit(told) / 0.5])
    assert_reaches(TWO, bind("dpo", beta=0.5, label_smoothing=0.1), tilted(TWO, gap))


@WORLDS
@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_robust_dpo_reaches_the_clean_optimum_on_noisy_labels(world: World, noise: float) -> None:
    """Its loss is the one whose mean over the flips is DPO's loss on the clean label.

    With ``l(z) = -log sigmoid(z)`` and a label flipped with probability eps, the mean of
    ``[(1 - eps) l(z) - eps l(-z)] / (1 - 2 eps)`` over the flip is ``l(z)`` of the clean label. Plain
    DPO on the same rows ends elsewhere.
    """
    noisy = replace(world, noise=noise)
    clean = tilted(world, world.rewards / 0.5)
    assert_reaches(noisy, bind("robust", beta=0.5, label_smoothing=noise), clean)
    assert total_variation(minimum(noisy, bind("dpo", beta=0.5)), clean) > 1e-2


@WORLDS
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ipo_on_sums_reaches_its_closed_form(world: World, beta: float) -> None:
    """``gap(y, y') = (p(y) - p(y')) / beta``, with ``p(y)`` the win rate against uniform opponents.

    The derivative of ``sum_{y'} P (h - h' - c)^2 + (1 - P) (h' - h - c)^2`` with ``c = 1 / (2 beta)``
    by ``h(y)`` vanishes where ``sum_{y'} (h - h') = 2c sum_{y'} (P(y > y') - 1/2)``; the tabular
    ``h(y) = sum_{y'} P(y > y') / (K beta)``, y among its own opponents with 1/2, does that for all y.
    """
    assert_reaches(world, bind("ipo_sum", beta=beta), tilted(world, world.wins.mean(1) / beta))


@WORLDS
def test_rebel_reaches_the_reference_tilted_by_the_scores(world: World) -> None:
    """A regression of the gap on the score gap: 0 at ``h = eta * r + const``."""
    objective = bind("rebel", eta=1.5)
    assert_reaches(world, objective, tilted(world, 1.5 * world.rewards))


@WORLDS
@pytest.mark.parametrize("name", ["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"])
def test_reward_aware_preference_optimisation_ends_with_loss_0(world: World, name: str) -> None:
    """A distance between the logits ``eta * r_gap`` and ``beta * h_gap``: 0 where they agree.

    The KL between Bernoullis with these logits, in both directions, and the squared difference.
    """
    objective = bind(name, beta=0.5, eta=1.0)
    expected = tilted(world, world.rewards / 0.5)
    assert_reaches(world, objective, expected)
    assert float(world.loss(objective, expected)) == pytest.approx(0, abs=1e-12)


# ---- f-divergences ------------------------------------------------------------------------------

DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # f'(u) = s  ->  log u as a function of s, and the s below which that is defined
    "fdpo_forward_kl": (lambda s: -torch.log(-s), 0.0),
    "fdpo_js": (lambda s: s - torch.log(2 - s.exp()), math.log(2)),
    "fdpo_alpha": (lambda s: -2 * torch.log1p(-0.5 * s), 2.0),
}


@WORLDS
@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_dpo_reaches_the_inverse_derivative_of_the_reward(world: World, name: str) -> None:
    """The logistic minimum of ``beta * f'(pi / ref)`` is ``f'(u) = r / beta + k``, with sum ref u = 1.

    ``f'(u)`` is ``-1 / u`` (forward KL), ``log(2u / (1 + u))`` (Jensen-Shannon) and
    ``(1 - u^-a) / a`` (alpha, here 1/2); each is bounded above, which bounds ``k``.
    """
    beta = 2.0
    log_u, bound = DIVERGENCES[name]
    reward = world.rewards / beta
    top = bound - float(reward.max())
    expected = normalised_by(lambda k: world.reference + log_u(reward + k), top - 400, top - 1e-9)
    further = {"alpha": 0.5} if name == "fdpo_alpha" else {}
    assert_reaches(world, bind(name, beta=beta, **further), expected)


# ---- log-probs per token ------------------------------------------------------------------------


def per_token(world: World, base: Tensor, gain: Tensor) -> Tensor:
    """Return ``base(y) + |y| * (gain(y) + k)``, ``k`` from the sum of the probabilities."""
    return normalised_by(lambda k: base + world.tokens * (gain + k), -100, 100)


@WORLDS
def test_ipo_per_token_reaches_its_closed_form_per_token(world: World) -> None:
    """IPO's gap for ``h(y) / |y|``: ``h(y) = |y| (p(y) / beta + k)``."""
    expected = per_token(world, world.reference, world.wins.mean(1) / 0.5)
    assert_reaches(world, bind("ipo", beta=0.5), expected)


@WORLDS
def test_length_normalised_dpo_reaches_the_reward_per_token(world: World) -> None:
    """The logistic minimum for ``beta * h(y) / |y|``: ``h(y) = |y| (r(y) / beta + k)``."""
    expected = per_token(world, world.reference, world.rewards / 5.0)
    assert_reaches(world, bind("dpo_norm", beta=5.0), expected)


@WORLDS
def test_simpo_without_margin_reaches_the_reward_per_token_without_reference(world: World) -> None:
    """The logistic minimum for ``beta * log pi(y) / |y|``: ``log pi(y) = |y| (r(y) / beta + k)``."""
    expected = per_token(world, torch.zeros_like(world.rewards), world.rewards / 5.0)
    assert_reaches(world, bind("simpo", beta=5.0, gamma=0.0), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.5])
def test_simpos_margin_widens_the_gap_of_two_answers(gamma: float) -> None:
    """``z = beta (a - a')`` solves ``P sigmoid(gamma - z) = (1 - P) sigmoid(gamma + z)``.

    That is the derivative of ``-P log sigmoid(z - gamma) - (1 - P) log sigmoid(-z - gamma)``. More
    than two answers have no closed form with a margin.
    """
    p = float(TWO.wins[1, 0])

    def derivative(z: float) -> float:
        return (1 - p) / (1 + math.exp(-gamma - z)) - p / (1 + math.exp(z - gamma))

    z = float(brentq(derivative, 0, 50, xtol=1e-14))
    assert z > math.log(p / (1 - p))  # further than the preferences alone would go
    gain = torch.tensor([0.0, z / 2.0], dtype=torch.float64)
    expected = per_token(TWO, torch.zeros_like(gain), gain)
    assert_reaches(TWO, bind("simpo", beta=2.0, gamma=gamma), expected)


# ---- ORPO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_orpo_stands_between_likelihood_and_halved_log_odds(weight: float) -> None:
    """Two answers of one token: the log-odds ``u`` solve ``s(u) - q + 2 w (s(2u) - q) = 0``.

    With ``p = s(u)`` the odds ratio of the answers is ``(p / (1 - p))^2 = e^(2u)``, so the loss is
    ``-q log s(u) - (1 - q) log s(-u) + w [-q log s(2u) - (1 - q) log s(-2u)]`` and its derivative by
    ``u`` is the left side. ``u`` lies between ``logit(q) / 2``, where the odds term alone has its
    minimum, and ``logit(q)``, where the likelihood of winners has.
    """
    world = replace(TWO, lengths=(1, 1))
    q = float(world.wins[1, 0])

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    u = float(brentq(lambda u: s(u) - q + 2 * weight * (s(2 * u) - q), -50, 50, xtol=1e-14))
    assert math.log(q / (1 - q)) / 2 < u < math.log(q / (1 - q))
    expected = torch.tensor([0.0, u], dtype=torch.float64).log_softmax(0)
    assert_reaches(world, bind("orpo", beta=weight), expected)


# ---- losses that see the answers of a pair one by one ---------------------------------------------

FREE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sppo_hard": lambda p, beta: (p - 0.5) / beta,
    "bco_pair": lambda p, beta: torch.logit(p) / beta,
    "nca_pair": lambda p, beta: torch.log(2 * p) / beta,
}


@WORLDS
@pytest.mark.parametrize("name", FREE)
def test_pointwise_losses_identify_the_win_rate_of_each_answer(world: World, name: str) -> None:
    """On free log-ratios an answer is chosen in a share ``p`` of its rows and rejected in the rest.

    ``p (h - 1/(2b))^2 + (1 - p) (h + 1/(2b))^2`` has its minimum at ``h = (p - 1/2) / b`` (SPPO);
    ``-p log s(bh) - (1 - p) log s(-bh)`` at ``logit(p) / b`` (BCO without shift);
    ``-p log s(bh) - 1/2 log s(-bh)`` at ``s(bh) = p / (p + 1/2)``, that is ``log(2p) / b`` (NCA).
    """
    expected = world.reference + FREE[name](world.win_rates, 0.5)
    found = minimum(world, bind(name, beta=0.5), normalised=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((expected - world.reference).abs().max()) > 0.5


# ---- losses without an interior or a smooth optimum ------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_hinge_takes_the_majority_and_stops_at_the_margin(beta: float) -> None:
    """``P max(0, 1 - z) + (1 - P) max(0, 1 + z)`` with P > 1/2: piecewise linear, least at ``z = 1``.

    Slopes: ``-P`` below -1, ``1 - 2P < 0`` between, ``1 - P`` above 1. So the gap is ``1 / beta``
    whatever the strength of the preference.
    """
    objective = bind("hinge", beta=beta)

    def at(z: float) -> float:
        gap = torch.tensor([0.0, z / beta], dtype=torch.float64)
        return float(TWO.loss(objective, TWO.reference + gap))

    p = float(TWO.wins[1, 0])
    for low, high, slope in ((-3, -1, -p), (-1, 1, 1 - 2 * p), (1, 3, 1 - p)):
        assert (at(high) - at(low)) / (high - low) == pytest.approx(slope, abs=1e-12)


def labelled(ratios: Tensor, labels: Tensor, baseline: float) -> LabelledStats:
    """Return rows with these log-ratios, whose mismatched completions estimate the baseline."""
    zeros = torch.zeros_like(ratios)
    return LabelledStats(
        policy_logps=ratios - 20.0,
        reference_logps=zeros.detach() - 20.0,
        lengths=torch.full(ratios.shape, 3),
        labels=labels,
        policy_mismatched_logps=zeros.detach() - 20.0 + baseline,
        reference_mismatched_logps=zeros.detach() - 20.0,
    )


def kto_gradient(ratios: Tensor, wanted: Tensor, unwanted_weight: float) -> Tensor:
    """Return the gradient of KTO's expected loss by the log-ratio of each of K answers.

    Answers are equally frequent; answer ``y`` is labelled wanted with probability ``wanted[y]``.
    """
    objective = bind("kto", beta=0.3, desirable_weight=1.0, undesirable_weight=unwanted_weight)
    free = ratios.clone().requires_grad_()
    labels = torch.tensor([True] * len(ratios) + [False] * len(ratios))
    losses = objective(labelled(free.repeat(2), labels, 0.7), objective.initial_states())
    (losses * torch.cat([wanted, 1 - wanted])).sum().div(len(ratios)).backward()  # type: ignore[no-untyped-call]
    assert free.grad is not None
    return free.grad


def test_kto_pushes_every_answer_by_the_majority_of_its_labels_without_end() -> None:
    """``dL/dh(y) = -beta s (1 - s) mu(y) (p lamD - (1 - p) lamU)``, ``s = sigmoid(beta (h - z0))``.

    The sign does not depend on ``h``: the only stationary points are answers whose labels balance,
    so KTO has no interior optimum (it takes the majority's side and saturates).
    """
    wanted = torch.tensor([0.9, 0.2, 0.5, 0.6], dtype=torch.float64)
    unwanted_weight = 1.5  # balances p = 0.6 exactly: 0.6 * 1 = 0.4 * 1.5
    pull = wanted - (1 - wanted) * unwanted_weight
    for ratios in ([0.4, -2.0, 1.0, 3.0], [-9.0, 8.0, -0.3, 0.0], [30.0, -40.0, 5.0, -6.0]):
        h = torch.tensor(ratios, dtype=torch.float64)
        s = torch.sigmoid(0.3 * (h - 0.7))
        found = kto_gradient(h, wanted, unwanted_weight)
        torch.testing.assert_close(found, -0.3 * s * (1 - s) * pull / 4, rtol=1e-9, atol=1e-16)
        assert (found[:3].sign() == -pull[:3].sign()).all()
        assert abs(float(found[3])) < 1e-16


def test_kto_falls_all_the_way_to_certainty() -> None:
    """Along ``h = t * sign(p lamD - (1 - p) lamU)`` the loss falls for every t, to its infimum.

    The infimum is ``mean(min(p lamD, (1 - p) lamU))``: each answer is left with the weight of its
    minority.
    """
    wanted = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)
    objective = bind("kto", beta=0.3, desirable_weight=1.0, undesirable_weight=1.5)
    pull = wanted - (1 - wanted) * 1.5
    labels = torch.tensor([True] * 3 + [False] * 3)
    weights = torch.cat([wanted, 1 - wanted]) / 3
    losses = []
    for t in (0.0, 1.0, 5.0, 20.0, 100.0):
        stats = labelled((t * pull.sign()).repeat(2), labels, 0.7)
        losses.append(float((objective(stats, objective.initial_states()) * weights).sum()))
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[1] > 1e-3
    assert losses[-1] == pytest.approx(
        float(torch.minimum(wanted, (1 - wanted) * 1.5).mean()), abs=1e-9
    )
