"""The laws of the policy and of ``reference()``, on real NF4 weights and real peft."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from lora_dpo.config import LoraConfig
from lora_dpo.errors import ModelError
from lora_dpo.forward import completion_logps, pair_stats
from lora_dpo.policy import (
    REFERENCE,
    dequantised,
    describe_policy,
    describe_reference,
    equals_reference,
    is_fresh,
    load_policy,
    prepare_policy,
    reference,
    save_adapter,
)
from tests.helpers import move_adapter, pad, random_rows

BATCH = pad(random_rows(4))


def _logps(policy: nn.Module) -> torch.Tensor:
    was = policy.training
    policy.eval()
    with torch.no_grad():
        found = completion_logps(policy, BATCH)
    policy.train(was)
    return found


def _reference_logps(policy: nn.Module) -> torch.Tensor:
    with reference(policy):
        return completion_logps(policy, BATCH)


def _flags(policy: nn.Module) -> list[Any]:
    layers = [m for m in policy.modules() if hasattr(m, "_disable_adapters")]
    return [
        [(m._disable_adapters, m.active_adapter) for m in layers],
        [m.training for m in policy.modules()],
        [p.requires_grad for p in policy.parameters()],
    ]


def _base_hash(policy: PeftModel) -> str:
    digest = hashlib.sha256()
    for name, value in policy.state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def policy(tiny_model: Path) -> PeftModel:
    return load_policy(tiny_model)


def test_a_fresh_adapter_gives_log_ratio_exactly_zero(policy: PeftModel) -> None:
    assert is_fresh(policy)
    stats = pair_stats(policy, BATCH)
    assert torch.equal(stats.chosen_logratios, torch.zeros(2))
    assert torch.equal(stats.rejected_logratios, torch.zeros(2))


def test_a_moved_adapter_changes_the_policy_and_not_the_reference(policy: PeftModel) -> None:
    before = _reference_logps(policy)
    move_adapter(policy)
    assert not is_fresh(policy)
    assert torch.equal(_reference_logps(policy), before)
    assert (_logps(policy) - before).abs().min() > 1e-3


def test_everything_is_as_it_was_after_the_block_nested_or_broken_off(policy: PeftModel) -> None:
    policy.train()
    policy.get_base_model().model.layers[0].eval()  # a mode of its own
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)  # peft's own disable_adapter would unfreeze it
    before = _flags(policy)
    with reference(policy):
        assert not any(m.training for m in policy.modules())
        assert not torch.is_grad_enabled()
        with reference(policy):
            pass
        assert torch.equal(completion_logps(policy, BATCH), _reference_logps(policy))
    assert _flags(policy) == before
    with pytest.raises(KeyError), reference(policy):
        raise KeyError
    assert _flags(policy) == before
    assert torch.is_grad_enabled()


def test_no_gradient_and_no_dropout_reach_the_reference(tiny_model: Path) -> None:
    policy = load_policy(tiny_model, lora=LoraConfig(dropout=0.5)).train()
    move_adapter(policy)
    first, second = _reference_logps(policy), _reference_logps(policy)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not torch.equal(*(completion_logps(policy, BATCH).detach() for _ in range(2)))


def test_base_weights_are_the_same_bytes_after_training_steps(policy: PeftModel) -> None:
    before = _base_hash(policy)
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        stats = pair_stats(policy.train(), BATCH)
        (-torch.nn.functional.logsigmoid(stats.margins)).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert not is_fresh(policy)
    assert _base_hash(policy) == before


def test_base_dropout_is_off_and_lora_dropout_as_asked(tiny_model: Path) -> None:
    policy = load_policy(tiny_model, lora=LoraConfig(dropout=0.3))
    base = policy.get_base_model()
    assert base.config.attention_dropout == 0.0
    assert base.model.layers[0].self_attn.attention_dropout == 0.0
    assert {m.p for m in policy.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_base_dropout_of_a_users_own_model_is_turned_off_and_told(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.model.extra = nn.Dropout(0.4)
    lora = peft.LoraConfig(target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM")
    with caplog.at_level("INFO", logger="lora_dpo"):
        policy = prepare_policy(peft.get_peft_model(base, lora))
    assert "dropout of the base turned off in 3 modules" in caplog.text  # two attentions, one layer
    assert base.model.extra.p == 0.0
    assert base.model.layers[1].self_attn.attention_dropout == 0.0
    dropouts = [m.p for n, m in policy.named_modules() if n.endswith("lora_dropout.default")]
    assert set(dropouts) == {0.2}


def test_gradients_are_those_of_a_dequantised_float32_copy_after_an_evaluation(
    tiny_model: Path, policy: PeftModel
) -> None:
    """bitsandbytes may repack 4-bit weights at the first evaluation; the guard keeps it from it."""
    import bitsandbytes

    linears = [m for m in policy.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert linears and not any(m.support_avx512bf16_for_cpu for m in linears)
    move_adapter(policy)
    _logps(policy)  # the evaluation forward that would repack
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name, module in policy.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = dequantised(module)
    copy = load_policy(plain)
    copy.load_state_dict(
        {k: v for k, v in policy.state_dict().items() if "lora_" in k}, strict=False
    )
    gradients = []
    for model in (policy.eval(), copy.eval()):
        model.zero_grad()
        pair_stats(model, BATCH).margins.sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        )
    torch.testing.assert_close(_logps(policy), _logps(copy), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_checkpointing_keeps_every_adapters_gradient(policy: PeftModel) -> None:
    move_adapter(policy)
    policy.train()

    def gradients() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        pair_stats(policy, BATCH).margins.sum().backward()
        return {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}

    plain = gradients()
    base = policy.get_base_model()
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    recomputed = gradients()
    assert all(g is not None and g.abs().sum() > 0 for g in recomputed.values())
    for name, expected in plain.items():
        torch.testing.assert_close(recomputed[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True},
        {"rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"targets": ["q_proj", "lm_head"]},
        {"init": "gaussian"},
    ],
)
def test_variants_begin_at_the_reference_and_leave_it_alone(
    tiny_model: Path, settings: dict[str, Any]
) -> None:
    policy = load_policy(tiny_model, lora=LoraConfig(**settings))
    fixed = _reference_logps(policy)
    torch.testing.assert_close(_logps(policy), fixed, rtol=1e-5, atol=1e-4)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
    assert torch.equal(_reference_logps(policy), fixed)
    assert (_logps(policy) - fixed).abs().max() > 1e-3


@pytest.mark.parametrize("quantisation", ["nf4", "fp4", "int8", "none"])
def test_every_quantisation_loads_and_starts_at_its_reference(
    tiny_model: Path, quantisation: str
) -> None:
    policy = load_policy(tiny_model, quantisation=quantisation)
    kinds = describe_policy(policy).total_layers
    expected = {"nf4": "4-bit", "fp4": "4-bit", "int8": "8-bit", "none": "unquantised"}[
        quantisation
    ]
    assert kinds[expected] >= 14
    assert torch.equal(_logps(policy), _reference_logps(policy))
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


def test_embeddings_and_head_take_the_compute_dtype_and_adapters_stay_float32(
    tiny_model: Path,
) -> None:
    policy = load_policy(tiny_model, compute_dtype="bfloat16")
    base = policy.get_base_model()
    assert base.lm_head.weight.dtype == base.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert "everything else in bfloat16" in describe_policy(policy).lines()[0]


@pytest.mark.parametrize("name", ["default", "sft"])
def test_starting_from_an_adapter_of_any_name_makes_its_frozen_copy_the_reference(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    base = load_policy(tiny_model).unload()
    start = peft.get_peft_model(
        base, peft.LoraConfig(target_modules="all-linear"), adapter_name=name
    )
    move_adapter(start, name)
    expected = _logps(start)
    policy = prepare_policy(start)
    assert describe_reference(policy).startswith("the starting adapter, frozen")
    assert equals_reference(policy)
    assert torch.equal(_reference_logps(policy), expected)
    move_adapter(policy, name, seed=7)
    assert torch.equal(_reference_logps(policy), expected)
    assert not equals_reference(policy)
    assert not any(p.requires_grad for n, p in policy.named_parameters() if f".{REFERENCE}" in n)
    # through the disk: any name comes back, and peft alone can load it
    save_adapter(start, tmp_path / "sft", adapter=REFERENCE)
    again = load_policy(tiny_model, adapter=tmp_path / "sft")
    assert torch.equal(_reference_logps(again), expected)
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "sft")
    )
    assert not is_fresh(alone)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "pissa_niter_4"])
def test_inits_that_rewrite_the_base_are_refused(tiny_model: Path, init: str) -> None:
    with pytest.raises(ModelError, match="rewrites the base weights"):
        load_policy(
            tiny_model,
            quantisation="none",
            lora=peft.LoraConfig(init_lora_weights=init, loftq_config={"loftq_bits": 4}),
        )


def test_trained_biases_and_other_methods_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="trains biases"):
        load_policy(tiny_model, lora=peft.LoraConfig(bias="lora_only", target_modules="all-linear"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    other = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="only LoRA"):
        prepare_policy(other)


def test_a_model_that_is_none_is_refused_before_weights_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing': no such folder"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no causal language model"):
        load_policy(tmp_path)
    MixtralConfig(hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "moe")
    with pytest.raises(ModelError, match="mixture-of-experts"):
        load_policy(tmp_path / "moe")
    from transformers import LlavaConfig, T5Config

    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="no causal language model of transformers"):
        load_policy(tmp_path / "t5")
    LlavaConfig().save_pretrained(tmp_path / "llava")
    with pytest.raises(ModelError, match="multimodal"):
        load_policy(tmp_path / "llava")
    config = LlamaConfig(hidden_size=64)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "gptq")
    with pytest.raises(ModelError, match="quantised by gptq"):
        load_policy(tmp_path / "gptq")


def test_tied_heads_are_not_trained_on_one_side(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    with pytest.raises(ModelError, match="ties its head"):
        load_policy(tmp_path / "tied", lora=LoraConfig(modules_to_save=["lm_head"]))


def test_the_reference_of_merged_adapters_is_refused(policy: PeftModel) -> None:
    move_adapter(policy)
    policy.merge_adapter()
    with pytest.raises(ModelError, match="merged into its base"), reference(policy):
        pass


def test_a_checkpoint_quantised_by_bitsandbytes_is_accepted(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    quantised.save_pretrained(tmp_path / "bnb")
    policy = load_policy(tmp_path / "bnb")
    assert describe_policy(policy).total_layers["4-bit"] == 14
    assert torch.equal(_logps(policy), _reference_logps(policy))


@pytest.mark.parametrize(
    ("own", "in_use", "asked"),
    [
        (None, False, "expandable_segments:True"),
        (None, True, None),  # torch has read its settings by then
        ("PYTORCH_ALLOC_CONF", False, "theirs"),
        ("PYTORCH_CUDA_ALLOC_CONF", False, None),
    ],
)
def test_memory_of_a_card_grows_in_segments_unless_the_user_has_settings(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, in_use: bool, asked: Any
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "theirs")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    load_policy(tiny_model)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == asked
