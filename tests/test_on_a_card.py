"""What only a card can show: its kernels, its streams, its allocator. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_dpo.config import LoraConfig
from lora_dpo.engine import choose_engine, largest_difference, lay_out, recompute_layers
from lora_dpo.forward import both_logps
from lora_dpo.layers import attention, norm
from lora_dpo.layers.capped import capped_attention
from lora_dpo.planning import Setting, measure
from lora_dpo.policy import load_policy, peft_config
from lora_dpo.reference_cache import known_reference
from tests.helpers import move_adapter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CARD = "cuda"
LORA = LoraConfig(rank=16)
LLAMA = LlamaConfig(
    vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6,
    num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=8192,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def _row(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(prompt)
    lengths = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    drawn = {k: torch.randint(3, 8000, (n,), generator=draw) for k, n in lengths.items()}
    return {name: ids.tolist() for name, ids in drawn.items()}


SHORT = [_row(30, 20, 25), _row(11, 40, 7)]
LONG = [_row(1024, 512, 700), _row(700, 300, 1)]


def _policy(dtype: torch.dtype, device: str = CARD, quantisation: str = "none") -> PeftModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).to(device=device, dtype=dtype)
    policy = load_policy(model, lora=LORA, quantisation=quantisation).to(device).train()
    torch.manual_seed(1)
    move_adapter(policy)
    line = choose_engine(policy, SHORT, 2300, "fast", chunk=256)
    assert "in one pass" in line and "norms" in line
    return policy


def _step(policy: PeftModel, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.zero_grad(set_to_none=True)
    batch = lay_out(rows, flat=True).to(next(policy.parameters()).device)
    ours, theirs = both_logps(policy, batch, chunk=256)
    weights = torch.linspace(1, 2, len(ours), device=ours.device)
    ((ours - theirs) * weights).sum().backward()
    gradients = [p.grad.cpu() for p in policy.parameters() if p.grad is not None]
    return torch.stack([ours.detach(), theirs]).cpu(), gradients


def test_a_step_in_float32_equals_the_cpus() -> None:
    found, gradients = _step(_policy(torch.float32), SHORT)
    expected, others = _step(_policy(torch.float32, "cpu"), SHORT)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert largest_difference(gradients, others, 1e-3) < 1e-3


@pytest.mark.parametrize(
    ("recomputed", "offloaded", "moved"),
    [(6, False, 0), (6, True, 0), (0, False, 6), (0, False, 3), (2, True, 3)],
)
def test_what_is_recomputed_or_waits_elsewhere_gives_the_same_again_and_again(
    recomputed: int, offloaded: bool, moved: int
) -> None:
    """Kernels add up in no fixed order in backward: to 2 % of a gradient in 16 bits; forward is exact."""
    policy = _policy(torch.bfloat16)
    recompute_layers(policy, 0)
    expected, gradients = _step(policy, LONG)
    recompute_layers(policy, recomputed, offloaded=offloaded, moved=moved)
    for _ in range(10):
        found, others = _step(policy, LONG)
        assert torch.equal(found, expected)
        assert largest_difference(others, gradients) < 0.02


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize(("recomputed", "moved"), [(6, 0), (0, 0), (0, 6)])
def test_a_micro_batch_is_queued_without_waiting_for_the_card(
    recomputed: int, moved: int, quantisation: str
) -> None:
    """So that the next one is packed and queued while the card works; a step waits at its end."""
    policy = _policy(torch.bfloat16, quantisation=quantisation)
    recompute_layers(policy, recomputed, moved=moved)
    _step(policy, LONG)
    rows = [
        {**row, "reference_chosen_logps": -9.0, "reference_rejected_logps": -8.0} for row in LONG
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch, fixed = lay_out(rows, flat=True).to(CARD), known_reference(rows, CARD)
        assert fixed is not None
        ours, theirs = both_logps(policy, batch, chunk=256)
        ((ours - theirs) * fixed).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_heads_share_keys_where_a_kernel_can_and_are_copied_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = ((1, 16, 64, 64), (1, 4, 64, 64), (1, 4, 64, 64))
    half = [torch.randn(shape, device=CARD, dtype=torch.bfloat16) for shape in shapes]
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert attention._takes_groups(*half) == capable
    assert not attention._takes_groups(*(value.float() for value in half))
    policy = _policy(torch.bfloat16)
    found, gradients = _step(policy, LONG)
    monkeypatch.setattr(attention, "_takes_groups", lambda *_: False)
    expected, others = _step(policy, LONG)
    # 700 summed log-probs, each of 16-bit arithmetic
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1.0)
    assert largest_difference(gradients, others) < 0.05


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (100, 300)])
def test_capped_attention_equals_the_cpus(queries: int, keys: int) -> None:
    torch.manual_seed(0)
    here = [torch.randn(1, 4, n, 32, requires_grad=True) for n in (queries, keys, keys)]
    there = [value.detach().to(CARD).requires_grad_() for value in here]
    upstream = torch.randn(1, 4, queries, 32)
    results = []
    for values, of_out in ((here, upstream), (there, upstream.to(CARD))):
        out = capped_attention(*values, scale=0.2, cap=1.5)
        results.append([out, *torch.autograd.grad(out, values, of_out)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_kernel_norms_as_the_library_does(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(1024).to(CARD)
    module.weight = torch.nn.Parameter(torch.rand(1024, device=CARD).to(dtype), requires_grad=False)
    assert norm.epsilon_of(module) == module.variance_epsilon
    x = torch.randn(64, 1024, device=CARD, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    results = []
    for call in (module, lambda x: norm._fused(module.weight, module.variance_epsilon, x)):
        out = call(x)
        results.append((out.detach(), *torch.autograd.grad(out, x, upstream)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("recomputed", "moved"), [(6, 0), (3, 0), (0, 0), (0, 6), (2, 2)])
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_the_predicted_peak_is_within_a_tenth_of_the_allocators(
    quantisation: str, recomputed: int, moved: int
) -> None:
    how: Any = {"dtype": torch.bfloat16, "quantisation": quantisation}
    setting = Setting(LLAMA, peft_config(LORA), chunk=256, **how)
    found = measure(setting, LONG, accumulates=False)
    policy = _policy(torch.bfloat16, quantisation=quantisation)
    recompute_layers(policy, recomputed, moved=moved)
    _step(policy, LONG)
    policy.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _step(policy, LONG)
    measured = torch.cuda.max_memory_allocated() - before
    assert found.activations(recomputed, moved) == pytest.approx(measured, rel=0.1)
