"""The contract sees each defect that it is there for: one planted objective for every property."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_dpo.objectives import OBJECTIVES, Positive, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.stats import PairStats
from lora_dpo.testing import CONTRACT, check_objective

SOUND: dict[str, Any] = {
    "rewards": scaled_logratios, "data": "paired", "reference": True, "logps": "sum",
    "monotone": True, "extremes": "linear", "paper": "none", "arxiv": "0000.00000", "equation": "none",
}  # fmt: skip
DOC = """Logistic loss.

Args:
    stats: log-probs of pairs.
    beta: per nat.

Returns:
    Losses.

Limits:
    ln 2.

Source:
    arXiv:0000.00000.
"""


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def enter(body: Callable[[PairStats, float], Tensor], doc: str = DOC, **facts: Any) -> str:
    def planted(stats: PairStats, *, beta: Positive = 0.1) -> Tensor:
        return body(stats, beta)

    planted.__doc__ = doc
    objective(**{**SOUND, **facts})(planted)
    return "planted"


def sound(stats: PairStats, beta: float) -> Tensor:
    return -torch.nn.functional.logsigmoid(beta * stats.margins)


def fails(name: str) -> set[str]:
    failed = set()
    for check_name, check in CONTRACT.items():
        try:
            check(OBJECTIVES[name])
        except (AssertionError, RuntimeError, ValueError, TypeError):
            failed.add(check_name)
    return failed


def test_the_sound_one_passes() -> None:
    check_objective(enter(sound))


def naive(stats: PairStats, beta: float) -> Tensor:
    return -torch.log(torch.sigmoid(beta * stats.margins))


def twice_in_backward(stats: PairStats, beta: float) -> Tensor:
    return _Twice.apply(sound(stats, beta))  # type: ignore[no-any-return]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def coupled(stats: PairStats, beta: float) -> Tensor:
    return -torch.nn.functional.logsigmoid(beta * (stats.margins - stats.margins.mean() / 2))


def by_length(stats: PairStats, beta: float) -> Tensor:
    return -torch.nn.functional.logsigmoid(beta * stats.margins / stats.chosen_lengths)


def without_reference(stats: PairStats, beta: float) -> Tensor:
    gap = stats.policy_chosen_logps - stats.policy_rejected_logps
    return -torch.nn.functional.logsigmoid(beta * gap)


def upwards(stats: PairStats, beta: float) -> Tensor:
    return -torch.nn.functional.logsigmoid(-beta * stats.margins)


def squared(stats: PairStats, beta: float) -> Tensor:
    return torch.relu(1 - beta * stats.margins) ** 2


def absolute(stats: PairStats, beta: float) -> Tensor:
    shifted = stats.margins + 1e-3 * stats.policy_chosen_logps
    return -torch.nn.functional.logsigmoid(beta * shifted)


def cancelling(stats: PairStats, beta: float) -> Tensor:
    return sound(stats, beta) + 1e6 - 1e6


def with_scores(stats: PairStats, beta: float) -> Tensor:
    return sound(stats, beta) * (1 + stats.score_gaps)


@pytest.mark.parametrize(
    ("body", "facts", "property_"),
    [
        (naive, {}, "finite_everywhere"),
        (twice_in_backward, {}, "gradient_is_numerical"),
        (coupled, {}, "rows_stand_alone_unless_declared"),
        (sound, {"couples_rows": True}, "rows_stand_alone_unless_declared"),
        (sound, {"reference": False}, "reference_is_read_if_declared"),
        (without_reference, {}, "reference_is_read_if_declared"),
        (with_scores, {}, "needs_are_the_real_ones"),
        (sound, {"needs": ("scores",)}, "needs_are_the_real_ones"),
        (by_length, {}, "lengths_are_read_if_declared"),
        (sound, {"logps": "mean"}, "lengths_are_read_if_declared"),
        (upwards, {"extremes": "bounded"}, "monotone_exactly_if_declared"),
        (sound, {"monotone": False}, "monotone_exactly_if_declared"),
        (absolute, {}, "fits_where_policy_equals_reference"),
        (squared, {}, "grows_as_declared"),
        (sound, {"extremes": "bounded"}, "grows_as_declared"),
        (sound, {"extremes": "logarithmic"}, "grows_as_declared"),
        (sound, {"extremes": "exponential"}, "grows_as_declared"),
        (cancelling, {}, "float32_agrees_with_float64"),
    ],
)
def test_a_planted_defect_is_named(body: Any, facts: dict[str, Any], property_: str) -> None:
    name = enter(body, **facts)
    assert property_ in fails(name)
    with pytest.raises(AssertionError, match=f"planted: {property_}: "):
        check_objective(name)


def test_rewards_that_fall_with_the_log_prob_or_lack_a_side_are_named() -> None:
    def falling(stats: PairStats, *, beta: float) -> tuple[Tensor, Tensor]:
        return -beta * stats.chosen_logratios, -beta * stats.rejected_logratios

    def one_side(stats: PairStats, *, beta: float) -> tuple[Tensor]:
        return (beta * stats.chosen_logratios,)

    for rewards in (falling, one_side):
        assert fails(enter(sound, rewards=rewards)) == {"rewards_rise_with_log_probs"}
        del OBJECTIVES["planted"]


def test_a_state_that_update_spoils_is_named() -> None:
    def spoils(state: Any, stats: PairStats, *, beta: float) -> Any:
        state["mean"] = 1.0
        return state

    def loses(state: Any, stats: PairStats, *, beta: float) -> Any:
        return {}

    for update in (spoils, loses):

        def planted(stats: PairStats, state: Any, *, beta: Positive = 0.1) -> Tensor:
            return sound(stats, beta)

        planted.__doc__ = DOC
        objective(**SOUND, initial_state={"mean": 0.0}, update=update)(planted)
        assert fails("planted") == {"state_is_remembered_apart"}
        del OBJECTIVES["planted"]


@pytest.mark.parametrize("part", ["Args:", "Returns:", "Limits:", "Source:", "beta:", "0000.00000"])
def test_a_part_that_the_docstring_lacks_is_named(part: str) -> None:
    assert fails(enter(sound, doc=DOC.replace(part, ""))) == {"documented"}


def test_half_precision_and_hyperparameters_are_refused_by_the_house_itself() -> None:
    # These two hold for any function: the record and the table see to them. So the planted defect
    # is in the house.
    name = enter(sound)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_dpo.stats.FLOATS", (torch.float32, torch.float64, torch.bfloat16))
        assert fails(name) == {"half_precision_is_refused"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_dpo.objectives._table.Hyperparameter.accepts", lambda *_: True)
        assert "hyperparameters_are_checked" in fails(name)
