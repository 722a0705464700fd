"""A merged model is the policy that was trained, or there is no merged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo import exporting
from lora_dpo.config import LoraConfig
from lora_dpo.errors import ExportError, OutputError
from lora_dpo.exporting import Proof, export_adapter, export_merged
from lora_dpo.forward import completion_logps
from lora_dpo.policy import Merged, dequantised, load_policy, merged_tensors
from tests.helpers import move_adapter, pad, random_rows

ROWS = random_rows(6)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def _moved(tiny_model: Path, **settings: Any) -> PeftModel:
    policy = load_policy(tiny_model, lora=LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def _logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return completion_logps(model.eval(), pad(ROWS))


def _export(policy: PeftModel, tokenizer: Any, to: Path, **options: Any) -> Proof:
    return export_merged(lambda: policy, tokenizer, to, sequences=ROWS, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"modules_to_save": ["lm_head"]},
        {"targets": ["q_proj", "down_proj", "lm_head"]},
    ],
)
def test_the_merged_model_is_the_policy_in_plain_transformers(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    policy = _moved(tiny_model, **settings)
    expected, reference = _logps(policy), _logps(AutoModelForCausalLM.from_pretrained(tiny_model))
    proof = _export(policy, tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logps(plain), expected, rtol=1e-4, atol=1e-3)
    assert (expected - reference).abs().max() > 0.1  # the adapter does something
    assert proof.kl < 1e-8
    assert proof.top1 == proof.greedy == 1.0
    assert proof.gate is not None and proof.kl <= proof.gate
    stored = json.loads((tmp_path / "merged" / "export_proof.json").read_text())
    assert stored["kl"] == proof.kl


def test_every_merged_weight_is_the_dequantised_one_plus_the_scaled_product(
    tiny_model: Path,
) -> None:
    policy = _moved(tiny_model)
    layer = policy.get_base_model().model.layers[1].mlp.down_proj
    factors = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = dequantised(layer.base_layer) + factors * (32 / 16)
    merged = {tensor.name: tensor for tensor in merged_tensors(policy)}
    torch.testing.assert_close(merged["model.layers.1.mlp.down_proj.weight"].value, expected)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert set(merged) == set(plain.state_dict())
    assert sum(tensor.adapted for tensor in merged.values()) == 14


def test_bfloat16_files_stay_within_the_gate(quickstart_model: Path, tmp_path: Path) -> None:
    """On a trained model: the logits of a random one are as steep as nothing real."""
    policy = _moved(quickstart_model)
    proof = _export(policy, AutoTokenizer.from_pretrained(quickstart_model), tmp_path / "half")
    assert 0 < proof.kl < 1e-4
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}  # as the base's files
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_the_folder_has_all_that_others_need_and_nothing_of_the_quantisation(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    _export(
        _moved(tiny_model), tokenizer, tmp_path / "merged", card=lambda proof: f"card {proof.kl}"
    )
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert (tmp_path / "merged" / "README.md").read_text().startswith("card ")
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.chat_template == tokenizer.chat_template
    assert again("abc é")["input_ids"] == tokenizer("abc é")["input_ids"]
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == tokenizer.chat_template


def test_many_shards_load_as_one_model(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "SHARD_BYTES", 100_000)
    policy = _moved(tiny_model)
    proof = _export(policy, tokenizer, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = sum(v.nbytes for s in shards for v in load_file(tmp_path / "merged" / s).values())
    assert index["metadata"]["total_size"] == total
    assert proof.kl < 1e-8


def test_a_merge_into_the_original_weights_is_reported_and_not_gated(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    policy = _moved(tiny_model)
    proof = _export(policy, tokenizer, tmp_path / "merged", base="original")
    assert proof.gate is None
    assert proof.kl > 1e-6  # the rounding of NF4 is between them
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    original = (
        AutoModelForCausalLM.from_pretrained(tiny_model).model.layers[0].self_attn.q_proj.weight
    )
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(
        stored["model.layers.0.self_attn.q_proj.weight"],
        original + layer.get_delta_weight("default"),
    )


def test_a_merge_that_is_not_the_policy_fails_and_leaves_nothing(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_adapter(policy: Any, original: Any = None) -> Iterator[Merged]:
        plain = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
        return (Merged(name, value, adapted=False) for name, value in plain.items())

    monkeypatch.setattr(exporting, "merged_tensors", without_adapter)
    with pytest.raises(ExportError, match="the merged model is not the policy"):
        _export(_moved(tiny_model), tokenizer, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_too_large_for_their_files_or_no_numbers_are_never_kept(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _moved(tiny_model)
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.fill_(1e6)
    with pytest.raises(ExportError, match=r"q_proj.*too large for torch\.float16"):
        _export(policy, tokenizer, tmp_path / "merged", dtype=torch.float16)

    def spoilt(policy: Any, original: Any = None) -> Iterator[Merged]:
        plain = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
        plain["model.norm.weight"][0] = float("nan")
        return (Merged(name, value, adapted=False) for name, value in plain.items())

    monkeypatch.setattr(exporting, "merged_tensors", spoilt)
    with pytest.raises(ExportError, match="not finite"):  # without a gate too
        _export(_moved(tiny_model), tokenizer, tmp_path / "merged", base="original")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_weight_that_nobody_merged_is_an_error(tiny_model: Path) -> None:
    policy = _moved(tiny_model)
    layer = policy.get_base_model().model.layers[0].self_attn
    layer.q_proj = torch.nn.Sequential(layer.q_proj)  # no longer where it was
    layer.q_proj.register_module("lora_A", torch.nn.ModuleDict({"default": torch.nn.Linear(1, 1)}))
    with pytest.raises(ExportError, match="no layer of the merge took"):
        list(merged_tensors(policy))


def test_an_existing_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    (target / "precious").write_text("mine")
    policy = _moved(tiny_model)
    with pytest.raises(OutputError, match="not empty"):
        _export(policy, tokenizer, target)
    monkeypatch.setattr(
        exporting, "prove", lambda *a, **k: (_ for _ in ()).throw(ExportError("no"))
    )
    with pytest.raises(ExportError, match="no"):
        _export(policy, tokenizer, target, overwrite=True)
    assert (target / "precious").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    monkeypatch.undo()
    _export(policy, tokenizer, target, overwrite=True)
    assert not (target / "precious").exists()
    assert (target / "model.safetensors").stat().st_mode & 0o044


def test_a_disk_that_is_too_small_is_found_before_writing(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OutputError, match=r"GiB and 0\.0 GiB are free"):
        _export(_moved(tiny_model), tokenizer, tmp_path / "merged")


def test_an_exported_adapter_is_loaded_by_peft_alone(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    policy = load_policy(tiny_model, quantisation="none").eval()
    move_adapter(policy)
    export_adapter(policy, tokenizer, tmp_path / "adapter", card="a card")
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter")
    )
    torch.testing.assert_close(_logps(alone), _logps(policy))
    assert (tmp_path / "adapter" / "README.md").read_text() == "a card"
    with pytest.raises(OutputError, match="not empty"):
        export_adapter(policy, tokenizer, tmp_path / "adapter")
