"""A run as a reward model: of files in their order, by category, and of its own samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.errors import LoraDpoError, OutputError
from lora_dpo.evaluation import Estimate
from lora_dpo.policy import load_policy, save_adapter
from lora_dpo.run_folder import Run
from lora_dpo.scoring import best_of, score, score_run
from lora_dpo.scoring.categories import SECTIONS, Accuracy, overall, sections_of
from tests.helpers import move_adapter

ROWS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "Question 1", "chosen": " yes", "rejected": " no, no", "subset": "b"},
    {"id": 3, "prompt": "Question 2", "chosen": " no, no", "rejected": " yes.", "subset": "a"},
    {"id": 5, "prompt": "Question 1", "chosen": " well", "rejected": " so", "subset": "b"},
]


def test_a_file_keeps_its_order_and_columns_and_gets_a_line_a_completion(
    first: Run, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    found = score_run(first, path)
    found.write(tmp_path / "scores.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [7, 7, 3, 3, 5, 5]
    assert [line["side"] for line in lines] == ["chosen", "rejected"] * 3
    assert all(row.items() <= line.items() for row, line in zip(ROWS, lines[::2], strict=True))
    prompts = [row["prompt"] for row in ROWS for _ in range(2)]
    texts = [row[side] for row in ROWS for side in ("chosen", "rejected")]
    direct = score(
        first.load_policy(), first.tokenizer(), prompts, texts, objective=first.objective
    )
    np.testing.assert_allclose([line["reward"] for line in lines], direct.rewards, atol=1e-5)
    assert [line["tokens"] for line in lines] == direct.tokens.tolist()
    for line in lines:
        ratio = line["logps"] - line["reference_logps"]
        assert line["reward"] == pytest.approx(0.2 * ratio)
    with pytest.raises(OutputError, match="exists already"):
        found.write(tmp_path / "scores.jsonl")


def test_swapping_chosen_and_rejected_mirrors_the_accuracy(first: Run) -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    one, other = score_run(first, ROWS), score_run(first, swapped)
    assert one.accuracy is not None and other.accuracy is not None
    assert one.accuracy.estimate.mean + other.accuracy.estimate.mean == pytest.approx(1.0)
    for name, found in one.subsets.items():
        assert found.estimate.mean + other.subsets[name].estimate.mean == pytest.approx(1.0)
    assert one.accuracy.pairs == 3 and one.accuracy.prompts == 2
    assert {name: found.pairs for name, found in one.subsets.items()} == {"a": 1, "b": 2}


def test_a_policy_that_is_its_reference_scores_ties_which_count_half(unmoved: Run) -> None:
    found = score_run(unmoved, ROWS).accuracy
    assert found is not None and found.ties == 3
    assert found.estimate.mean == 0.5 and found.estimate.low < 0.5 < found.estimate.high


def test_a_simpo_run_scores_by_its_own_reward(second: Run) -> None:
    found = score_run(second, ROWS)
    for row in found.rows:
        assert row["reward"] == pytest.approx(2 * row["logps"] / row["tokens"])
    assert "simpo" in found.rule


def test_completions_without_a_preference_are_scored_one_by_one(first: Run) -> None:
    single = score_run(first, [{"prompt": "Question 1", "completion": " yes", "reward": 9}])
    several = score_run(first, [{"prompt": "Question 1", "completions": [" no, no", " yes"]}])
    pair = score_run(first, ROWS[:1])
    assert single.accuracy is None and several.accuracy is None
    assert single.rows[0]["input_reward"] == 9  # the file's own column is kept
    assert single.rows[0]["reward"] == pytest.approx(pair.rows[0]["reward"], abs=1e-5)
    rewards = [row["reward"] for row in several.rows]
    assert rewards == pytest.approx([pair.rows[1]["reward"], pair.rows[0]["reward"]], abs=1e-5)
    assert [row["place"] for row in several.rows] == [0, 1]


def test_labelled_answers_are_scored_whatever_their_label(first: Run) -> None:
    rows = [{"prompt": "Q", "completion": " a", "label": label} for label in (True, False)]
    found = score_run(first, rows)
    assert found.rows[0]["reward"] == pytest.approx(found.rows[1]["reward"], abs=1e-6)


def test_a_row_that_training_would_drop_has_a_line_without_figures_and_a_reason(
    first: Run,
) -> None:
    long = {"id": 9, "prompt": "Q" * 200, "chosen": " a", "rejected": " b"}
    found = score_run(first, [long, *ROWS])
    assert found.without == 2 and found.rows[0]["reward"] is None
    assert found.rows[0]["id"] == 9 and found.rows[2]["reward"] is not None
    assert any("dropped:" in line for line in found.report)
    assert any("<memory>:1" in line for line in found.report)
    assert found.accuracy is not None and found.accuracy.pairs == 3


def test_a_text_is_the_users_turn_where_the_run_was_trained_on_chats(
    first: Run, quickstart_model: Path, tmp_path: Path
) -> None:
    policy = load_policy(quickstart_model)
    move_adapter(policy)
    save_adapter(policy, tmp_path / "adapter")
    base = first.config.replace("model.base", str(quickstart_model))
    chats = Run(tmp_path, base, {"chat": True})
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{s: [{"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")},
        }
        for row in ROWS[:1]
    ]
    as_texts, as_turns = score_run(chats, ROWS[:1]), score_run(chats, turns)
    assert as_texts.rows[0]["chosen"] == " yes"  # the file's own, unchanged
    rewards = [[row["reward"] for row in found.rows] for found in (as_texts, as_turns)]
    assert rewards[0] == rewards[1] and rewards[0][0] != 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("no-such.jsonl", "no such file"),
        ([{"prompt": "Q", "completions": "text"}], "<memory>:1: expected completion"),
        ([{"prompt": 3, "completion": "text"}], "<memory>:1: prompt is int"),
        ([{"prompt": "Q", "completion": " "}], "<memory>:1: the completion is empty"),
        ([{"prompt": "Q", "chosen": "a"}], "no known shape"),
    ],
)
def test_what_cannot_be_scored_is_named_by_file_and_row(first: Run, data: Any, said: str) -> None:
    with pytest.raises(LoraDpoError, match=said):
        score_run(first, data)


def accuracy(mean: float) -> Accuracy:
    return Accuracy(Estimate(mean, mean, mean), 10, 10, 0)


def test_rewardbenchs_sections_are_weighted_by_its_counts() -> None:
    """By hand: Chat has 100 + 95 + 95 + 28 + 40 rows; math counts 984, as 6 x 164 of code."""
    right = {"alpacaeval-easy": accuracy(1.0)}
    rest = {name: accuracy(0.0) for name in SECTIONS["Chat"] if name not in right}
    assert sections_of({**right, **rest})["Chat"].mean == pytest.approx(100 / 358)
    reasoning = {name: accuracy(float(name == "math-prm")) for name in SECTIONS["Reasoning"]}
    assert sections_of(reasoning)["Reasoning"].mean == 0.5
    assert sum(map(len, SECTIONS.values())) == 23
    rows = sum(sum(counts.values()) for counts in SECTIONS.values())
    assert rows - 984 + 447 == 2985  # the published size of the filtered set


def test_a_section_that_lacks_subsets_says_so_and_gives_no_score() -> None:
    found = sections_of({"mt-bench-easy": accuracy(0.5), "own": accuracy(1.0)})
    assert list(found) == ["Chat"] and found["Chat"].mean == 0.5
    assert "alpacaeval-hard" in str(found["Chat"]) and overall(found) is None
    assert not sections_of({"own": accuracy(1.0)})
    means = dict(zip(SECTIONS, (0.2, 0.4, 0.6, 0.8), strict=True))
    whole = {name: accuracy(means[s]) for s, counts in SECTIONS.items() for name in counts}
    assert overall(sections_of(whole)) == pytest.approx(0.5)


def test_best_of_n_ranks_samples_by_the_reward_that_score_gives_them(
    first: Run, tmp_path: Path
) -> None:
    found = best_of(first, None, ["Question 1", "Why"], n=4, max_new_tokens=8, seed=1)
    again = best_of(first.folder, None, ["Question 1", "Why"], n=4, max_new_tokens=8, seed=1)
    assert found.to_dict() == again.to_dict()
    for ranked in found:
        rewards = [sample.reward for sample in ranked.ranking]
        assert rewards == sorted(rewards, reverse=True) and len(rewards) == 4
        assert ranked.best.reward == max(rewards)
        for sample in ranked.ranking:
            ratio = sample.logps - sample.reference_logps
            assert sample.reward == pytest.approx(0.2 * ratio)
            assert sample.ended or sample.tokens == 8
    policy, tokenizer = first.load_policy(), first.tokenizer()
    alone = best_of(policy, tokenizer, ["Question 1", "Why"], n=4, beta=0.2, max_new_tokens=8,
                    seed=1)  # fmt: skip
    assert [r.best.text for r in alone] == [r.best.text for r in found]
    for options in ({}, {"beta": 0.1, "objective": first.objective}):
        with pytest.raises(LoraDpoError, match="give beta"):
            best_of(policy, tokenizer, ["a"], n=1, **options)
    with pytest.raises(LoraDpoError, match="n is 0"):
        best_of(first, None, ["a"], n=0)
    with pytest.raises(LoraDpoError, match="brings its tokenizer"):
        best_of(first, None, ["a"], n=1, beta=0.3)
    with pytest.raises(LoraDpoError, match=r"prompt 2 has .* context of 128"):
        best_of(policy, tokenizer, ["a", "b" * 125], n=1, beta=0.2, max_new_tokens=8)
    base = Path(first.config.model.base)
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = first.config.replace("model.base", str(tmp_path / "base"))
    with pytest.raises(LoraDpoError, match="context of 128"):  # before the weights are missed
        best_of(replace(first, config=config), None, ["b" * 125], n=1, max_new_tokens=8)


def test_the_command_scores_a_file_and_ranks_samples(first: Run, tmp_path: Path) -> None:
    path, prompts = tmp_path / "pairs.jsonl", tmp_path / "p.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    prompts.write_text("Why?\n", encoding="utf-8")
    run, to = str(first.folder), tmp_path / "scores.jsonl"
    said = CliRunner().invoke(app, ["score", run, "--data", str(path), "--to", str(to)])
    assert said.exit_code == 0 and "accuracy, ties half" in said.stdout, said.output
    assert len(to.read_text().splitlines()) == 6
    again = CliRunner().invoke(app, ["score", run, "--data", str(path), "--to", str(to)])
    assert again.exit_code == 1 and "exists already" in again.output
    best = ["score", run, "--prompts", str(prompts), "--best-of", "2", "--max-new-tokens", "4"]
    ranked = CliRunner().invoke(app, [*best, "--json"])
    found = json.loads(ranked.stdout)
    assert len(found["prompts"][0]["ranking"]) == 2
    for wrong in (["score", run], ["score", run, "--data", str(path), "--best-of", "2"]):
        assert "--best-of N" in CliRunner().invoke(app, wrong).output
    unread = CliRunner().invoke(app, ["score", run, "--data", str(path), "--seed", "3"])
    assert unread.exit_code == 1 and "--seed belongs to --best-of" in unread.output


def test_a_column_that_json_does_not_know_is_kept_as_text(first: Run) -> None:
    found = score_run(first, [{**ROWS[0], "day": date(2026, 1, 2)}])
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["day"] == "2026-01-02"


def test_a_kept_column_may_hold_half_a_character(first: Run, tmp_path: Path) -> None:
    found = score_run(first, [{**ROWS[0], "note": "\ud83d \u2028 \u00e9"}])
    found.write(tmp_path / "s.jsonl")
    lines = (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["note"] for line in lines] == ["\ud83d \u2028 \u00e9"] * 2


def test_scores_are_shown_as_text_in_a_notebook(first: Run) -> None:
    found = score_run(first, [{**ROWS[0], "subset": "<b>x</b>"}])
    assert "<b>x</b>" not in found._repr_html_() and "&lt;b&gt;x" in found._repr_html_()
    assert "accuracy" in repr(found) and json.loads(json.dumps(found.to_dict()))
