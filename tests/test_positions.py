"""Rotary positions that follow the longest row of a batch: exact below their limit, refused beyond."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import lora_dpo
from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_labelled, collate_pairs, flat_pairs
from lora_dpo.engine import choose_engine
from lora_dpo.errors import ConfigError
from lora_dpo.forward import both_logps, completion_logps
from lora_dpo.policy import load_policy
from lora_dpo.stepping import row_length
from lora_dpo.trainer import PreferenceTrainer
from tests.conftest import byte_tokenizer
from tests.helpers import move_adapter
from tests.test_engine import _gradient, _model, _one_at_a_time

LIMIT = 16
KINDS: dict[str, dict[str, Any]] = {
    "phi3": {
        "original_max_position_embeddings": LIMIT,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": LIMIT,
        },
    },
    "llama": {
        # at so many tokens the library keeps what a longer batch has grown; hence one less
        "max_position_embeddings": LIMIT + 1,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}
REFUSED = rf"longest row has {LIMIT + 1} tokens.*rope_type (longrope|dynamic).*at most {LIMIT}\b"


def _row(prompt: int, chosen: int, rejected: int) -> dict[str, list[int]]:
    return {
        "prompt_ids": list(range(3, 3 + prompt)),
        "chosen_ids": list(range(30, 30 + chosen)),
        "rejected_ids": list(range(60, 60 + rejected)),
    }


SHORT, FULL, LONG = _row(2, 3, 4), _row(5, LIMIT - 5, 2), _row(5, 2, LIMIT - 4)


@pytest.fixture(params=KINDS)
def policy(request: pytest.FixtureRequest) -> Any:
    model = _model(request.param, **KINDS[request.param])
    policy = load_policy(model, lora=LoraConfig(rank=4)).eval()
    move_adapter(policy, std=0.2)
    return policy


def _padded(rows: list[Any]) -> Any:
    return collate_pairs(rows, pad_id=0)


def test_up_to_the_limit_a_row_has_one_log_prob_whatever_stands_beside_it_or_ran_before(
    policy: Any,
) -> None:
    expected = _one_at_a_time(policy, [SHORT, FULL])
    gradient = _gradient(policy, expected)
    policy(input_ids=torch.arange(3, 3 + 2 * LIMIT)[None])  # generation may go further
    for engine in ("fast", "plain"):
        assert engine in choose_engine(policy, [SHORT, FULL], LIMIT, engine, chunk=64)  # type: ignore[arg-type]
        batch = (flat_pairs if engine == "fast" else _padded)([SHORT, FULL])
        ours, _ = both_logps(policy, batch)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        found = _gradient(policy, ours)
        assert float((found - gradient).norm() / gradient.norm()) < 1e-5


def test_beyond_the_limit_the_library_gives_a_row_another_log_prob_beside_a_longer_one(
    policy: Any,
) -> None:
    """Why such rows are refused: this is the library alone."""

    def first_logits(width: int) -> torch.Tensor:
        ids = torch.arange(3, 3 + width).expand(2, -1)
        lengths = torch.tensor([len(SHORT["prompt_ids"]), width])
        mask = (torch.arange(width) < lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = policy(input_ids=ids, attention_mask=mask, position_ids=positions)
        logits: torch.Tensor = out.logits[0, 1]
        return logits

    alone = first_logits(2)
    torch.testing.assert_close(first_logits(LIMIT), alone, rtol=1e-4, atol=1e-4)
    assert float((first_logits(LIMIT + 2) - alone).abs().max()) > 1e-2


@pytest.mark.parametrize("lay_out", [flat_pairs, _padded])
def test_a_batch_with_a_row_beyond_the_limit_is_refused_in_either_layout(
    policy: Any, lay_out: Callable[[Any], Any]
) -> None:
    for engine in ("auto", "fast", "plain"):
        with pytest.raises(ConfigError, match=REFUSED):
            choose_engine(policy, [SHORT], row_length(LONG), engine, chunk=64)  # type: ignore[arg-type]
    choose_engine(policy, [SHORT, FULL], LIMIT, "fast", chunk=64)
    for rows in ([LONG], [SHORT, LONG]):
        with pytest.raises(ConfigError, match=REFUSED):
            completion_logps(policy, lay_out(rows))


def test_padding_is_no_token_of_a_row(policy: Any) -> None:
    rows = [{"prompt_ids": [3, 4], "completion_ids": [5], "label": True}]
    batch = collate_labelled(rows, pad_id=0)
    ids, attention, completion = (
        torch.nn.functional.pad(value, (0, 2 * LIMIT))
        for value in (batch.input_ids, batch.attention_mask, batch.completion_mask)
    )
    wide = type(batch)(ids, attention, completion, batch.label, batch.origins)
    torch.testing.assert_close(completion_logps(policy, wide), completion_logps(policy, batch))


def _texts(answer: int) -> list[dict[str, str]]:
    """Rows of one token a byte and an end: the last one has ``2 + answer`` tokens."""
    return [
        {"prompt": f"{i}", "chosen": "yes", "rejected": "n" * (answer if i == 3 else 2)}
        for i in range(4)
    ]


@pytest.mark.parametrize("held_out", [False, True])
def test_the_trainer_refuses_before_it_trains_and_takes_what_reaches_the_limit(
    held_out: bool, tmp_path: Path
) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )

    def trainer(answer: int) -> PreferenceTrainer:
        model = _model("phi3", vocab_size=320, **KINDS["phi3"])
        long, short = _texts(answer), _texts(2)
        return PreferenceTrainer(
            load_policy(model, lora=LoraConfig(rank=2)),
            args=args,
            train_data=short if held_out else long,
            eval_data=long if held_out else short,
            tokenizer=byte_tokenizer(),
            reference_cache=tmp_path / "cache",
        )

    with pytest.raises(ConfigError, match=REFUSED):
        trainer(LIMIT - 1)
    assert not (tmp_path / "cache").exists()
    trainer(LIMIT - 2).train()


def test_a_run_and_its_plan_are_refused_before_the_weights_load(tmp_path: Path) -> None:
    model = tmp_path / "model"
    whole = _model("phi3", vocab_size=320, **KINDS["phi3"])
    whole.config.save_pretrained(model)  # no weights
    byte_tokenizer().save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _texts(LIMIT - 1)))
    config = {
        "model": {"base": str(model)},
        "data": {"train": str(rows), "eval_fraction": 0.0, "max_length": 64},
        "output": {"dir": str(tmp_path / "run")},
        "train": {"use_cpu": True},
    }
    for asked in (lora_dpo.train, lora_dpo.plan):
        with pytest.raises(ConfigError, match=REFUSED):
            asked(config)  # type: ignore[operator]
    assert not (tmp_path / "run").exists()
