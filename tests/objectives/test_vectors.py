"""Losses, rewards and gradients against numbers from public implementations, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_dpo.objectives import OBJECTIVES, BoundObjective, coupled
from tests.objectives.vectors import (
    CASES,
    LEFT_OUT,
    VECTORS,
    bound_of,
    inputs_of,
    states_of,
)

RTOL, ATOL = 1e-9, 1e-11
# What a source lists in place of losses by row; the mean, which it trains on, is compared.
OTHER_ROWS = {
    "cal_dpo": "the batch's mean distance in every row",
    "cal_dpo_turbo": "as cal_dpo",
    "beta_dpo": "lists the pairs that were left out too",
    "sft": "token log-probs by row before the mean over tokens",
}
# Sources that report something else than the reward which the loss implies: only loss and gradient
# are compared.
OTHER_REWARDS = {
    "dpo_reference_free": "reports beta * logratio; nothing of the reference is in its loss",
    "alpha_dpo": "takes beta * alpha times the mean log-ratio off each side",
}


def _close(found: Tensor | None, expected: Any, rtol: float, atol: float) -> None:
    assert found is not None
    target = torch.tensor(_numbers(expected), dtype=torch.float64)
    torch.testing.assert_close(found.detach(), target, rtol=rtol, atol=atol, equal_nan=False)


def _numbers(value: Any) -> Any:
    return [_numbers(v) for v in value] if isinstance(value, list) else float(value)


def _in_the_sources_order(case: dict[str, Any], stats: Any, losses: Tensor) -> Tensor:
    """Sorted distributions: the source lists losses from the lowest quantile up."""
    if case["loss"] == "aot":
        return losses[(stats.policy_chosen_logps - stats.policy_rejected_logps).argsort()]
    return losses[stats.chosen_logratios.argsort()] if case["loss"] == "aot_unpaired" else losses


@pytest.mark.parametrize("case_id", CASES)
def test_losses_rewards_and_gradients_equal_the_public_implementation(
    case_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[case_id]
    bound, (stats, leaves) = bound_of(case), inputs_of(case)
    wanted = {**case["expect"], **(case["true"] if case.get("degenerate_in_source") else {})}
    rough = case["precision"].startswith("float32") and not case.get("degenerate_in_source")
    rtol, atol = (2e-5, 1e-7) if rough else (RTOL, ATOL)
    if "mask" in wanted.get("extra", {}):
        _replay(monkeypatch, wanted["extra"]["mask"])
    losses = bound(stats, states_of(case))
    losses.mean().backward()
    _close(losses.mean(), wanted["loss"], rtol, atol)
    if wanted.get("losses") is not None and case["loss"] not in OTHER_ROWS:
        _close(_in_the_sources_order(case, stats, losses), wanted["losses"], rtol, atol)
    if not case.get("nonsmooth_point"):
        for name, leaf in leaves.items():
            _close(_gradient(leaf), wanted["grad"][name], max(rtol, 1e-8), atol)
    _compare_rewards(bound, stats, wanted, rtol, atol)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _compare_rewards(
    bound: BoundObjective, stats: Any, wanted: dict[str, Any], rtol: float, atol: float
) -> None:
    if bound.objective.name in OTHER_REWARDS:
        return
    for mine, name in zip(
        bound.rewards(stats), ("chosen_rewards", "rejected_rewards"), strict=False
    ):
        if wanted.get(name) is not None:
            _close(mine, wanted[name], rtol, atol)


def _replay(monkeypatch: pytest.MonkeyPatch, mask: list[float]) -> None:
    """Take the rows that the source drew, after checking that as many would have been drawn."""

    def recorded(weights: Tensor, count: int) -> Tensor:
        assert count == int(sum(mask)) and len(weights) == len(mask)
        return torch.tensor(mask).bool()

    monkeypatch.setattr(coupled, "draw", recorded)


def test_every_loss_of_the_file_is_in_the_table_or_left_out_for_a_reason() -> None:
    used = {case["loss"] for case in CASES.values()}
    assert used | set(LEFT_OUT) == set(VECTORS["losses_of_the_full_file"])
    assert not used & set(LEFT_OUT)
    assert all(reason for reason in LEFT_OUT.values())


def test_every_objective_has_a_vector_or_a_derivation_of_its_own() -> None:
    covered = {term.objective.name for case in CASES.values() for term in bound_of(case).terms}
    # kto_running: our own baseline; tests/objectives/test_values.py derives its values
    # sft_demonstrations: tests/test_sft.py holds it against transformers' cross-entropy
    assert set(OBJECTIVES) - covered == {"kto_running", "sft_demonstrations"}
