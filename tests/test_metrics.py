"""Laws of the metrics: what a row counts for, what is no value, what survives a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_dpo import objectives
from lora_dpo.evaluation import evaluate_stats
from lora_dpo.metrics import Window, class_contrasts, row_metrics
from lora_dpo.objectives import OBJECTIVES, Positive
from lora_dpo.stats import LabelledStats


def _stats(count: int = 200, seed: int = 0) -> LabelledStats:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(count, generator=generator) < 0.3
    reference = -torch.rand(count, generator=generator).double() * 30 - 1
    policy = reference + torch.randn(count, generator=generator) + 0.5 * labels
    return LabelledStats(policy, torch.full((count,), 5), labels, reference)


@pytest.fixture
def labelled() -> objectives.BoundObjective:
    before = dict(OBJECTIVES)

    def rewards(stats: LabelledStats, *, beta: float) -> tuple[Tensor]:
        return (beta * stats.logratios,)

    @objectives.objective(
        rewards=rewards,
        data="unpaired",
        reference=True,
        logps="sum",
        monotone=True,
        extremes="bounded",
        paper="none",
        arxiv="none",
        equation="none",
    )
    def thumbs(stats: LabelledStats, *, beta: Positive = 0.1) -> Tensor:
        signs = stats.labels.to(stats.policy_logps.dtype) * 2 - 1
        return torch.sigmoid(-beta * signs * stats.logratios)

    try:
        return objectives.get("thumbs").bind()
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(before)


def test_each_class_has_its_own_means_and_the_other_class_no_value(
    labelled: objectives.BoundObjective,
) -> None:
    stats = _stats()
    values = row_metrics(labelled, stats, labelled(stats))
    rewards = 0.1 * stats.logratios
    for side, mine in (("chosen", stats.labels), ("rejected", ~stats.labels)):
        assert torch.equal(values[f"rewards/{side}"].isnan(), ~mine)
        assert float(values[f"rewards/{side}"].nanmean()) == pytest.approx(
            float(rewards[mine].mean())
        )


def test_order_and_margin_are_those_of_all_couples_counted_one_by_one() -> None:
    """The share of right couples is the Mann-Whitney statistic, by a double loop."""
    stats = _stats(40)
    rewards = (stats.logratios * 4).round() / 4  # with ties
    wanted, unwanted = rewards[stats.labels].tolist(), rewards[~stats.labels].tolist()
    right = sum((a > b) + 0.5 * (a == b) for a in wanted for b in unwanted)
    columns = class_contrasts(rewards, stats.labels)
    assert float(columns["rewards/accuracies"].mean()) == pytest.approx(
        right / len(wanted) / len(unwanted)
    )
    assert float(columns["rewards/margins"].mean()) == pytest.approx(
        np.mean(wanted) - np.mean(unwanted)
    )


def test_the_interval_of_the_order_covers_the_truth_about_as_often_as_it_says(
    labelled: objectives.BoundObjective,
) -> None:
    """Two normals half a deviation apart: the truth is Phi(0.5 / sqrt 2) = 0.6382."""
    covered = 0
    for seed in range(150):
        found = evaluate_stats(_stats(120, seed), labelled, list(range(120)))
        interval = found["rewards/accuracies"]
        covered += interval.low <= 0.63816 <= interval.high
    assert 0.90 <= covered / 150 <= 0.99


def test_a_class_that_is_absent_leaves_no_metric_and_no_alarm(
    labelled: objectives.BoundObjective,
) -> None:
    stats = _stats()
    only = stats.map(lambda _, value: value[stats.labels])
    found = evaluate_stats(only, labelled, list(range(len(only))))
    assert "rewards/chosen" in found.estimates
    assert not {"rewards/rejected", "rewards/margins", "rewards/accuracies"} & set(found.estimates)


def test_a_window_means_over_the_rows_that_have_a_value_and_survives_json_exactly() -> None:
    nan = float("nan")
    batches = [
        {"loss": torch.tensor([0.1, 0.2]), "rewards/chosen": torch.tensor([nan, 3.0])},
        {"loss": torch.tensor([0.7]), "rewards/chosen": torch.tensor([4.0])},
    ]
    window = Window()
    window.add(batches[0])
    window = Window.of(json.loads(json.dumps(window.state())))
    window.add(batches[1])
    expected = float(torch.tensor([0.1, 0.2, 0.7]).double().sum() / 3)
    assert window.means() == {"loss": expected, "rewards/chosen": 3.5}
    assert window.means() == {}


def test_a_loss_that_is_not_a_number_is_not_taken_for_an_absent_one() -> None:
    window = Window()
    window.add({"loss": torch.tensor([0.1, float("nan")])})
    assert np.isnan(window.means()["loss"])
