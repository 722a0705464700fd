"""The flat layout: equal to one sequence at a time, on every model that takes it, or not taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_pairs, flat_labelled, flat_pairs, flat_tokens
from lora_dpo.engine import choose_engine, is_flat
from lora_dpo.errors import ConfigError
from lora_dpo.forward import completion_logps, pair_stats
from lora_dpo.layers import work_of
from lora_dpo.policy import load_policy, reference
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter

IDS = st.lists(st.integers(3, 5), min_size=1, max_size=6)  # few tokens: long shared beginnings
ROW = st.fixed_dictionaries({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS})
ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [8, 9, 12]},
    {"prompt_ids": [13], "chosen_ids": [14], "rejected_ids": [15, 16, 17, 18, 19]},
    {"prompt_ids": [20, 21], "chosen_ids": [22, 23, 24], "rejected_ids": [22, 23, 24, 25]},
    {"prompt_ids": [30, 31, 32, 33], "chosen_ids": [34, 35], "rejected_ids": [36, 2]},
]


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=3))
def test_every_answer_is_predicted_behind_its_own_tokens(rows: list[Any]) -> None:
    batch = flat_pairs(rows)
    ids, positions = batch.input_ids[0], batch.position_ids[0]
    assert len(ids) == sum(trunk + sum(branches) for trunk, branches in batch.segments)
    alone = [flat_tokens(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]]) for r in rows]
    assert len(ids) <= sum(alone)  # less where rows have a prompt or an answer in common
    answers = [tuple(r[side]) for r in rows for side in ("chosen_ids", "rejected_ids")]
    prompts = {tuple(r["prompt_ids"]) for r in rows}
    if len(set(answers)) == len(answers) and len(prompts) == len(rows):
        assert len(ids) == sum(alone)
    for number, row in enumerate([(r, s) for s in ("chosen", "rejected") for r in rows]):
        prompt, answer = row[0]["prompt_ids"], row[0][f"{row[1]}_ids"]
        places = batch.places[batch.token_rows == number]
        assert batch.targets[batch.token_rows == number].tolist() == answer
        assert int(batch.lengths[number]) == len(answer)
        # the state behind token j of prompt + answer predicts token j + 1
        assert positions[places].tolist() == list(
            range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        )
        assert ids[places].tolist() == [prompt[-1], *answer[:-1]]


def _one_at_a_time(policy: Any, rows: list[Any]) -> torch.Tensor:
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            answer = torch.tensor(row[side])
            ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
            logits = policy(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, answer[:, None]).sum())
    return torch.stack(found)


def _gradient(policy: Any, values: torch.Tensor) -> torch.Tensor:
    policy.zero_grad()
    (values * torch.linspace(1, 2, len(values))).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {  # it caps its scores, which sdpa cannot
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attn_implementation": "eager",
        "attn_logit_softcapping": 1.0,
    },
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "minicpm3": {  # values of another size than queries and keys
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 24,
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},  # layers keep what they are given
    "lfm2": {"num_key_value_heads": 2, "full_attn_idxs": [1]},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
NOT_FLAT = {"lfm2": "its layers are not of attention alone (conv)"}
NOT_FAST = {  # no gate, or another name for it; layers that are no linear ones
    "nemotron": ("MLPs",),
    "lfm2": ("MLPs",),
    "gpt_neox": ("MLPs",),
    "gpt2": ("LoRA layers", "MLPs", "in one pass"),
}


def _model(kind: str, **further: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2, "attn_implementation": "sdpa",
    }  # fmt: skip
    config = CONFIG_MAPPING[kind](**{**sizes, **SHAPES[kind], **further})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_pass_of_training_equals_one_sequence_at_a_time_or_is_not_taken(
    kind: str, tied: bool
) -> None:
    policy = load_policy(_model(kind, tie_word_embeddings=tied), lora=LoraConfig(rank=4))
    line = _check_training(policy, _padded if kind in NOT_FLAT else flat_pairs)
    if kind in NOT_FLAT:
        assert NOT_FLAT[kind] in line and not is_flat(policy)
    for part in ("LoRA layers", "MLPs", "in one pass"):
        assert (part in line) == (part not in NOT_FAST.get(kind, ())), line


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_sizes_that_are_no_multiple_of_64_give_the_same_as_peft_too(
    quantisation: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3}
    _model("llama", vocab_size=97, intermediate_size=172, **sizes).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, quantisation=quantisation, lora=LoraConfig(rank=5))
    for lay_out in (flat_pairs, _padded):
        assert "14 LoRA layers, 2 MLPs" in _check_training(policy, lay_out)


def test_a_trained_model_with_an_mlp_of_172_gives_the_same_as_peft_in_nf4(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("../shared/models/stories260K is not here")
    policy = load_policy(folder, lora=LoraConfig(rank=4))
    assert policy.config.intermediate_size == 172
    assert "35 LoRA layers, 5 MLPs" in _check_training(policy, flat_pairs)


def _check_training(policy: Any, lay_out: Any) -> str:
    """Hold training's own pass to peft's, one sequence at a time, however much is recomputed.

    Policy and reference in one pass, and the gradient of every adapter through the head in chunks.
    """
    policy.eval()
    move_adapter(policy, std=0.2)
    assert "plain" in choose_engine(policy, ROWS[:2], 9, "plain", chunk=5)
    expected = _one_at_a_time(policy, ROWS)
    gradients = _gradients(policy, expected)
    with reference(policy), torch.no_grad():
        theirs = _one_at_a_time(policy, ROWS)
    line = choose_engine(policy, ROWS[:2], 9, "auto", chunk=5)
    if lay_out is not flat_pairs and is_flat(policy):
        policy.get_base_model().config._attn_implementation = "sdpa"
    work = work_of(policy.get_base_model())
    assert work is not None, line
    for recomputed in sorted({0, 1, len(work.layers)}):
        work.recomputed = recomputed
        stats = pair_stats(policy, lay_out(ROWS), chunk=5)  # what PreferenceTrainer runs
        sides = ("chosen_logps", "rejected_logps")
        found = torch.cat([getattr(stats, f"policy_{side}") for side in sides])
        fixed = torch.cat([getattr(stats, f"reference_{side}") for side in sides])
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(fixed, theirs, rtol=1e-5, atol=1e-4)
        assert not fixed.requires_grad
        norms = {name: float(value.norm()) for name, value in gradients.items()}
        moved = {n: float((v - gradients[n]).norm()) for n, v in _gradients(policy, found).items()}
        assert math.hypot(*moved.values()) < 1e-5 * math.hypot(*norms.values())
        for name, away in moved.items():  # a tiny one is a difference of large sums
            assert away < 1e-4 * max(norms[name], 1e-2 * max(norms.values())), (name, recomputed)
    with reference(policy), torch.no_grad():
        alone = completion_logps(policy, lay_out(ROWS))
    torch.testing.assert_close(alone, theirs, rtol=1e-5, atol=1e-4)
    return line


def _padded(rows: list[Any]) -> Any:
    return collate_pairs(rows, pad_id=0)


def _gradients(policy: Any, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of each trained tensor by itself: a small one hides beside large ones."""
    policy.zero_grad()
    (values * torch.linspace(1, 2, len(values))).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PeftModel:
    policy = load_policy(tiny_model)
    move_adapter(policy)
    return policy.eval()


