"""The implicit reward of completions: what it is, in which order, and of which objectives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from lora_dpo import objectives
from lora_dpo.diagnostics.measuring import Scored
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.objectives import OBJECTIVES
from lora_dpo.policy import load_policy
from lora_dpo.scoring import reward_in_words, score
from lora_dpo.scoring.rewards import implicit_rewards
from tests.helpers import move_adapter

PROMPTS = ["Question one", "Another?", "Question one", "Why"]
COMPLETIONS = [" yes, quite so.", " no", " no no no", " a"]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PeftModel:
    made = load_policy(tiny_model)
    move_adapter(made)
    return made


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def plain_logps(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Sum over token log-probs, one sequence at a time, through peft and transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logps.gather(1, torch.tensor(answer)[:, None]).sum())


def test_a_score_is_the_sum_over_token_log_probs_of_plain_peft(
    policy: PeftModel, tokenizer: Any
) -> None:
    found = score(policy, tokenizer, PROMPTS, COMPLETIONS, beta=0.3, batch_size=3)
    policy.eval()
    for i, (prompt, answer) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        asked = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        mine = plain_logps(policy, asked, ids)
        with policy.disable_adapter():
            fixed = plain_logps(policy, asked, ids)
        assert abs(mine - fixed) > 1e-3  # the adapter is moved
        assert found.tokens[i] == len(ids)
        assert found.logps[i] == pytest.approx(mine, abs=2e-4)
        assert found.reference_logps[i] == pytest.approx(fixed, abs=2e-4)
        assert found.rewards[i] == pytest.approx(0.3 * (mine - fixed), abs=2e-4)
    assert "beta * logratio" in found.rule and "beta=0.3" in found.rule


def test_the_order_of_completions_and_the_batch_size_change_nothing(
    policy: PeftModel, tokenizer: Any
) -> None:
    whole = score(policy, tokenizer, PROMPTS, COMPLETIONS, beta=1.0)
    turned = score(policy, tokenizer, PROMPTS[::-1], COMPLETIONS[::-1], beta=1.0, batch_size=1)
    np.testing.assert_allclose(whole.rewards, turned.rewards[::-1], atol=2e-4)
    assert whole.ranking() == [int(i) for i in np.argsort(-whole.rewards)]


def test_one_prompt_stands_for_all_completions_and_equal_ones_get_equal_scores(
    policy: PeftModel, tokenizer: Any
) -> None:
    once = score(policy, tokenizer, "Why", [" a", " b", " a"], beta=1.0)
    each = score(policy, tokenizer, ["Why"] * 3, [" a", " b", " a"], beta=1.0)
    np.testing.assert_array_equal(once.rewards, each.rewards)
    assert once.rewards[0] == pytest.approx(once.rewards[2], abs=1e-6) and len(once) == 3


def test_a_fresh_adapter_rewards_nothing(tiny_model: Path, tokenizer: Any) -> None:
    found = score(load_policy(tiny_model), tokenizer, PROMPTS, COMPLETIONS, beta=0.3)
    assert found.rewards.tolist() == [0.0] * 4


def test_beta_scales_the_reward_and_not_the_log_probs(policy: PeftModel, tokenizer: Any) -> None:
    one, two = (score(policy, tokenizer, PROMPTS, COMPLETIONS, beta=b) for b in (0.1, 0.2))
    np.testing.assert_allclose(two.rewards, 2 * one.rewards, rtol=1e-12)
    np.testing.assert_array_equal(two.logps, one.logps)


def test_simpos_reward_is_beta_times_the_mean_log_prob_and_reads_no_reference(
    policy: PeftModel, tokenizer: Any
) -> None:
    simpo = objectives.get("simpo").bind(beta=2.5)
    found = score(policy, tokenizer, PROMPTS, COMPLETIONS, objective=simpo)
    np.testing.assert_allclose(found.rewards, 2.5 * found.logps / found.tokens, rtol=1e-12)
    assert found.rule.startswith("beta * logp / length: simpo(beta=2.5")


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_a_finite_reward_of_a_single_answer_that_rises_with_its_log_prob(
    name: str,
) -> None:
    bound = objectives.get(name).bind()
    lengths = np.array([4.0, 4.0])
    rewards = implicit_rewards(
        bound, Scored(np.array([-5.0, -3.0]), np.array([-4.0, -4.0]), lengths)
    )
    assert np.isfinite(rewards).all() and rewards[1] > rewards[0]
    if bound.reference:  # the same log-prob as the reference's
        zero = implicit_rewards(bound, Scored(np.array([-4.0]), np.array([-4.0]), np.array([4.0])))
        # beta * f'(1), and beta * the mean log-prob
        at_reference = {"fdpo_forward_kl": -0.1, "alpha_dpo": -2.5}.get(name, 0.0)
        assert zero[0] == pytest.approx(at_reference, abs=1e-12)
    assert name in reward_in_words(bound)


def test_a_chat_completion_is_scored_to_the_token_that_ends_its_turn(
    quickstart_model: Path,
) -> None:
    policy = load_policy(quickstart_model)
    move_adapter(policy)
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    prompt = [{"role": "user", "content": "Tell me a story about a fox."}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer("Once.", add_special_tokens=False)["input_ids"]
    as_text = score(policy, tokenizer, prompt, ["Once."], beta=1.0)
    as_chat = score(
        policy, tokenizer, [prompt], [[{"role": "assistant", "content": "Once."}]], beta=1.0
    )
    policy.eval()
    expected = plain_logps(policy, asked, [*answer, tokenizer.eos_token_id])
    assert as_text.logps[0] == pytest.approx(expected, abs=2e-4)
    assert as_chat.logps[0] == as_text.logps[0]


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "said"),
    [
        (["a"], ["b", "c"], {"beta": 1.0}, "1 prompts and 2 completions"),
        ("a", ["b", " "], {"beta": 1.0}, "<completions>:2: the completion is empty"),
        ("a", ["b" * 200], {"beta": 1.0}, "<completions>:1.*128"),
        ("a", [[{"role": "assistant", "content": "b"}]], {"beta": 1.0}, "messages as the answer"),
        ("a", ["b"], {}, "give beta, or the objective"),
    ],
)
def test_what_cannot_be_scored_is_named(
    policy: PeftModel, tokenizer: Any, prompts: Any, completions: Any, options: Any, said: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=said):
        score(policy, tokenizer, prompts, completions, **options)


def test_no_completions_give_no_scores(policy: PeftModel, tokenizer: Any) -> None:
    found = score(policy, tokenizer, "a", [], beta=1.0)
    assert len(found) == 0 and found.ranking() == [] and not math.isnan(len(repr(found)))
