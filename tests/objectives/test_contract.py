"""What every row of the table must hold: add an objective and all of this is asked of it."""

from __future__ import annotations

import math

import pytest
import torch

from lora_dpo import objectives
from lora_dpo.errors import ConfigError
from lora_dpo.objectives import OBJECTIVES, BoundObjective, Interval, Objective
from lora_dpo.stats import PairStats

EVERY = pytest.mark.parametrize("row", OBJECTIVES.values(), ids=list(OBJECTIVES))


def _stats(
    *columns: list[float],
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    reference: bool = True,
) -> PairStats:
    chosen, rejected, fixed_chosen, fixed_rejected = (
        torch.tensor(column, dtype=dtype) for column in columns
    )
    if grad:
        chosen.requires_grad_()
        rejected.requires_grad_()
    lengths = torch.full((len(chosen),), 7), torch.full((len(chosen),), 11)
    fixed = (fixed_chosen, fixed_rejected) if reference else ()
    return PairStats(chosen, rejected, *lengths, *fixed)


def _random(count: int = 6, seed: int = 0, **options: object) -> PairStats:
    generator = torch.Generator().manual_seed(seed)
    values = -torch.rand(4, count, generator=generator, dtype=torch.float64) * 40 - 1
    return _stats(*values.tolist(), **options)  # type: ignore[arg-type]


def _bounds(row: Objective) -> list[BoundObjective]:
    smoothing = {"label_smoothing": 0.2} if "label_smoothing" in row.hyperparameters else {}
    return [row.bind(), row.bind(**smoothing)]


@EVERY
def test_losses_are_finite_at_log_ratios_of_ten_thousand_and_at_a_certain_completion(
    row: Objective,
) -> None:
    far = 1e4
    columns = (
        [-1.0, -far, 0.0, -far],
        [-far, -1.0, -far, 0.0],
        [-far, -1, -1, 0],
        [-1, -far, 0, -1],
    )
    for dtype in (torch.float32, torch.float64):
        stats = _stats(*map(list, columns), dtype=dtype, grad=True)
        for bound in _bounds(row):
            losses = bound(stats)
            losses.sum().backward()
            assert losses.isfinite().all()
            assert stats.policy_chosen_logps.grad.isfinite().all()


@EVERY
def test_gradient_is_the_numerical_one_in_float64(row: Objective) -> None:
    base = _random()
    fixed = (base.reference_chosen_logps, base.reference_rejected_logps)
    lengths = (base.chosen_lengths, base.rejected_lengths)
    inputs = tuple(
        x.clone().requires_grad_() for x in (base.policy_chosen_logps, base.policy_rejected_logps)
    )
    for bound in _bounds(row):
        assert torch.autograd.gradcheck(
            lambda c, r, bound=bound: bound(PairStats(c, r, *lengths, *fixed)), inputs
        )


@EVERY
def test_rows_do_not_touch_each_other_unless_declared(row: Objective) -> None:
    together = _random()
    bound = row.bind()
    alone = torch.cat([bound(_take(together, i)) for i in range(6)])
    equal = torch.allclose(bound(together), alone, rtol=1e-12)
    assert equal is not row.couples_rows


@EVERY
def test_the_reference_is_read_exactly_if_declared(row: Objective) -> None:
    stats = _random(reference=False)
    if row.reference:
        with pytest.raises(ValueError, match="there is no reference"):
            row.bind()(stats)
    else:
        assert row.bind()(stats).shape == (6,)
        torch.testing.assert_close(row.bind()(stats), row.bind()(_random()))


@EVERY
def test_a_higher_chosen_log_prob_never_raises_the_loss_if_declared_monotone(
    row: Objective,
) -> None:
    stats = _random(grad=True)
    row.bind()(stats).sum().backward()
    falls = bool((stats.policy_chosen_logps.grad <= 0).all())
    assert falls or not row.monotone


@EVERY
def test_mean_log_probs_are_read_exactly_if_declared(row: Objective) -> None:
    stats = _random()
    longer = PairStats(
        stats.policy_chosen_logps,
        stats.policy_rejected_logps,
        stats.chosen_lengths * 3,
        stats.rejected_lengths * 2,
        stats.reference_chosen_logps,
        stats.reference_rejected_logps,
    )
    same = torch.equal(row.bind()(stats), row.bind()(longer))
    assert same is not row.reads_lengths


@EVERY
def test_the_loss_at_a_bad_margin_grows_as_declared(row: Objective) -> None:
    at = {m: float(row.bind()(_stats([-m], [0.0], [0.0], [0.0])).mean()) for m in (1e3, 2e3, 4e3)}
    first, second = at[2e3] - at[1e3], at[4e3] - at[2e3]
    expected = {"linear": 2.0, "quadratic": 4.0, "bounded": None}[row.extremes]
    if expected is None:
        assert abs(second) < 1e-6
    else:
        assert second / first == pytest.approx(expected, rel=1e-2)


