"""A step on a device that is not the CPU: nothing of it is made elsewhere, and nothing waits for it.

The device is ``meta``: its tensors have a place and no values, so that an operation that mixes it with the
CPU raises, and so does one that reads a value back (``.item()``, ``.tolist()``, ``nonzero``), for which a
real card would have to be waited for. What runs is the code of a step; layers in 4 bits are those that the
planner imagines.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, masking_utils

from lora_dpo.config import LoraConfig
from lora_dpo.engine import lay_out
from lora_dpo.forward import both_logps, labelled_stats, pair_stats
from lora_dpo.metrics import Window, row_metrics
from lora_dpo.objectives import OBJECTIVES
from lora_dpo.planning import Setting, imagined
from lora_dpo.planning.measuring import _prepare
from lora_dpo.policy import peft_config
from lora_dpo.stats import PAIR_NEEDS
from lora_dpo.testing.records import random_stats

CARD = "meta"
LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
PAIRS: list[dict[str, Any]] = [
    {"prompt_ids": [3, 4, 5], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6, 10]},
    {"prompt_ids": [13], "chosen_ids": [14], "rejected_ids": [15, 16, 17]},
]
LABELLED: list[dict[str, Any]] = [
    {"prompt_ids": [3, 4], "completion_ids": [6, 7, 8], "label": True, "mismatched_ids": [5, 6]},
    {"prompt_ids": [13], "completion_ids": [14], "label": False, "mismatched_ids": [7]},
]
# Which tokens are drawn depends on how many there are: the lengths are read back, once a micro-batch.
READ_BACK = "sampled_logps"


@pytest.fixture(autouse=True)
def _a_place_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagined, "_imagine", lambda policy: None)  # it stays where it is, on meta
    # torch's autocast knows no such device, and float32 needs none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float32)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # the library asks of padded rows whether there is any padding, and waits for the answer
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)


def _policy(
    *, flat: bool, fast: bool = True, recomputed: int = 1, quantisation: str = "nf4"
) -> Any:
    setting = Setting(
        LLAMA, peft_config(LoraConfig(rank=4)), dtype=torch.float32, quantisation=quantisation,
        flat=flat, fast=fast,
    )  # fmt: skip
    policy = imagined.imagined_policy(
        LLAMA, setting.lora, dtype=setting.dtype, quantisation=quantisation, double=True
    ).train()
    _prepare(policy, setting, recomputed)
    return policy


def _all_there(policy: Any, loss: torch.Tensor) -> None:
    """Hold that the loss reaches every adapter, on the device."""
    loss.backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained and {p.grad.device.type for p in trained} == {CARD}


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_policy_and_reference_and_their_gradient_stay_on_the_device(
    flat: bool, fast: bool, recomputed: int, quantisation: str
) -> None:
    policy = _policy(flat=flat, fast=fast, recomputed=recomputed, quantisation=quantisation)
    ours, theirs = both_logps(policy, lay_out(PAIRS, flat=flat).to(CARD), chunk=2)
    assert {ours.device.type, theirs.device.type} == {CARD}
    _all_there(policy, (ours - theirs).sum())


@pytest.mark.parametrize("need", sorted({*PAIR_NEEDS} - {READ_BACK}))
def test_so_do_statistics_that_objectives_need_beside(need: str) -> None:
    policy = _policy(flat=True)
    rows = [{**row, "chosen_score": 1.0, "rejected_score": 0.0} for row in PAIRS]
    stats = pair_stats(policy, lay_out(rows, flat=True).to(CARD), needs={need}, chunk=2)
    assert {value.device.type for value in stats.present().values()} == {CARD}
    _all_there(policy, stats.policy_chosen_logps.sum() - stats.policy_rejected_logps.sum())


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"mismatched"})])
def test_so_do_those_of_single_answers(needs: frozenset[str]) -> None:
    policy = _policy(flat=True)
    rows = [{k: v for k, v in row.items() if needs or k != "mismatched_ids"} for row in LABELLED]
    stats = labelled_stats(policy, lay_out(rows, flat=True).to(CARD), needs=needs, chunk=2)
    assert {value.device.type for value in stats.present().values()} == {CARD}
    _all_there(policy, stats.policy_logps.sum())


# It leaves out rows by their margins: how many there are is a value.
@pytest.mark.parametrize("name", sorted({*OBJECTIVES} - {"beta_dpo"}))
def test_so_do_the_losses_of_every_objective_with_their_gradient_and_figures(name: str) -> None:
    stats = random_stats(OBJECTIVES[name]).map(lambda _, value: value.to(CARD))
    leaves = stats.map(
        lambda field, v: v.requires_grad_() if field.startswith("policy") else v.detach()
    )
    bound = OBJECTIVES[name].bind()
    losses = bound(leaves, bound.initial_states())
    assert losses.device.type == CARD
    losses.sum().backward()
    if OBJECTIVES[name].data == "paired":  # of single answers the classes are told apart
        window = Window()
        window.add(row_metrics(bound, stats, losses.detach()))
        assert window.totals is not None and window.totals.device.type == CARD


def test_a_tensor_of_the_cpu_among_them_would_be_noticed() -> None:
    policy = _policy(flat=True)
    batch = lay_out(PAIRS, flat=True)
    with pytest.raises(RuntimeError, match="device"):
        both_logps(policy, batch, chunk=2)
    with pytest.raises(RuntimeError, match="no data"):
        pair_stats(policy, batch.to(CARD), needs={READ_BACK}, chunk=2)


@pytest.mark.parametrize(
    "batch", [lay_out(PAIRS, flat=True), lay_out(PAIRS, flat=False), lay_out(LABELLED, flat=True)]
)
def test_a_batch_is_sent_to_a_card_from_pinned_memory_without_waiting(
    batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a torch without CUDA can show: which copies it would be asked for."""
    pinned: list[torch.Tensor] = []
    sent: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: torch.Tensor, device: Any, *, non_blocking: bool = False) -> torch.Tensor:
        assert device == "cuda" and non_blocking and tensor is pinned[-1]
        sent.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    there = batch.to("cuda")
    parts = [b for b in (there, getattr(there, "mismatched", None)) if b is not None]
    tensors = [v for part in parts for v in vars(part).values() if isinstance(v, torch.Tensor)]
    assert {id(value) for value in tensors} == {id(value) for value in sent}
