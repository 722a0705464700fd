"""Losses, rewards and gradients against numbers from public implementations, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dpo import objectives
from lora_dpo.logprobs import predicting_positions, sum_by_row, token_logps
from lora_dpo.stats import PairStats

VECTORS = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "dpo_vectors.json").read_text(encoding="utf-8")
)
CASES = {case["id"]: case for case in VECTORS["cases"]}
RTOL, ATOL = 1e-9, 1e-11


def _bound(params: dict[str, Any]) -> objectives.BoundObjective:
    params = dict(params)
    name = "dpo_reference_free" if params.pop("reference_free", False) else "dpo"
    return objectives.get(name).bind(**params)


def _close(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(
        found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=RTOL, atol=ATOL
    )


@pytest.mark.parametrize("case_id", [i for i, c in CASES.items() if c["loss"] == "dpo"])
def test_losses_rewards_and_gradients_equal_the_public_implementation(case_id: str) -> None:
    case = CASES[case_id]
    values = VECTORS["batches"][case["batch"]]
    chosen, rejected, fixed_chosen, fixed_rejected = (
        torch.tensor(values[key], dtype=torch.float64)
        for key in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    )
    chosen.requires_grad_()
    rejected.requires_grad_()
    lengths = torch.tensor(values["len_chosen"]), torch.tensor(values["len_rejected"])
    bound = _bound(case["params"])
    stats = PairStats(chosen, rejected, *lengths, fixed_chosen, fixed_rejected)
    losses = bound(stats)
    losses.mean().backward()
    expected = case["expect"]
    _close(losses, expected["losses"])
    _close(losses.mean(), expected["loss"])
    _close(chosen.grad, expected["grad"]["policy_chosen"])
    _close(rejected.grad, expected["grad"]["policy_rejected"])
    # without a reference the source still reports beta * logratio; ours is beta * logp
    if expected.get("chosen_rewards") is not None and bound.objective.reference:
        mine = bound.rewards(stats)
        _close(mine[0], expected["chosen_rewards"])
        _close(mine[1], expected["rejected_rewards"])


@pytest.mark.parametrize("case_id", [i for i, c in CASES.items() if c["loss"] == "dpo_logits"])
def test_loss_from_logits_equals_the_public_implementation_with_gradient(case_id: str) -> None:
    case = CASES[case_id]
    values = VECTORS["batches"][case["batch"]]
    ids, labels = torch.tensor(values["input_ids"]), torch.tensor(values["labels"])
    policy = torch.tensor(values["policy_logits"], dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(values["ref_logits"], dtype=torch.float64)
    rows, columns = predicting_positions(labels != -100)

    def sums(logits: torch.Tensor) -> torch.Tensor:
        # the logits stand in for hidden states, and the head is the identity
        found = token_logps(logits[rows, columns], ids[rows, columns + 1], lambda x: x, chunk=3)
        return sum_by_row(found, rows, len(ids))

    lengths = (labels[:, 1:] != -100).sum(1)
    half = len(ids) // 2
    stats = PairStats(
        *sums(policy).split(half), *lengths.split(half), *sums(fixed).detach().split(half)
    )
    losses = _bound(case["params"])(stats)
    losses.mean().backward()
    _close(losses, case["expect"]["losses"])
    _close(policy.grad, case["expect"]["grad"]["policy_logits"])
