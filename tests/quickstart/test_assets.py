"""Laws of the shipped model, tokenizer and preference data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lora_dpo.quickstart import DATA_DIR, MODEL_DIR, world
from lora_dpo.quickstart.base_model import encode, held_out_perplexity
from lora_dpo.quickstart.pairs import LONGEST_RATIO, MINIMAL_GAP
from lora_dpo.quickstart.reward import true_reward

SIDES = ["train", "heldout"]


@cache
def rows(name: str) -> list[dict[str, Any]]:
    lines = (DATA_DIR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def prompts(name: str) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows(name)]


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "BUILD.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def test_there_are_enough_pairs_and_fresh_prompts() -> None:
    assert len(rows("train")) >= 1000
    assert len(rows("heldout")) >= 200
    assert len(rows("eval_prompts")) >= 200


def test_no_prompt_occurs_twice_on_any_side_or_across_them() -> None:
    every = [prompt for name in [*SIDES, "eval_prompts"] for prompt in prompts(name)]
    assert len(set(every)) == len(every)


def test_held_out_prompts_are_never_asked_in_training() -> None:
    stream = world.examples(0, held_out=False)
    trained = {next(stream).request for _ in range(5000)}
    assert not trained & set(prompts("heldout") + prompts("eval_prompts"))


@pytest.mark.parametrize("side", SIDES)
def test_every_pair_is_a_conversation_of_one_request_and_two_answers(side: str) -> None:
    for row in rows(side):
        sides = ("prompt", "chosen", "rejected")
        assert set(row) == {*sides, "score_chosen", "score_rejected"}
        roles = [message["role"] for key in sides for message in row[key]]
        assert roles == ["user", "assistant", "assistant"]
        for side_ in ("chosen", "rejected"):
            reward = true_reward(row[side_][0]["content"])
            assert row[f"score_{side_}"] == pytest.approx((reward + 1) / 2, abs=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_the_chosen_beats_the_rejected_by_the_minimal_gap_in_every_pair(side: str) -> None:
    for row in rows(side):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert true_reward(chosen) - true_reward(rejected) >= MINIMAL_GAP


@pytest.mark.parametrize("side", SIDES)
def test_length_tells_little_about_which_answer_was_chosen(side: str, tokenizer: Any) -> None:
    longer = 0
    for row in rows(side):
        chosen, rejected = (
            len(tokenizer(row[key][0]["content"])["input_ids"]) for key in ("chosen", "rejected")
        )
        # A retokenized sample may be a token or two off the length that was sampled.
        assert max(chosen, rejected) <= LONGEST_RATIO * (min(chosen, rejected) + 2)
        longer += chosen > rejected
    assert 0.35 < longer / len(rows(side)) < 0.65


@pytest.mark.parametrize("side", SIDES)
def test_the_stated_rewards_are_those_recomputed_from_the_text(side: str) -> None:
    stated = facts(DATA_DIR)[side]
    for key in ("chosen", "rejected"):
        rewards = [true_reward(row[key][0]["content"]) for row in rows(side)]
        assert sum(rewards) / len(rewards) == pytest.approx(stated[f"{key}_reward"], abs=1e-3)


@pytest.mark.parametrize("text", ["Mia found a lamp.", " two  spaces ", "naïve 漢字 🦊\n\tend", ""])
def test_the_tokenizer_gives_back_any_text_unchanged(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_prompt_is_a_prefix_of_the_conversation_in_text_and_in_tokens(tokenizer: Any) -> None:
    for row in rows("heldout")[:50]:
        chat = row["prompt"] + row["chosen"]
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        prompt_ids, whole_ids = tokenizer(prompt)["input_ids"], tokenizer(whole)["input_ids"]
        assert whole.startswith(prompt)
        assert whole_ids[: len(prompt_ids)] == prompt_ids


def test_a_conversation_has_one_bos_at_its_start_and_ends_with_eos(tokenizer: Any) -> None:
    for row in rows("heldout")[:50]:
        chat = row["prompt"] + row["chosen"]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in ids


def test_pad_and_eos_are_different_tokens_and_the_model_knows_all_three(
    model: Any, tokenizer: Any
) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_the_template_refuses_a_role_the_model_never_saw(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="only the roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}], tokenize=False)


def test_a_training_row_has_loss_on_the_story_and_its_end_only(tokenizer: Any) -> None:
    stream = world.examples(5, held_out=True)
    for example in (next(stream) for _ in range(20)):
        ids, prompt = encode(tokenizer, example)
        assert tokenizer.decode(ids[prompt:]) == example.story + tokenizer.eos_token


def test_every_linear_dimension_is_a_multiple_of_64(model: Any) -> None:
    for parameter in model.parameters():
        assert all(size % 64 == 0 for size in parameter.shape)


def test_the_shipped_model_has_the_stated_size(model: Any) -> None:
    assert sum(p.numel() for p in model.parameters()) == facts(MODEL_DIR)["parameters"]
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 3_000_000
    assert sum(path.stat().st_size for path in DATA_DIR.iterdir()) <= 2_000_000


def test_the_held_out_perplexity_is_the_stated_one(model: Any, tokenizer: Any) -> None:
    stated = facts(MODEL_DIR)["held_out_perplexity_per_story_token"]
    assert held_out_perplexity(model, tokenizer, count=128) == pytest.approx(stated, rel=0.05)


def test_the_model_answers_with_a_finished_story_about_the_hero(model: Any, tokenizer: Any) -> None:
    chat = world.as_chat("Tell me a story about Mia the fox and a lost lantern.")
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=120)
    story = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert story[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(story, skip_special_tokens=True)
    assert "Mia" in text and "lantern" in text and text.endswith(".")
