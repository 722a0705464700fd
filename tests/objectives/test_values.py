"""Values that no public implementation gives: derived by hand, or laws between members."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_dpo import objectives
from lora_dpo.errors import ConfigError
from lora_dpo.objectives import coupled, get
from lora_dpo.objectives._maths import log1mexp, log_odds, tangent_exp, tangent_expm1
from lora_dpo.stats import LabelledStats, PairStats
from lora_dpo.testing import random_stats


def labelled(logratios: list[float], labels: list[bool]) -> LabelledStats:
    values = torch.tensor(logratios, dtype=torch.float64)
    return LabelledStats(values, torch.ones(len(values)), torch.tensor(labels), 0 * values)


def test_the_running_baseline_of_kto_is_the_corrected_mean_of_earlier_steps() -> None:
    bound = get("kto_running").bind(beta=1.0, decay=0.5)
    states = bound.initial_states()
    first = labelled([2.0, 4.0], [True, False])
    # no step before: the baseline is 0
    torch.testing.assert_close(
        bound(first, states), torch.tensor([1 - _s(2.0), 1 - _s(-4.0)], dtype=torch.float64)
    )
    states = bound.updated(states, first)  # mean 3, weight 1/2: corrected mean 3
    torch.testing.assert_close(
        bound(first, states), torch.tensor([1 - _s(-1.0), 1 - _s(-1.0)], dtype=torch.float64)
    )
    states = bound.updated(states, labelled([-9.0, -9.0], [True, True]))
    # (1/4 * 3 + 1/2 * -9) / (3/4) is below 0, where the baseline ends
    torch.testing.assert_close(bound(first, states), bound(first, bound.initial_states()))


def test_class_weights_are_given_to_their_class_alone() -> None:
    stats = labelled([1.0, -2.0, 0.5], [True, False, True])
    for name in ("kto_running", "bco", "apo_zero_unpaired"):
        plain = get(name).bind()(stats)
        weighed = get(name).bind(desirable_weight=3.0, undesirable_weight=0.5)(stats)
        torch.testing.assert_close(weighed, plain * torch.tensor([3.0, 0.5, 3.0]).double())


@pytest.mark.parametrize(
    ("member", "hyperparameters", "same_as"),
    [
        ("dpo_shift", {"shift": 1.0}, "dpo"),
        ("dpop", {"dpop_lambda": 0.0, "beta": 0.1}, "dpo"),
        ("rdpo", {"alpha": 0.0}, "dpo"),
        ("ld_dpo", {"alpha": 1.0}, "dpo"),
        ("tdpo2", {"alpha": 0.0}, "dpo"),
        ("dpo_margin", {"eta": 0.0}, "dpo"),
        ("modpo", {"weight": 1.0}, "dpo"),
        ("robust", {"label_smoothing": 0.0}, "dpo"),
    ],
)
def test_members_reduce_to_dpo(
    member: str, hyperparameters: dict[str, float], same_as: str
) -> None:
    stats = random_stats(get(member))
    found = get(member).bind(**hyperparameters)(stats)
    torch.testing.assert_close(found, get(same_as).bind()(stats), rtol=1e-12, atol=1e-12)


def test_limits_between_members() -> None:
    stats = random_stats(get("dpo"), nats=4.0)
    near = objectives.fdpo_alpha(stats, beta=0.1, alpha=1e-7)
    torch.testing.assert_close(near, objectives.dpo(stats, beta=0.1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        objectives.fdpo_alpha(stats, beta=0.1, alpha=1.0),
        objectives.fdpo_forward_kl(stats, beta=0.1),
    )
    free = random_stats(get("simpo"))
    torch.testing.assert_close(
        objectives.alphapo(free, beta=2.0, gamma=0.5, alpha=1e-9),
        objectives.simpo(free, beta=2.0, gamma=0.5),
        rtol=1e-6,
        atol=1e-6,
    )
    robust = objectives.dr_dpo(stats, beta=0.1, beta_prime=1e7)
    torch.testing.assert_close(
        robust.mean(), objectives.dpo(stats, beta=0.1).mean(), rtol=1e-6, atol=0
    )


def test_robust_dpo_is_unbiased_for_the_stated_noise() -> None:
    # (1 - eps) * robust(z) + eps * robust(-z) = dpo(z), by the definition of both
    stats, noise = random_stats(get("dpo")), 0.2
    assert isinstance(stats, PairStats)
    mixed = (1 - noise) * objectives.robust(stats, beta=0.1, label_smoothing=noise)
    mixed = mixed + noise * objectives.robust(_swapped(stats), beta=0.1, label_smoothing=noise)
    torch.testing.assert_close(mixed, objectives.dpo(stats, beta=0.1))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo"])
def test_a_coupled_loss_of_one_row_is_dpo(name: str) -> None:
    stats = random_stats(get(name)).map(lambda _, value: value[:1])
    torch.testing.assert_close(get(name).bind(beta=0.1)(stats), get("dpo").bind()(stats))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo", "bco_pair_running", "alpha_dpo"])
def test_coupled_losses_follow_their_rows_when_these_are_shuffled(name: str) -> None:
    stats, order = random_stats(get(name)), torch.tensor([3, 1, 5, 0, 2, 4])
    losses = get(name).bind()(stats)
    shuffled = get(name).bind()(stats.map(lambda _, value: value[order]))
    torch.testing.assert_close(shuffled, losses[order])


def test_beta_dpo_weighs_pairs_by_their_standard_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-((margin - M) / S) ** 2 / 2), as log-weights, with M and S as the state has them."""
    margins = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    zeros, seen = torch.zeros_like(margins), []

    def first_ones(weights: Tensor, count: int) -> Tensor:
        seen.append(weights)
        return torch.arange(len(weights)) < count

    monkeypatch.setattr(coupled, "draw", first_ones)
    stats = PairStats(margins, zeros, zeros + 1, zeros + 1, zeros, zeros)
    get("beta_dpo").bind()(stats, {"beta_dpo": {"mean": 1.0, "std": 1.5}})
    torch.testing.assert_close(seen[0], torch.tensor([0.0, -2.0, -2.0], dtype=torch.float64))