def test_order_grouping_and_layout_change_nothing_in_4_bit(policy: PeftModel) -> None:
    needs = {"first_logps", "confidences", "kls"}
    expected = pair_stats(policy, collate_pairs(ROWS, pad_id=0), needs=needs)
    gradient = _gradient(policy, expected.policy_chosen_logps)
    assert "fast" in choose_engine(policy, ROWS, 9, "fast", chunk=64)
    order = [2, 0, 3, 1]
    parts = [
        pair_stats(policy, flat_pairs([ROWS[i] for i in group]), needs=needs, chunk=3)
        for group in (order[:1], order[1:])
    ]
    back = torch.tensor(order).argsort()
    together = type(expected).cat(parts).map(lambda _, value: value[back])
    for name, value in expected.present().items():
        torch.testing.assert_close(together.present()[name], value, rtol=1e-4, atol=1e-4)
    found = _gradient(policy, together.policy_chosen_logps)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_:FutureWarning")
def test_recomputed_layers_see_the_same_segments(policy: PeftModel) -> None:
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    expected = _gradient(policy, completion_logps(policy, flat_pairs(ROWS)))
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    policy.train()
    try:
        found = _gradient(policy, completion_logps(policy, flat_pairs(ROWS)))
    finally:
        policy.gradient_checkpointing_disable()
        policy.eval()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_labelled_rows_are_laid_flat_too(policy: PeftModel) -> None:
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    labelled = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["chosen_ids"],
            "mismatched_ids": ROWS[i - 1]["rejected_ids"],
            "label": i % 2 == 0,
        }
        for i, row in enumerate(ROWS)
    ]
    batch = flat_labelled(labelled)
    assert batch.mismatched is not None
    with torch.no_grad():
        pairs = completion_logps(policy, flat_pairs(ROWS))
        torch.testing.assert_close(completion_logps(policy, batch), pairs[:4], rtol=1e-4, atol=1e-4)
        other = completion_logps(policy, batch.mismatched)
        swapped = [
            {**row, "rejected_ids": ROWS[i - 1]["rejected_ids"]} for i, row in enumerate(ROWS)
        ]
        torch.testing.assert_close(
            other, completion_logps(policy, flat_pairs(swapped))[4:], rtol=1e-4, atol=1e-4
        )


