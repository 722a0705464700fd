"""Scores and rankings: what an answer is worth reaches the objective, and pairs follow a stated rule."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from lora_dpo.data import (
    collate_labelled,
    collate_pairs,
    label_counts,
    load_preferences,
    require_scores,
    tokenise,
    with_mismatched,
)
from lora_dpo.errors import DataError

PAIR = {"prompt": "Say it:", "chosen": " yes", "rejected": " no"}
ULTRA = {
    "instruction": "Name a bird.",
    "completions": [
        {"response": "A wren.", "overall_score": 6.0, "fine-grained_score": 4.5},
        {"response": "A robin.", "overall_score": 9.0, "fine-grained_score": 4.75},
        {"response": "A stone.", "overall_score": 10.0, "fine-grained_score": 1.25},
        {"response": "An owl.", "overall_score": 8.0, "fine-grained_score": 4.5},
    ],
}
WORTHS = {"A wren.": 4.5, "A robin.": 4.75, "A stone.": 1.25, "An owl.": 4.5}


def text(part: Any) -> str:
    return part if isinstance(part, str) else part[-1]["content"]


@pytest.mark.parametrize(
    "columns",
    [
        {"score_chosen": 8, "score_rejected": 5.5},
        {"chosen_score": 8, "rejected_score": 5.5},
        {"chosen-rating": "8", "rejected-rating": "5.5"},
        {"chosen_rating": 8.0, "rejected_rating": 5.5},
    ],
)
def test_scores_are_found_under_the_usual_names(columns: dict[str, Any], merging: Any) -> None:
    loaded = load_preferences([{**PAIR, **columns}])
    assert (loaded.rows[0].score_chosen, loaded.rows[0].score_rejected) == (8.0, 5.5)
    assert not loaded.report.noted
    rows = list(tokenise(loaded, merging, max_length=64).rows)
    batch = collate_pairs(rows, pad_id=0)
    assert batch.chosen_scores.tolist() == [8.0] and batch.rejected_scores.tolist() == [5.5]


def test_a_margin_alone_is_a_score_difference() -> None:
    row = load_preferences([{**PAIR, "margin": 2.5}]).rows[0]
    assert (row.score_chosen, row.score_rejected) == (2.5, 0.0)


@pytest.mark.parametrize("value", ["high", float("nan"), float("inf"), True])
def test_a_score_is_a_finite_number(value: Any) -> None:
    with pytest.raises(DataError, match=r"<memory>:1: score_chosen is .*expected a number"):
        load_preferences([{**PAIR, "score_chosen": value, "score_rejected": 1}])


def test_pairs_below_the_least_margin_are_dropped_and_counted() -> None:
    rows = [{**PAIR, "prompt": f"{i}?", "margin": i} for i in range(5)]
    rows.append({**PAIR, "prompt": "none?"})
    assert len(load_preferences(rows, min_margin=0.5).rows) == 4
    loaded = load_preferences(rows, min_margin=2)
    assert [row.prompt for row in loaded.rows] == ["2?", "3?", "4?"]
    counts = {reason: entry.count for (_, reason), entry in loaded.report.entries.items()}
    assert counts["dropped: score margin below min_margin 2"] == 2
    assert counts["dropped: no scores, which min_margin compares"] == 1


def test_a_least_margin_needs_pairs_and_a_number() -> None:
    single = {"prompt": "p", "completion": "c", "label": True}
    with pytest.raises(DataError, match="min_margin compares the scores of pairs"):
        load_preferences([single], min_margin=1)
    with pytest.raises(DataError, match="min_margin is -1; expected"):
        load_preferences([PAIR], min_margin=-1)


EXPECTED = {
    "best-worst": {("A robin.", "A stone.")},
    "adjacent": {("A robin.", "A wren."), ("An owl.", "A stone.")},
    "best-rest": {("A robin.", other) for other in WORTHS if other != "A robin."},
    "all": {
        (a, b) if WORTHS[a] > WORTHS[b] else (b, a)
        for a, b in combinations(WORTHS, 2)
        if WORTHS[a] != WORTHS[b]
    },
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_several_answers_become_pairs_by_the_rule(rule: Any) -> None:
    loaded = load_preferences(
        [ULTRA, PAIR | ULTRA | {"instruction": "Another."}][:1], ranking_pairs=rule
    )
    assert {(text(r.chosen), text(r.rejected)) for r in loaded.rows} == EXPECTED[rule]
    for row in loaded.rows:
        assert row.score_chosen == WORTHS[text(row.chosen)]
        assert row.score_rejected == WORTHS[text(row.rejected)]
        assert row.origin.row == 1
    report = loaded.report
    assert report.read == 1 and len(loaded) == report.read - report.dropped + report.added


def test_ranks_order_answers_and_are_no_scores() -> None:
    rows = [{"prompt": "q?", "answers": [{"answer": f"a{r}", "rank": r} for r in (3, 1, 2)]}]
    row = load_preferences(rows).rows[0]
    assert (text(row.chosen), text(row.rejected), row.score_chosen) == ("a1", "a3", None)


def test_lists_of_answers_and_numbers_stand_beside_each_other() -> None:
    rows = [{"prompt": "q?", "responses": ["low", "high"], "scores": [1, 2]}]
    row = load_preferences(rows).rows[0]
    assert (row.chosen, row.rejected, row.score_chosen) == ("high", "low", 2.0)
    with pytest.raises(DataError, match=r"<memory>:1: scores has 1 numbers for the 2 responses"):
        load_preferences([{**rows[0], "scores": [1]}])
    with pytest.raises(DataError, match=r"<memory>:1: responses holds 2 answers without a score"):
        load_preferences([{k: v for k, v in rows[0].items() if k != "scores"}])


def test_a_ranking_of_equals_is_dropped_and_counted() -> None:
    rows = [
        {"prompt": "q?", "responses": ["a", "b"], "scores": [1, 1]},
        {"prompt": "p?", "responses": ["a", "b"], "scores": [1, 0]},
    ]
    loaded = load_preferences(rows)
    report = loaded.report
    assert (len(loaded), report.read, report.dropped) == (1, 2, 1)


def test_an_objective_that_reads_scores_names_the_row_without(merging: Any) -> None:
    rows = [{**PAIR, "margin": 1}, {**PAIR, "prompt": "Other:"}]
    data = tokenise(load_preferences(rows), merging, max_length=64)
    with pytest.raises(DataError, match=r"<memory>:2: no scores.*1 of 2 rows"):
        require_scores(data)


def test_scores_count_in_fingerprint_and_cache(merging: Any, tmp_path: Path) -> None:
    prints = []
    for margin in (1, 2, None):
        rows = [{**PAIR, **({"margin": margin} if margin else {})}]
        data = tokenise(load_preferences(rows), merging, max_length=64, cache_dir=tmp_path)
        assert not data.cached
        prints.append(data.fingerprint)
    assert len(set(prints)) == 3


def unpaired(merging: Any, rows: list[tuple[str, str, bool]]) -> Any:
    names = ("prompt", "completion", "label")
    loaded = load_preferences([dict(zip(names, r, strict=True)) for r in rows])
    return tokenise(loaded, merging, max_length=64)


def test_every_row_takes_the_completion_of_another_prompt(merging: Any) -> None:
    rows = [(f"Prompt {i // 3}:", f" answer {i}" * (1 + i % 4), i % 2 == 0) for i in range(12)]
    # a long prompt with short answers: those of others are cut behind it
    rows[:3] = [("Prompt" + " and on" * 9 + ":", f" {i}", i % 2 == 0) for i in range(3)]
    data = with_mismatched(unpaired(merging, rows))
    assert label_counts(data) == (6, 6)
    by_answer = {tuple(row["completion_ids"]): row["prompt_key"] for row in data.rows}
    longest = max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in data.rows)
    for row in data.rows:
        other = tuple(row["mismatched_ids"])
        whole = [key for ids, key in by_answer.items() if ids[: len(other)] == other]
        assert other and any(key != row["prompt_key"] for key in whole)
        assert len(row["prompt_ids"]) + len(other) <= longest
    batch = collate_labelled(list(data.rows), pad_id=0)
    assert batch.mismatched is not None
    for i, row in enumerate(data.rows):
        found = batch.mismatched.input_ids[i][batch.mismatched.completion_mask[i]]
        assert found.tolist() == row["mismatched_ids"]
    assert with_mismatched(data) is data


def test_of_two_prompts_each_takes_the_completion_of_the_other(merging: Any) -> None:
    data = with_mismatched(unpaired(merging, [("One:", " a", True), ("Two:", " b", False)]))
    first, second = data.rows
    assert first["mismatched_ids"] == second["completion_ids"]
    assert second["mismatched_ids"] == first["completion_ids"]


def test_one_prompt_alone_has_no_mismatched_completion(merging: Any) -> None:
    data = unpaired(merging, [("Same:", " a", True), ("Same:", " b", False)])
    with pytest.raises(DataError, match="all rows have one prompt"):
        with_mismatched(data)
