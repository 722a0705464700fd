"""Completion log-probs of a real 4-bit model: laws of padding, order, splitting and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_dpo.errors import ModelError
from lora_dpo.forward import completion_logps, completion_token_logps, pair_stats
from lora_dpo.heads import check_head
from lora_dpo.policy import load_policy
from tests.helpers import Rows, move_adapter, pad, random_rows


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PeftModel:
    policy = load_policy(tiny_model)
    move_adapter(policy)
    return policy.eval()


ROWS = random_rows(6)


def _dense(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Sum of log-softmax over the completion, one row, no padding: the definition."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


def _gradient(policy: Any, values: torch.Tensor) -> torch.Tensor:
    policy.zero_grad()
    (values * torch.linspace(1, 2, len(values))).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def expected(policy: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.stack([_dense(policy, *row) for row in ROWS])
    return values.detach(), _gradient(policy, values)


@pytest.mark.parametrize(
    ("side", "extra", "chunk"),
    [("right", 0, 1024), ("left", 0, 1024), ("right", 9, 1024), ("left", 5, 3), ("right", 0, 1)],
)
def test_padding_and_chunks_change_neither_log_probs_nor_gradients(
    policy: PeftModel, expected: Any, side: str, extra: int, chunk: int
) -> None:
    values = completion_logps(policy, pad(ROWS, side=side, extra=extra), chunk=chunk)
    torch.testing.assert_close(values.detach(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_gradient(policy, values), expected[1], rtol=1e-3, atol=2e-4)


def test_the_order_of_rows_and_their_split_change_nothing(policy: PeftModel, expected: Any) -> None:
    order = [4, 2, 0, 5, 1, 3]
    with torch.no_grad():
        shuffled = completion_logps(policy, pad([ROWS[i] for i in order]))
        parts = [completion_logps(policy, pad(ROWS[i : i + 2])) for i in (0, 2, 4)]
    torch.testing.assert_close(shuffled, expected[0][order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts), expected[0], rtol=1e-5, atol=1e-5)


def test_the_prompt_is_not_scored(policy: PeftModel) -> None:
    (prompt, answer), *_ = ROWS
    with torch.no_grad():
        tokens = completion_token_logps(policy, pad([(prompt, answer)]))
        whole = completion_token_logps(policy, pad([(prompt[:1], prompt[1:] + answer)]))
    assert len(tokens) == len(answer)
    torch.testing.assert_close(whole[-len(answer) :], tokens)


def test_the_head_is_itself_again_after_a_call_and_after_an_error(policy: PeftModel) -> None:
    head = policy.get_base_model().lm_head
    completion_logps(policy, pad(ROWS))
    assert "forward" not in vars(head)
    with pytest.raises(IndexError):
        completion_logps(policy, pad([([999], [3])]))
    assert "forward" not in vars(head)


def test_stats_of_a_batch_hold_chosen_then_rejected_and_a_reference_without_gradient(
    policy: PeftModel, expected: Any
) -> None:
    stats = pair_stats(policy, pad(ROWS))
    torch.testing.assert_close(
        stats.policy_chosen_logps.detach(), expected[0][:3], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        stats.policy_rejected_logps.detach(), expected[0][3:], rtol=1e-5, atol=1e-5
    )
    assert stats.chosen_lengths.tolist() == [len(answer) for _, answer in ROWS[:3]]
    assert stats.policy_chosen_logps.requires_grad
    assert not stats.reference_chosen_logps.requires_grad


def test_an_objective_without_reference_never_runs_it(policy: PeftModel) -> None:
    calls = []
    handle = policy.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert not pair_stats(policy, pad(ROWS), with_reference=False).has_reference
        assert len(calls) == 1
        pair_stats(policy, pad(ROWS))
        assert len(calls) == 3
    finally:
        handle.remove()


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16, "query_pre_attn_scalar": 16},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.125},
    "minicpm3": {
        "dim_model_base": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "falcon_h1": {
        "lm_head_multiplier": 0.25,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    },
    "qwen2": {},
    "phi": {},  # a head with a bias
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_scale_cap_or_shift_their_logits_are_handled(family: str) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **FAMILIES[family],
        }
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    check_head(model)
    rows = random_rows(4, vocabulary=96)
    with torch.no_grad():
        expected = torch.stack([_dense(model, *row) for row in rows])
        found = completion_logps(model, pad(rows))
        left = completion_logps(model, pad(rows, side="left"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", [False, True])
def test_a_head_that_does_something_unknown_is_refused(masks: bool) -> None:
    """One that masks a token, whose logit is -inf, is held by its other tokens."""
    config = PhiConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = PhiForCausalLM(config)
    if masks:
        model.lm_head.bias.data[5] = -torch.inf
    check_head(model)
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = forward
    with pytest.raises(ModelError, match="not supported"):
        check_head(model)


@pytest.mark.parametrize("pad", [-1, 96, None])
def test_a_pad_token_that_the_vocabulary_has_not_is_no_reason_to_refuse_a_model(pad: Any) -> None:
    config = PhiConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = PhiForCausalLM(config)
    model.config.pad_token_id = pad
    check_head(model)


def test_a_model_in_8_bits_is_causal_though_tokens_round_each_other(shared: Path) -> None:
    """Which columns keep 16 bits is chosen by all tokens: 1.3 % of the largest logit here."""
    model = shared / "models" / "TinyStories-656K"
    check_head(load_policy(model, quantisation="int8"))


def test_a_base_whose_logits_are_no_numbers_is_refused(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match="logits are no numbers on eight tokens"):
        check_head(model)


def test_rows_type_is_what_the_forward_reads() -> None:
    batch = pad(ROWS)
    assert isinstance(batch, Rows)
    assert batch.completion_mask.sum() == sum(len(answer) for _, answer in ROWS)
