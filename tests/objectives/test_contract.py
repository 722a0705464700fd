"""What every row of the table must hold: add an objective and all of this is asked of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lora_dpo import objectives
from lora_dpo.errors import ConfigError
from lora_dpo.objectives import OBJECTIVES, Interval
from lora_dpo.stats import PairStats
from lora_dpo.testing import CONTRACT


@pytest.mark.parametrize("check", CONTRACT.values(), ids=list(CONTRACT))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_the_contract(name: str, check: Any) -> None:
    check(OBJECTIVES[name])


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
