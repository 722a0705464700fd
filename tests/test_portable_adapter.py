"""An exported adapter is the policy's for every reader: those that know alpha and r, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo.errors import ExportError
from lora_dpo.exporting import export_adapter
from lora_dpo.handing.consumers import VLLM_RANKS, consumers, vllm_rank
from lora_dpo.handing.serving import serve_adapter
from lora_dpo.policy import Folded, load_policy, merged_tensors, save_portable_adapter
from tests.helpers import move_adapter, random_rows

ROWS = random_rows(3)
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
MIXED: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "use_rslora": True,
    "rank_pattern": {"down_proj": 6, "layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"up_proj": 40},
}


def _policy(model: Path, **settings: Any) -> PeftModel:
    config = peft.LoraConfig(
        **{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **MIXED, **settings}
    )
    policy = load_policy(model, quantisation="none", lora=config).eval()
    move_adapter(policy)
    return policy


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([p + c])).logits[0] for p, c in ROWS])


def _changes(policy: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in policy.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def _as_a_plain_reader_scales_it(folder: Path) -> dict[str, torch.Tensor]:
    """alpha / rank of the tensor, times B A: the rule of llama.cpp, which reads nothing else."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removesuffix(".lora_A.weight"): (alpha / a.shape[0])
        * (tensors[key.replace("lora_A", "lora_B")] @ a)
        for key, a in tensors.items()
        if key.endswith("lora_A.weight")
    }


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[k] - v).norm() / v.norm()) for k, v in expected.items())


def test_a_reader_of_alpha_and_rank_alone_gets_the_policys_change_in_every_layer(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    policy.save_pretrained(str(tmp_path / "as peft writes it"), save_embedding_layers=False)
    folded = save_portable_adapter(policy, tmp_path / "folded")
    expected = _changes(policy)
    assert _distance(_as_a_plain_reader_scales_it(tmp_path / "as peft writes it"), expected) > 0.3
    assert _distance(_as_a_plain_reader_scales_it(tmp_path / "folded"), expected) < 1e-6
    assert folded.error < 1e-6
    assert (folded.layers, folded.rank) == (8, 6)
    assert len(folded.folded) == 3
    config = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_stock_peft_on_the_base_is_the_policy(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    policy = _policy(tiny_model, **settings)
    if "modules_to_save" in settings:
        policy.get_base_model().lm_head.modules_to_save["default"].weight.data *= 1.5
    folded = export_adapter(policy, None, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = _logits(base)
    alone = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(_logits(alone), _logits(policy), rtol=1e-5, atol=1e-5)
    assert (_logits(alone) - before).abs().max() > 0.1
    refusing = {c.name for c in consumers(folded) if not c.serves}
    assert refusing == ({"vLLM", "llama.cpp", "Ollama"} if settings else set())


def test_what_was_trained_on_from_another_adapter_is_whole_without_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    start = _policy(tiny_model)
    save_portable_adapter(start, tmp_path / "start")
    policy = load_policy(tiny_model, quantisation="none", adapter=tmp_path / "start").eval()
    move_adapter(policy, seed=5)
    save_portable_adapter(policy, tmp_path / "adapter")
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter")
    )
    torch.testing.assert_close(_logits(alone.eval()), _logits(policy), rtol=1e-5, atol=1e-5)
    assert (_logits(policy) - _logits(start)).abs().max() > 0.1


def test_bfloat16_factors_are_off_by_their_rounding_and_say_so(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    folded = save_portable_adapter(policy, tmp_path / "half", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert 1e-4 < folded.error < 2**-7  # two factors, each within 2^-9 of itself
    exact = {k: v.float() for k, v in _as_a_plain_reader_scales_it(tmp_path / "half").items()}
    assert _distance(exact, _changes(policy)) < 2**-6
    assert "bfloat16" in str(folded)


def test_no_folder_of_this_machine_is_named_and_a_hub_id_is(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    assert str(tiny_model) in str(policy.peft_config["default"].base_model_name_or_path)
    for name, base_id in (("local", None), ("hub", "owner/name")):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model) if base_id is None else None
        export_adapter(policy, tokenizer, tmp_path / name, base_id=base_id)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base_id
        for path in (tmp_path / name).iterdir():
            assert str(tiny_model).encode() not in path.read_bytes(), path


def test_vllms_ranks_and_limits_are_named_with_the_flag_that_it_needs() -> None:
    assert [vllm_rank(rank) for rank in (1, 2, 16, 33, 300, 512)] == [1, 8, 16, 64, 320, 512]
    assert vllm_rank(max(VLLM_RANKS) + 1) is None
    plain = Folded(2, 24, (), False, (), "float32", 0.0)
    assert "--max-lora-rank 32" in str(consumers(plain)[1])
    assert "--enable-lora --max-lora-rank 32" in serve_adapter(plain, chat=True, base_id="o/n")
    large = Folded(2, 1024, (), False, (), "float32", 0.0)
    assert "REFUSES" in str(consumers(large)[1])
    dora = Folded(2, 8, (), True, ("lm_head",), "float32", 0.0)
    guide = serve_adapter(dora, chat=False, base_id=None)
    assert "vLLM refuses this adapter: it takes no DoRA and no whole modules" in guide
    assert "vllm serve" not in guide


def test_an_adapter_that_two_layers_share_is_merged_for_neither(tiny_model: Path) -> None:
    policy = _policy(tiny_model)
    layers = policy.get_base_model().model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    with pytest.raises(ExportError, match=r"would be merged a second time"):
        list(merged_tensors(policy))


def test_a_pair_without_its_layer_stops_the_adapters_export(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(tiny_model)
    whole = peft.get_peft_model_state_dict(policy, save_embedding_layers=False)
    key = next(key for key in whole if "lora_A" in key)
    more = {**whole, key.replace("layers.0", "layers.9"): whole[key]}
    less = {k: v for k, v in whole.items() if k != key}
    for state, message in ((more, "no layer took: .*layers.9"), (less, "holds no such pair")):
        monkeypatch.setattr(peft, "get_peft_model_state_dict", lambda *a, s=state, **k: dict(s))
        with pytest.raises(ExportError, match=message):
            save_portable_adapter(policy, tmp_path / "adapter")