def test_terms_of_a_mixture_take_the_same_kind_of_data() -> None:
    for names, works in ((("dpo", "ipo"), True), (("dpo", "kto"), False)):
        terms = [{"name": name, "weight": 1.0} for name in names]
        if works:
            assert objectives.build({"name": "mixture", "terms": terms}).data == "paired"
        else:
            with pytest.raises(ConfigError, match=r"same kind of data; got dpo \(paired\), kto"):
                objectives.build({"name": "mixture", "terms": terms})


def test_beta_dpo_keeps_the_likely_pairs_and_means_over_them() -> None:
    zeros = torch.zeros(5, dtype=torch.float64)
    margins = torch.tensor([0.0, 0.1, -0.1, 0.05, 400.0], dtype=torch.float64)
    stats = PairStats(margins, zeros, zeros + 1, zeros + 1, zeros, zeros)
    losses = get("beta_dpo").bind(rho=0.2)(stats)
    assert losses[4] == 0 and bool((losses[:4] > 0).all())
    kept = margins[:4]
    adapted = 0.1 * (1 + 0.6 * float(kept.mean()))
    torch.testing.assert_close(losses.mean(), torch.nn.functional.softplus(-adapted * kept).mean())


def test_a_pair_whose_scores_do_not_prefer_chosen_asks_nothing_of_odpo() -> None:
    one = torch.ones(3, dtype=torch.float64)
    policy = (-one).requires_grad_()
    scores = (
        torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 0.0]).double(),
    )
    losses = objectives.odpo(
        PairStats(policy, -2 * one, one, one, -one, -one, *scores), beta=0.5, alpha=1.0
    )
    losses.sum().backward()
    losses = losses.detach()
    assert losses[:2].tolist() == [0.0, 0.0] and float(losses[2]) == pytest.approx(
        math.log1p(math.exp(-0.5))
    )
    assert policy.grad is not None and policy.grad[:2].tolist() == [0.0, 0.0]


# ---- the functions beneath --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_has_all_digits_of_value_and_gradient(dtype: torch.dtype) -> None:
    import mpmath

    for value in (-1e-12, -1e-8, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -40.0):
        x = torch.tensor(value, dtype=dtype, requires_grad=True)
        found = log1mexp(x)
        found.backward()
        found = found.detach()
        exact = mpmath.mpf(float(x.detach()))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert float(found) == pytest.approx(float(mpmath.log(-mpmath.expm1(exact))), rel=tolerance)
        slope = -mpmath.exp(exact) / -mpmath.expm1(exact)
        assert x.grad is not None
        assert float(x.grad) == pytest.approx(float(slope), rel=tolerance)


def test_the_odds_of_a_certain_completion_are_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, dtype=dtype, requires_grad=True)
        log_odds(x).backward()
        assert float(log_odds(x).detach()) > 60 and bool(log_odds(x).isfinite())
        assert x.grad is not None and bool(x.grad.isfinite())


def test_the_exponential_goes_on_as_its_tangent() -> None:
    for dtype, cut in ((torch.float32, 60.0), (torch.float64, 600.0)):
        x = torch.tensor([0.0, 1.0, cut, cut + 5.0, 1e4], dtype=dtype, requires_grad=True)
        found = tangent_exp(x)
        torch.testing.assert_close(found[:3], torch.exp(x[:3]))
        torch.testing.assert_close(found[3], torch.exp(x[2]) * 6)
        found.sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all()) and x.grad[4] == x.grad[3]
    tiny = torch.tensor(1e-12, dtype=torch.float64)
    assert float(tangent_expm1(tiny)) == pytest.approx(1e-12, rel=1e-12)


def _s(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _swapped(stats: PairStats) -> PairStats:
    other = {"chosen": "rejected", "rejected": "chosen"}

    def name(key: str) -> str:
        side = "chosen" if "chosen" in key else "rejected"
        return key.replace(side, other[side])

    fields: dict[str, Tensor] = {name(key): value for key, value in stats.present().items()}
    return PairStats(**fields)