def test_what_cannot_be_laid_flat_is_recognised(tiny_model: Path) -> None:
    windowed = load_policy(_model("mistral", sliding_window=8), lora=LoraConfig(rank=2))
    assert "sliding window of 8 is shorter" in choose_engine(windowed, ROWS, 9, "auto", chunk=64)
    assert "fast" in choose_engine(windowed, ROWS, 8, "auto", chunk=64)
    eager = load_policy(tiny_model, lora=LoraConfig(rank=2), attention="eager")
    assert "attention is 'eager'" in choose_engine(eager, ROWS, 9, "auto", chunk=64)
    with pytest.raises(ConfigError, match="fast, and this model cannot: attention is 'eager'"):
        choose_engine(eager, ROWS, 9, "fast", chunk=64)
    assert "train.engine: plain" in choose_engine(eager, ROWS, 9, "plain", chunk=64)


def test_an_objective_without_a_reference_never_runs_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference ran")

    for name in ("forward.reference", "forward._fused_values", "reference_cache.reference"):
        monkeypatch.setattr(f"lora_dpo.{name}", never)
    rows = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no, no"} for i in range(4)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )
    trainer = PreferenceTrainer(
        load_policy(tiny_model, lora=LoraConfig(rank=2)),
        objective="simpo",
        args=args,
        train_data=rows,
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
        engine="fast",
    )
    trainer.train()
    assert trainer.state.global_step == 1 and is_flat(trainer.model)


def test_a_layout_that_differs_is_not_taken(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_model, lora=LoraConfig(rank=2))

    def broken(rows: Any) -> Any:
        batch = flat_pairs(rows)
        return type(batch)(**{**vars(batch), "position_ids": batch.position_ids * 2})

    monkeypatch.setattr("lora_dpo.engine.flat_pairs", broken)
    line = choose_engine(policy, ROWS, 9, "auto", chunk=64)
    assert "it differs by" in line and not is_flat(policy)
    assert policy.get_base_model().config._attn_implementation == "sdpa"


def test_a_layer_whose_gradient_is_wrong_is_not_taken_however_small_it_is(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant: the gradient of one small adapter (k_proj of the last layer) is twice what it is."""
    from lora_dpo.layers.linear import Part

    policy = load_policy(tiny_model, lora=LoraConfig(rank=2))
    planted = policy.get_base_model().model.layers[-1].self_attn.k_proj.base_layer
    true = Part.gradients

    def broken(part: Part, *args: Any) -> Any:
        of_down, of_up = true(part, *args)
        return (2 * of_down, of_up) if part.base is planted else (of_down, of_up)

    assert "LoRA layers" in choose_engine(policy, ROWS, 9, "auto", chunk=64)
    monkeypatch.setattr(Part, "gradients", broken)
    line = choose_engine(policy, ROWS, 9, "auto", chunk=64)
    assert "it differs by" in line and "LoRA layers" not in line.split("it differs")[0]
