"""The proof of a merge loads a model that is larger than the memory, layer by layer from disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dpo import exporting, proving
from lora_dpo.policy import load_policy
from tests.helpers import move_adapter, random_rows

ROWS = random_rows(6)

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's memory is what is limited")


def _limit_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(proving, "free_memory", lambda: size)


def _places(model: nn.Module) -> dict[str, str]:
    return {name: p.device.type for name, p in model.named_parameters()}


@on_cpu
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_fit_is_read_from_disk_and_computes_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, compute: torch.dtype
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=compute)
    size = sum(p.nbytes for p in plain.parameters())
    _limit_memory(monkeypatch, size)  # a quarter is left free, and room for one layer
    model = proving.load_plain(tiny_model, compute)
    places = _places(model)
    assert places["model.embed_tokens.weight"] == "cpu"
    assert {places["model.layers.1.mlp.up_proj.weight"], places["lm_head.weight"]} == {"meta"}
    assert torch.equal(
        proving.completion_logits(model, ROWS), proving.completion_logits(plain, ROWS)
    )
    assert proving.greedy_tokens(model, ROWS) == proving.greedy_tokens(plain, ROWS)


@on_cpu
def test_a_model_that_fits_is_loaded_whole(tiny_model: Path) -> None:
    model = proving.load_plain(tiny_model, torch.float32)
    assert set(_places(model).values()) == {"cpu"}
    assert not hasattr(model, "_hf_hook")


@on_cpu
def test_a_merge_is_proven_on_the_offloaded_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_model).eval()
    move_adapter(policy)
    loads: list[Any] = []
    load = proving.load_plain
    monkeypatch.setattr(proving, "load_plain", lambda *a: loads.append(load(*a)) or loads[-1])
    _limit_memory(monkeypatch, 450_000)
    proof = exporting.export_merged(
        lambda: policy,
        AutoTokenizer.from_pretrained(tiny_model),
        tmp_path / "merged",
        sequences=ROWS,
    )
    assert "meta" in _places(loads[0]).values()
    assert proof.kl < 1e-8
    assert proof.top1 == proof.greedy == 1.0


def test_free_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = "MemTotal:       24629876 kB\nMemAvailable:   23000001 kB\nHugePages_Total:       0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: meminfo)
    assert proving.free_memory() == 23000001 * 1024

    def absent(self: Path, **_: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", absent)
    assert proving.free_memory() == sys.maxsize
