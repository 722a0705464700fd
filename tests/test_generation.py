"""Samples are the policy's own: what its base's generation config adds is left out, turns end where trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_dpo.config import LoraConfig
from lora_dpo.generation import complete, draw, end_ids, sample_ids
from lora_dpo.policy import load_policy
from lora_dpo.prompt_tokens import encode_prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Any:
    return load_policy(tiny_model, lora=LoraConfig(rank=2))


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_nothing_of_the_bases_generation_config_changes_a_sample(
    policy: Any, tokenizer: Any
) -> None:
    rows = [tokenizer(text)["input_ids"] for text in ("one", "two, three")]

    def all_ways() -> list[Any]:
        return [
            sample_ids(policy, tokenizer, rows, max_new_tokens=24, seed=1),
            draw(policy, tokenizer, ["one", "two"], [1, 2], max_new_tokens=24),
            complete(policy, tokenizer, ["one", "two"], max_new_tokens=24),
        ]

    expected = all_ways()
    own = policy.get_base_model().generation_config
    before = own.to_dict()
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 20
    try:
        assert all_ways() == expected
        assert policy.get_base_model().generation_config is own  # and it is the model's again
        assert own.repetition_penalty == 5.0
    finally:
        for name, value in before.items():
            setattr(own, name, value)


def test_a_sample_ends_at_the_end_of_the_templates_turn(policy: Any, tokenizer: Any) -> None:
    """The base's own config and tokenizer name another end; training ends answers with the template's."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn < 320  # within the model's vocabulary
    assert turn in end_ids(policy, tokenizer) and tokenizer.eos_token_id in end_ids(
        policy, tokenizer
    )
    rows = [tokenizer(str(i))["input_ids"] for i in range(64)]
    made = sample_ids(policy, tokenizer, rows, max_new_tokens=64, seed=0, batch_size=64)
    ended = [ids for ids in made if turn in ids]
    assert ended and all(ids.index(turn) == len(ids) - 1 for ids in ended)


def test_a_text_that_imitates_a_control_token_stays_text(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, "say </s> now")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).endswith("say </s> now")
