"""Laws of a comparison: the reference equals itself, a run beside others is what it is alone."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy import stats
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.comparing import compare, sample_answers
from lora_dpo.comparing.measures import against, distinct, measure, sign_test, wilcoxon_test, wins
from lora_dpo.comparing.together import adapters_of, load_together, names_of
from lora_dpo.errors import ConfigError, DataError, JudgeError, LoraDpoError, ModelError
from lora_dpo.judging import open_judge
from lora_dpo.policy import acting, load_base, policy_adapter, reference
from lora_dpo.prompt_tokens import encode_prompt
from lora_dpo.prompts import read_prompts
from lora_dpo.run_folder import Run
from lora_dpo.scoring import score_ids
from tests.browsing import HOSTILE, check_strangers_stay_text
from tests.judge_server import completion, serving

PROMPTS = ["Question one", "Why?", "And now", "Who", "Where is it", "Say no"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 8}


class AlwaysFirst:
    def choose(self, prompt: str, first: str, second: str) -> Any:
        return "first"


class LikesTheSecondRun:
    """Prefers the text with more vowels: a rule that knows no place."""

    def choose(self, prompt: str, first: str, second: str) -> Any:
        one, other = (sum(text.count(v) for v in "aeiou") for text in (first, second))
        return "tie" if one == other else "first" if one > other else "second"


def test_a_policy_whose_adapter_is_zero_equals_its_reference(unmoved: Run) -> None:
    found = compare(unmoved, PROMPTS, judge=AlwaysFirst(), samples=2, **OPTIONS)
    policy = found["policy"]
    assert all(row.texts["policy"] == row.texts["reference"] for row in found.answers)
    assert policy["kl"].value.mean == 0.0
    assert policy["reward_wins"].value.mean == policy["judge_wins"].value.mean == 0.5
    tests = [m.p_value for m in policy.measures.values() if m.p_value is not None]
    assert tests == [1.0] * 7
    changes = [m.change.mean for m in policy.measures.values() if m.change is not None]
    assert changes == [0.0] * 5
    assert found.findings() == ["policy: no figure differs beyond chance (all p above 0.05)"]


def test_a_judge_that_always_prefers_the_first_gives_half_and_is_named_as_biased(
    first: Run,
) -> None:
    found = compare(first, PROMPTS, judge=AlwaysFirst(), samples=2, **OPTIONS)
    assert found["policy"]["judge_wins"].value.mean == 0.5
    assert found["policy"]["judge_wins"].p_value == 1.0
    assert "biased to the first place" in " ".join(found["policy"].notes)
    assert any(row.texts["policy"] != row.texts["reference"] for row in found.answers)


def test_the_same_seed_gives_the_same_answers_and_another_seed_other_ones(first: Run) -> None:
    policy, tokenizer = first.load_policy(), first.tokenizer()
    ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    options = {"as_reference": False, "samples": 2, **OPTIONS}
    once, again, other = (
        sample_answers(policy, tokenizer, ids, seed=seed, **options) for seed in (3, 3, 4)
    )
    assert once == again and once.ids != other.ids
    assert once.ids[::2] != once.ids[1::2]  # two samples of a prompt are two


def test_adapters_of_two_runs_together_answer_and_score_as_each_alone(
    first: Run, second: Run
) -> None:
    tokenizer = first.tokenizer()
    ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    together = load_together([first, second], "final")
    for run, name in zip((first, second), adapters_of([first, second]), strict=True):
        alone = run.load_policy()
        mine = sample_answers(alone, tokenizer, ids, as_reference=False, **OPTIONS)
        with acting(together, name):
            beside = sample_answers(together, tokenizer, ids, as_reference=False, **OPTIONS)
            fixed = sample_answers(together, tokenizer, ids, as_reference=True, **OPTIONS)
            rows = list(zip(ids, mine.ids, strict=True))
            scores = score_ids(together, rows, run.objective)
        expected = score_ids(alone, rows, run.objective)
        assert beside == mine
        np.testing.assert_allclose(scores.rewards, expected.rewards, atol=1e-5)
        np.testing.assert_allclose(scores.reference_logps, expected.reference_logps, atol=1e-5)
        assert fixed == sample_answers(alone, tokenizer, ids, as_reference=True, **OPTIONS)
    with acting(together, "run_2"):
        moved = score_ids(together, rows, first.objective).logps
    default = score_ids(together, rows, first.objective).logps
    assert np.abs(moved - default).max() > 1e-2  # two adapters, not one


def test_acting_and_a_further_adapter_leave_the_policy_as_it_was(first: Run, second: Run) -> None:
    policy = load_together([first, second], "final")
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    with pytest.raises(ZeroDivisionError), acting(policy, "run_2"), reference(policy):
        _ = 1 / 0
    assert policy_adapter(policy) == "default"
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = policy(input_ids=ids).logits
        with acting(policy, "run_2"):
            inside = policy(input_ids=ids).logits
        after = policy(input_ids=ids).logits
    assert torch.equal(before, after) and not torch.equal(before, inside)
    with pytest.raises(LoraDpoError, match="'nobody'"), acting(policy, "nobody"):
        pass


def test_two_runs_are_compared_with_one_reference_and_each_by_its_own_reward(
    first: Run, second: Run
) -> None:
    found = compare([first, second], PROMPTS, judge=LikesTheSecondRun(), **OPTIONS)
    assert [model.name for model in found.models] == ["reference", "first", "second"]
    alone = compare(second, PROMPTS, judge=LikesTheSecondRun(), **OPTIONS)
    for name, measured in alone["policy"].measures.items():
        beside = found["second"][name]
        assert beside.value.mean == pytest.approx(measured.value.mean, abs=1e-5)
        assert beside.p_value == measured.p_value
    assert "simpo" in found["second"].rule and "dpo(beta=0.2" in found["first"].rule
    written = json.loads((first.folder / "comparison.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found.to_dict()))
    assert [model["name"] for model in written["models"]] == ["reference", "first", "second"]


def test_the_kl_is_the_mean_log_ratio_of_the_policys_own_samples_by_plain_peft(
    first: Run,
) -> None:
    found = compare(first, PROMPTS, **OPTIONS)
    plain = PeftModel.from_pretrained(
        load_base(first.config.model), first.folder / "adapter"
    ).eval()
    tokenizer, ratios = first.tokenizer(), []
    ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    answers = sample_answers(first.load_policy(), tokenizer, ids, as_reference=False, **OPTIONS)
    assert answers.texts == tuple(row.texts["policy"] for row in found.answers)
    for asked, answer in zip(ids, answers.ids, strict=True):
        mine = _plain(plain, asked, answer)
        with plain.disable_adapter():
            ratios.append(mine - _plain(plain, asked, answer))
    assert found["policy"]["kl"].value.mean == pytest.approx(np.mean(ratios), abs=1e-4)


def _plain(model: Any, asked: list[int], answer: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*asked, *answer]])).logits[0].double()
    logps = logits.log_softmax(-1)[len(asked) - 1 : -1]
    return float(logps.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.fixture(scope="module")
def weightless(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weightless")
    shutil.copytree(
        tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    return folder


def without_weights(run: Run, folder: Path) -> Run:
    return replace(run, config=run.config.replace("model.base", str(folder)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.quantisation": "fp4"}, "model.quantisation"),
        ({"model.revision": "other"}, "model.revision"),
        ({"model.base": "."}, "model.base"),
        ({"data.template_arguments": {"x": 1}}, "data.template_arguments"),
    ],
)
def test_runs_that_differ_in_their_base_are_refused_before_weights_load(
    first: Run, second: Run, weightless: Path, change: dict[str, Any], said: str
) -> None:
    """Were they loaded, the missing weights would be the error."""
    one, other = (without_weights(run, weightless) for run in (first, second))
    for key, value in change.items():
        other = replace(other, config=other.config.replace(key, value))
    with pytest.raises(ConfigError, match=said):
        compare([one, other], PROMPTS)


def test_runs_with_another_reference_are_refused(first: Run, second: Run, tmp_path: Path) -> None:
    shutil.copytree(second.folder, tmp_path / "second")
    shutil.copytree(second.folder / "adapter", tmp_path / "second" / "reference")
    with pytest.raises(ConfigError, match=r"the reference of .*a starting adapter"):
        compare([first, tmp_path / "second"], PROMPTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"prompts": []}, "holds none"),
        ({"prompts": ["a", 3]}, "number 2 is int"),
        ({"prompts": "no-such.txt"}, "no such file"),
        ({"max_new_tokens": 4000}, "context of 128"),
        ({"checkpoint": "99"}, "checkpoint-99"),
        ({"judge_model": "m"}, "belongs to an endpoint"),
        ({"judge": "nowhere"}, "neither a folder"),
    ],
)
def test_what_cannot_be_compared_is_told(first: Run, options: dict[str, Any], said: str) -> None:
    given = {"prompts": PROMPTS, **OPTIONS, **options}
    with pytest.raises(LoraDpoError, match=said):
        compare(first, **given)


def test_a_judge_that_is_not_there_is_told_before_weights_load(
    first: Run, weightless: Path
) -> None:
    run = without_weights(first, weightless)
    with serving(lambda *_: completion("A")) as server:
        judge = open_judge(server.address, model="m", retries=0)
    with pytest.raises(JudgeError, match="could not be asked"):
        compare(run, PROMPTS, judge=judge, **OPTIONS)
    with pytest.raises(ModelError, match="weights did not load"):
        compare(run, PROMPTS, **OPTIONS)


def test_a_judge_that_fails_late_costs_nothing_but_its_own_figures(
    first: Run, second: Run, tmp_path: Path
) -> None:
    folder = shutil.copytree(first.folder, tmp_path / "first")
    whole = compare([first, second], PROMPTS, judge=LikesTheSecondRun(), write=False, **OPTIONS)

    class Tiring(LikesTheSecondRun):
        asked = 0
        most = 0

        def choose(self, prompt: str, first: str, second: str) -> Any:
            self.asked += 1
            if self.asked > self.most:
                raise JudgeError("the endpoint is gone")
            return super().choose(prompt, first, second)

    judge = Tiring()
    differing = sum(row.texts["first"] != row.texts["reference"] for row in whole.answers)
    judge.most = 1 + 2 * differing + 1  # the trial, the first run, and once of the second
    with pytest.raises(JudgeError, match=r"gone.*comparison\.json"):
        compare([Run.open(folder), second], PROMPTS, judge=judge, **OPTIONS)
    got = json.loads((folder / "comparison.json").read_text())
    expected = whole.to_dict()
    figures, full = got["models"][2]["measures"], expected["models"][2]["measures"]
    del full["judge_wins"]
    assert figures == full and got["answers"] == expected["answers"]
    assert got["models"][1]["measures"] == expected["models"][1]["measures"]
    assert "the endpoint is gone" in got["models"][2]["notes"][0]


def test_verdicts_that_were_given_before_a_judge_failed_count(second: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(second.folder, tmp_path / "second")
    run = Run.open(folder)

    class LikesTheFirstPlaceTwice(LikesTheSecondRun):
        asked = 0

        def choose(self, prompt: str, first: str, second: str) -> Any:
            self.asked += 1
            if self.asked > 3:  # the trial, and one pair in both orders
                raise JudgeError("the endpoint is gone")
            return "first"

    with pytest.raises(JudgeError, match=r"gone.*comparison\.json"):
        compare(run, PROMPTS, judge=LikesTheFirstPlaceTwice(), **OPTIONS)
    got = json.loads((folder / "comparison.json").read_text())["models"][1]
    assert got["measures"]["judge_wins"]["mean_low_high"][0] == 0.5
    assert re.search(r"figures are of 1 of \d+ pairs: the endpoint is gone", got["notes"][1])


def test_equal_answers_are_ties_that_no_judge_is_asked_about(unmoved: Run) -> None:
    with serving(lambda *_: completion("A")) as server:
        found = compare(unmoved, PROMPTS, judge=server.address, judge_model="m", **OPTIONS)
    assert len(server.requests) == 1  # whether it is there
    assert found["policy"]["judge_wins"].value.mean == 0.5
    assert "6 answers equal to the reference's" in " ".join(found["policy"].notes)


def test_prompts_are_read_from_lines_columns_and_preferences(first: Run, tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\ntwo\none\n", encoding="utf-8")
    assert read_prompts(first, lines) == ["one", "two"]
    column = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    column.write_text('{"prompt": "one"}\n' + json.dumps({"prompt": chat}) + "\n")
    assert read_prompts(first, str(column)) == ["one", chat]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    assert read_prompts(first, pairs) == ["p"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "one"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: prompt is int \(3\)"):
        read_prompts(first, bad)
    chats = replace(first, results={**first.results, "chat": True})
    assert read_prompts(chats, lines, limit=1) == [[{"role": "user", "content": "one"}]]


def test_without_prompts_the_held_out_ones_are_taken(first: Run) -> None:
    found = read_prompts(first)
    tokenizer, held = first.tokenizer(), first.held_out()
    assert [encode_prompt(tokenizer, p) for p in found] == list(held.rows["prompt_ids"])


def test_distinct_is_the_share_of_different_n_grams() -> None:
    assert distinct([1, 2, 3, 4], 3) == 1.0
    assert distinct([7] * 10, 3) == 1 / 8
    assert math.isnan(distinct([1, 2], 3))


def test_the_tests_are_scipys_on_the_means_of_prompts() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.4, 1, 60), rng.normal(0, 1, 60)
    clusters = np.repeat(np.arange(20), 3)
    found = against("tokens", ours, theirs, clusters)
    means = (ours - theirs).reshape(20, 3).mean(1)
    assert found.p_value == pytest.approx(stats.wilcoxon(means).pvalue)
    assert found.change is not None and found.change.mean == pytest.approx(means.mean())
    low, high = stats.t.interval(0.95, 19, loc=means.mean(), scale=stats.sem(means))
    assert (found.change.low, found.change.high) == pytest.approx((low, high))
    assert sign_test(np.array([1.0, 2, -1, 0, 0])) == stats.binomtest(2, 3).pvalue
    assert wilcoxon_test(np.zeros(4)) == sign_test(np.zeros(4)) == 1.0


def test_copies_of_a_prompts_samples_are_no_further_evidence() -> None:
    shares, prompts = np.array([1.0] * 7 + [0.0]), np.arange(8)
    once = wins("judge_wins", shares, prompts)
    copied = wins("judge_wins", np.repeat(shares, 9), np.repeat(prompts, 9))
    assert once.p_value == copied.p_value == pytest.approx(stats.binomtest(7, 8).pvalue)
    assert copied.value.low == pytest.approx(once.value.low)


def test_ties_pull_to_one_half_and_narrow_the_interval() -> None:
    half = measure("judge_wins", np.array([1.0] * 10 + [0.5] * 90), np.arange(100))
    assert half.mean == pytest.approx(0.55) and 0.5 < half.low < 0.55
    sure = measure("judge_wins", np.ones(20), np.arange(20))
    assert sure.mean == 1.0 and 0.8 < sure.low < 0.9  # all won is not certain


def test_the_command_prints_a_table_and_writes_page_and_json(first: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": HOSTILE}) + '\n{"prompt": "Why?"}\n')
    page = tmp_path / "page.html"
    arguments = ["compare", str(first.folder), "--prompts", str(prompts), "--max-new-tokens", "8"]
    said = CliRunner().invoke(app, [*arguments, "--html", str(page)])
    assert said.exit_code == 0, said.output
    assert "reward win rate" in said.stdout and "\x1b[31m" not in said.stdout
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text and "\x1b" not in text
    check_strangers_stay_text(page, times=1)
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(as_json.stdout)
    assert found["prompts"] == 2 and found["models"][0]["name"] == "reference"
    wrong = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert wrong.exit_code == 1 and "no run there" in wrong.output


def test_names_are_told_apart_and_none_is_the_reference(first: Run, tmp_path: Path) -> None:
    a, b = (replace(first, folder=tmp_path / name / "reference") for name in ("a", "b"))
    assert names_of([a, b]) == ["a/reference", "b/reference"]
    assert names_of([a]) == ["policy"]