@EVERY
def test_float32_agrees_with_float64(row: Objective) -> None:
    exact = row.bind()(_random())
    rough = row.bind()(_random(dtype=torch.float32))
    torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=1e-6)


@EVERY
def test_rewards_move_with_the_log_probs_and_carry_beta(row: Objective) -> None:
    if "beta" not in row.hyperparameters:
        return
    stats = _random()
    one, two = (row.bind(beta=b).rewards(stats) for b in (0.1, 0.2))
    for small, large in zip(one, two, strict=True):
        torch.testing.assert_close(2 * small, large)


@EVERY
def test_a_foreign_hyperparameter_is_refused_with_the_legal_ones(row: Objective) -> None:
    with pytest.raises(ConfigError, match="no such hyperparameter; it takes"):
        row.bind(certainly_not=1.0)


@EVERY
def test_a_hyperparameter_outside_its_interval_is_refused(row: Objective) -> None:
    for known in row.hyperparameters.values():
        with pytest.raises(ConfigError, match="expects a number"):
            row.bind(**{known.name: -1.0})
        with pytest.raises(ConfigError, match="expects a number"):
            row.bind(**{known.name: "a"})  # type: ignore[arg-type]


@EVERY
def test_the_docstring_has_every_part_and_the_record_its_source(row: Objective) -> None:
    for part in ("Args:", "Returns:", "Limits:", "Source:", "Differs from:"):
        assert part in row.documentation
    assert row.arxiv in row.documentation
    for name in row.hyperparameters:
        assert f"{name}:" in row.documentation


def test_dpo_is_log_2_where_policy_equals_reference_whatever_the_hyperparameters() -> None:
    stats = _random().at_reference()
    for beta in (0.01, 0.1, 1.0):
        for smoothing in (0.0, 0.3):
            losses = objectives.dpo(stats, beta=beta, label_smoothing=smoothing)
            torch.testing.assert_close(
                losses, torch.full_like(losses, math.log(2)), rtol=1e-15, atol=0
            )


def test_swapping_the_sides_of_dpo_flips_the_margin() -> None:
    stats = _random()
    swapped = PairStats(
        stats.policy_rejected_logps,
        stats.policy_chosen_logps,
        stats.rejected_lengths,
        stats.chosen_lengths,
        stats.reference_rejected_logps,
        stats.reference_chosen_logps,
    )
    # -log sigmoid(z) - (-log sigmoid(-z)) = -z
    difference = objectives.dpo(stats, beta=0.1) - objectives.dpo(swapped, beta=0.1)
    torch.testing.assert_close(difference, -0.1 * stats.margins)


def test_label_smoothing_has_its_least_loss_at_the_log_odds() -> None:
    margin = torch.tensor([math.log(0.8 / 0.2) / 0.1], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    one = torch.ones(1)
    objectives.dpo(
        PairStats(margin, zero, one, one, zero, zero), beta=0.1, label_smoothing=0.2
    ).sum().backward()
    assert float(margin.grad) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_statistics_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32 or float64"):
        _stats([-1.0], [-2.0], [-1.0], [-2.0], dtype=dtype)


def test_shapes_that_differ_half_a_reference_and_empty_completions_are_refused() -> None:
    one, two, length = torch.zeros(1), torch.zeros(2), torch.ones(1)
    with pytest.raises(ValueError, match=r"must be \[batch\]"):
        PairStats(one, two, length, length)
    with pytest.raises(ValueError, match="whole or absent"):
        PairStats(one, one, length, length, one)
    with pytest.raises(ValueError, match="at least one token"):
        PairStats(one, one, length, 0 * length)
    with pytest.raises(ValueError, match="carries gradient"):
        PairStats(one, one, length, length, one.clone().requires_grad_(), one)


def test_a_user_registers_an_objective_and_a_taken_name_is_refused() -> None:
    before = dict(OBJECTIVES)
    try:

        @objectives.objective(
            rewards=OBJECTIVES["dpo"].rewards,
            data="paired",
            reference=True,
            logps="sum",
            monotone=True,
            extremes="linear",
            paper="none",
            arxiv="none",
            equation="none",
        )
        def hinge_of_mine(stats: PairStats, *, beta: objectives.Positive = 0.5) -> torch.Tensor:
            return torch.relu(1 - beta * stats.margins)

        assert objectives.get("hinge_of_mine").bind(beta=1).hyperparameters == {"beta": 1.0}
        assert objectives.get("hinge_of_mine").hyperparameters["beta"].interval == Interval(
            above=0.0
        )
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(before)
    with pytest.raises(ConfigError, match="Did you mean 'dpo'"):
        objectives.get("dpoo")


def _take(stats: PairStats, i: int) -> PairStats:
    return PairStats(
        *(
            getattr(stats, name)[i : i + 1]
            for name in (
                "policy_chosen_logps",
                "policy_rejected_logps",
                "chosen_lengths",
                "rejected_lengths",
                "reference_chosen_logps",
                "reference_rejected_logps",
            )
        )
    )
