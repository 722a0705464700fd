"""The proof before training: what it finds in 16 bits, what it leaves behind, and how loudly it tells."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_dpo import float32
from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_pairs
from lora_dpo.engine import choose_engine
from lora_dpo.float32 import float32_compute
from lora_dpo.forward import completion_logps
from lora_dpo.layers.linear import Part
from lora_dpo.policy import load_policy, merged_tensors
from tests.helpers import move_adapter
from tests.test_engine import ROWS, _gradient, _model, _one_at_a_time


def _policy(model: Any, **settings: Any) -> Any:
    return load_policy(model, lora=LoraConfig(rank=4), compute_dtype="bfloat16", **settings)


def _all_scales_off_by(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(true: Any) -> Any:
        return lambda part, *args, **kw: true(
            replace(part, scale=part.scale * (1 + share)), *args, **kw
        )

    for name in ("forward", "gradients", "backward"):
        monkeypatch.setattr(Part, name, off(getattr(Part, name)))


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_a_lora_scale_that_is_off_by_a_twentieth_is_found_in_bfloat16_too(
    quantisation: str,
    quickstart_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = _policy(quickstart_model, quantisation=quantisation)
    line = choose_engine(policy, ROWS, 9, "auto", chunk=64)
    assert "LoRA layers" in line and "in float32 too" in line and not line.warns
    _all_scales_off_by(0.05, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        line = choose_engine(policy, ROWS, 9, "auto", chunk=64)
    assert "the library's layers (it differs by" in line and "rows end to end" in line
    assert line.warns and caplog.messages == [line]
    monkeypatch.setattr("lora_dpo.engine.computes_in_float32", lambda model: False)
    assert "LoRA layers" in choose_engine(policy, ROWS, 9, "auto", chunk=64)  # 16 bits hide it


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_computing_in_float32_is_that_and_every_bit_is_as_before(
    kind: str, quantisation: str, tmp_path: Path
) -> None:
    """Against plain transformers on the same weights, merged in float32."""
    _model(kind).save_pretrained(tmp_path)
    policy = _policy(tmp_path, quantisation=quantisation).eval()
    move_adapter(policy, std=0.2)
    twin = _model(kind).eval()
    merged = {tensor.name: tensor.value.float() for tensor in merged_tensors(policy)}
    assert not twin.load_state_dict(merged, strict=False).unexpected_keys
    with torch.no_grad():
        expected, rounded = _one_at_a_time(twin, ROWS), _one_at_a_time(policy, ROWS)
    before = {name: (p.dtype, p.detach().clone()) for name, p in policy.named_parameters()}
    own = {id(module): set(vars(module)) for module in policy.modules()}
    with float32_compute(policy):
        values = completion_logps(policy, collate_pairs(ROWS, pad_id=0))
        assert float(_gradient(policy, values).norm()) > 0
    policy.zero_grad()
    torch.testing.assert_close(values.detach(), expected, rtol=1e-5, atol=1e-4)
    assert float((rounded - expected).abs().max()) > 1e-3
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == before[name][0] and torch.equal(parameter, before[name][1]), name
    assert own == {id(module): set(vars(module)) for module in policy.modules()}


class _Copies(TorchDispatchMode):
    """Notes the largest float32 tensor among those that are not as large as what is watched for."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.largest = max(self.largest, value.numel())
        return out


def test_no_large_weight_is_copied_in_float32(
    quickstart_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(quickstart_model)
    head = policy.get_base_model().get_output_embeddings().weight
    largest = max(m.weight.quant_state.shape.numel() for m in _four_bit(policy))
    assert head.dtype == torch.bfloat16 and head.numel() > 2 * largest
    monkeypatch.setattr(float32, "BLOCK", 4096)
    with _Copies() as seen:
        choose_engine(policy, ROWS[:2], 9, "auto", chunk=8)
    assert seen.largest <= largest  # one layer's weight at a time, as in a step


def _four_bit(policy: Any) -> list[Any]:
    return [m for m in policy.modules() if type(m).__name__ == "Linear4bit"]


def test_a_proof_in_float32_that_cannot_be_made_leaves_the_one_in_16_bits(
    quickstart_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(quickstart_model)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for it")

    monkeypatch.setattr(float32, "_times", full)
    line = choose_engine(policy, ROWS, 9, "auto", chunk=64)
    assert "LoRA layers" in line and line.endswith("(proven on two rows)") and not line.warns


def test_what_a_model_does_not_support_is_no_warning_and_what_was_insisted_on_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="lora_dpo")
    for kind in ("gemma2", "gemma3_text", "mistral", "gpt2"):
        further = {"sliding_window": 8} if kind == "mistral" else {}
        policy = load_policy(_model(kind, **further), lora=LoraConfig(rank=2))
        assert not choose_engine(policy, ROWS, 9, "auto", chunk=64).warns, kind
    dropping = load_policy(_model("llama"), lora=LoraConfig(rank=2, dropout=0.1))
    assert not choose_engine(dropping, ROWS, 9, "auto", chunk=64).warns
    assert not caplog.messages
    line = choose_engine(dropping, ROWS, 9, "fast", chunk=64)
    assert line.warns and "LoRA dropout" in line and caplog.messages == [line]
    assert not choose_engine(dropping, ROWS, 9, "plain", chunk=64).warns
