"""Intervals: values derived by hand or from scipy, and laws of clustering."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_dpo.evaluation import accuracy_interval, mean_interval, summarise, tell_of_gaps
from lora_dpo.stats import PairStats


def test_rows_without_a_finite_log_prob_are_named(caplog: pytest.LogCaptureFixture) -> None:
    logps = torch.full((12,), -3.0)
    found = PairStats(logps, logps.clone(), torch.ones(12), torch.ones(12))
    rows = [{"file": "held.jsonl", "row": i + 1} for i in range(12)]
    with caplog.at_level("WARNING", "lora_dpo"):
        tell_of_gaps(found, rows)
    assert not caplog.records
    found.policy_rejected_logps[2], found.policy_rejected_logps[7] = math.nan, -math.inf
    with caplog.at_level("WARNING", "lora_dpo"):
        tell_of_gaps(found, rows)
    (record,) = caplog.records
    assert "2 of 12 rows" in record.message
    assert record.message.endswith("held.jsonl:3, held.jsonl:8")


def test_one_row_a_cluster_gives_the_ordinary_t_interval() -> None:
    values = np.random.default_rng(0).normal(size=20)
    found = mean_interval(values, np.arange(20))
    low, high = stats.t.interval(0.95, 19, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))


def test_copies_of_a_prompts_rows_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=30)
    once = mean_interval(values, np.arange(30))
    copied = mean_interval(np.repeat(values, 5), np.repeat(np.arange(30), 5))
    naive = mean_interval(np.repeat(values, 5), np.arange(150))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_one_prompt_alone_tells_nothing_about_others() -> None:
    found = mean_interval(np.array([1.0, 2.0]), np.array([0, 0]))
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_an_accuracy_with_independent_rows_has_about_the_wilson_interval() -> None:
    values = np.array([1.0] * 180 + [0.0] * 20)
    found = accuracy_interval(values, np.arange(200))
    wilson = stats.binomtest(180, 200).proportion_ci(method="wilson")
    # the variance has n - 1 below the sum, Wilson's n: half a percent of the width
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-3)


def test_all_right_is_not_certain_and_shared_prompts_count_once() -> None:
    sure = accuracy_interval(np.ones(100), np.arange(100))
    wilson = stats.binomtest(100, 100).proportion_ci(method="wilson")
    assert (sure.low, sure.high) == pytest.approx((wilson.low, wilson.high))
    shared = accuracy_interval(np.ones(100), np.arange(100) // 10)
    assert shared.low < sure.low - 0.1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Clusters of 4 rows that share a mean; 95 % of 400 draws, binomial error 1.1 %."""
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 4)
    hits = 0
    for _ in range(400):
        values = np.repeat(generator.normal(size=40), 4) + generator.normal(size=160)
        found = mean_interval(values, clusters)
        hits += found.low <= 0 <= found.high
    assert 0.91 < hits / 400 < 0.985


def test_a_summary_names_rows_prompts_and_every_metric() -> None:
    columns = {"loss": np.array([1.0, 2.0, 3.0]), "rewards/accuracies": np.array([1.0, 0.5, 0.0])}
    found = summarise(columns, ["a", "a", "b"])
    assert (found.rows, found.prompts) == (3, 2)
    assert found["loss"].mean == 2.0
    assert found["rewards/accuracies"].mean == 0.5
    assert "3 held-out rows, 2 prompts" in str(found)
