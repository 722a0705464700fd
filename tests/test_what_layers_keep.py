"""What the fast layers keep until backward, and what they make on the way: no copy, no long wide tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lora_dpo.config import LoraConfig
from lora_dpo.data import flat_pairs
from lora_dpo.engine import choose_engine
from lora_dpo.forward import both_logps, completion_logps
from lora_dpo.layers import attention, decoder_layers, mlp, norm
from lora_dpo.layers.work import Work
from lora_dpo.planning import Setting
from lora_dpo.planning.imagined import Ledger
from lora_dpo.planning.measuring import measure
from lora_dpo.planning.operations import Shape, plain_bytes, weights_at_work
from lora_dpo.policy import load_policy, peft_config
from tests.helpers import fast_work, move_adapter
from tests.test_engine import ROWS, _gradient, _model, _one_at_a_time

LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
PAIR = [
    {
        "prompt_ids": list(range(512)),
        "chosen_ids": list(range(1000, 1512)),
        "rejected_ids": list(range(2000, 2512)),
    }
]


# ---- norms -----------------------------------------------------------------------------------


def _norm(kind: Any, size: int = 48, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    module = kind(size, eps=1e-3)
    module.weight = nn.Parameter(torch.rand(size), requires_grad=False)
    return module.to(dtype)


def _taken(module: Any) -> Any:
    work = Work()
    work.running = True
    norm.take_norm(module, work)
    return module


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 48), (1, 5, 2, 48)])
def test_a_norm_gives_the_librarys_bits_and_gradient_and_keeps_its_input_alone(
    kind: Any, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_FEW", 4 * 48)  # several pieces in backward
    found = []
    for take in (lambda module: module, _taken):
        module = take(_norm(kind, dtype=dtype))
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        ledger = Ledger()
        for tensor in (x, *module.parameters()):
            ledger.watch(tensor)
        before = ledger.now
        with ledger:
            out = module(x)
        kept = ledger.now - before - out.nbytes
        upstream = torch.randn(shape).to(dtype)
        found.append((out.detach(), torch.autograd.grad(out, x, upstream)[0], kept))
    (expected, gradient, before), (ours, of_x, kept) = found
    assert torch.equal(ours, expected) and torch.equal(of_x, gradient)
    assert kept == 0 < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_a_device_norms_in_one_kernel_that_is_the_librarys_norm(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the library's own in float64; in 16 bits each rounds once or twice, to 2^-8 in all."""
    monkeypatch.setattr(norm, "_has_kernel", lambda _: True)
    plain, ours = _norm(LlamaRMSNorm, dtype=torch.float64), _taken(_norm(LlamaRMSNorm, dtype=dtype))
    plain.weight.data = ours.weight.double()
    x = torch.randn(5, 48, dtype=dtype)
    upstream = torch.randn(5, 48, dtype=dtype)
    results = []
    for module, leaf in ((plain, x.double()), (ours, x)):
        leaf.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = module(leaf)
        results.append((out, torch.autograd.grad(out, leaf, upstream.to(out.dtype))[0]))
    assert results[1][0].dtype == dtype
    # the library norms in float32 whatever comes in
    how = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, **how)


def test_the_epsilon_of_a_norm_is_found_by_its_values_alone() -> None:
    assert norm.epsilon_of(_norm(LlamaRMSNorm)) == norm.epsilon_of(_norm(Qwen3RMSNorm)) == 1e-3
    assert norm.epsilon_of(_norm(LlamaRMSNorm, dtype=torch.bfloat16)) == 1e-3
    assert norm.epsilon_of(_norm(Gemma2RMSNorm)) is None  # one and the weight
    assert norm.epsilon_of(nn.Linear(4, 4)) is None
    wrong = _norm(LlamaRMSNorm)
    wrong.eps, wrong.variance_epsilon = 1e-3, 1e-4  # of two names, the library's own is asked
    assert norm.epsilon_of(wrong) == 1e-4
    del wrong.variance_epsilon
    wrong.forward = lambda x: LlamaRMSNorm.forward(_norm(LlamaRMSNorm), x) * 1.001
    assert norm.epsilon_of(wrong) is None


def test_norms_that_are_trained_hooked_or_torchs_own_are_left_alone(policy: PeftModel) -> None:
    hooked, trained = _norm(LlamaRMSNorm), _norm(LlamaRMSNorm)
    hooked.register_forward_hook(lambda *_: None)
    trained.weight.requires_grad_()
    heads = _norm(LlamaRMSNorm)
    heads.weight = nn.Parameter(
        torch.rand(2, 48), requires_grad=False
    )  # as Cohere's of query and key
    assert norm.is_frozen_norm(_norm(LlamaRMSNorm))
    assert not any(
        map(norm.is_frozen_norm, (hooked, trained, heads, nn.LayerNorm(4), nn.Linear(4, 4)))
    )
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    layers = len(decoder_layers(policy.get_base_model()))
    taken = [m for m in fast_work(policy).taken if type(m).__name__.endswith("Norm")]
    assert len(taken) == 2 * layers + 1  # the last one stands behind the layers


def test_a_norm_of_all_heads_at_once_costs_a_model_none_of_its_fast_layers() -> None:
    """Cohere's norms of query and key have a weight for each head, ``[heads, size]``."""
    sizes: Any = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    model = CohereForCausalLM(CohereConfig(**sizes, use_qk_norm=True, pad_token_id=0))
    policy = load_policy(model, lora=LoraConfig(rank=4))
    line = choose_engine(policy, ROWS, 9, "auto", chunk=64)
    assert "14 LoRA layers, 2 MLPs, 3 norms" in line and not line.warns


# ---- the MLP in tiles ------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("keeps_weights", [True, False])
@pytest.mark.parametrize("kind", ["llama", "phi3"])  # gate and up apart, or in one projection
def test_tiles_of_an_mlp_change_no_number_and_make_no_weight_plain_again(
    kind: str, recomputed: int, keeps_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(_model(kind), lora=LoraConfig(rank=2)).train()
    move_adapter(policy)
    expected = _one_at_a_time(policy, ROWS)
    gradient = _gradient(policy, expected)
    batch = flat_pairs(ROWS)
    choose_engine(policy, ROWS, 9, "fast", chunk=5)
    work = fast_work(policy)
    work.recomputed, work.keeps_weights = recomputed, keeps_weights
    made = []
    for size in (2048, 3):
        monkeypatch.setattr(mlp, "_ROWS", size)
        monkeypatch.setattr(mlp, "_FEW", min(size, 2))
        work.dequantised.clear()
        ours, _ = both_logps(policy, batch, chunk=5)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        found = _gradient(policy, ours)
        assert float((found - gradient).norm() / gradient.norm()) < 1e-5
        made.append(dict(work.dequantised))
    assert batch.input_ids.shape[1] > 3 * 3
    if keeps_weights:
        assert made[0] == made[1]
    else:  # for each of the larger tiles
        assert all(made[0][part] <= made[1][part] for part in made[0])


@pytest.mark.parametrize("skips_last", [True, False])
@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("keeps_weights", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_the_planner_counts_what_is_made_plain_to_the_weight(
    kind: str,
    with_reference: bool,
    keeps_weights: bool,
    recomputed: int,
    skips_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load_policy(_model(kind), lora=LoraConfig(rank=2), quantisation="none").train()
    move_adapter(policy)
    causal, batch = policy.get_base_model(), flat_pairs(ROWS)
    layers = len(decoder_layers(causal))
    assert layers == 2
    shape = Shape.of(causal.config, **weights_at_work(policy))
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    work = fast_work(policy)
    work.recomputed, work.keeps_weights, work.skips_last = recomputed, keeps_weights, skips_last
    tokens = batch.input_ids.shape[1]
    for size in (2048, 5):  # as many rows, and half of them where no weight waits
        monkeypatch.setattr(mlp, "_ROWS", size)
        work.dequantised.clear()
        if with_reference:
            ours, theirs = both_logps(policy, batch, chunk=64)
            (ours - theirs).sum().backward()
        else:
            completion_logps(policy, batch, chunk=64).sum().backward()
        made = sum(count * linear.weight.numel() for linear, count in work.dequantised.items())
        how: Any = {"reference": with_reference, "again": recomputed / layers, "fast": True}
        how |= {"keeps_weights": keeps_weights, "skips_last": skips_last, "tokens": tokens}
        expected = plain_bytes(shape, size=2, double=True, **how) / 2.515625
        assert made == pytest.approx(expected)


class _Wide(TorchDispatchMode):
    """The most tokens of any tensor as wide as the MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.tokens = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == 2
                and value.shape[1] == self.width
            ):
                self.tokens = max(self.tokens, len(value))
        return out


def test_in_a_recomputed_layer_nothing_as_wide_as_the_mlp_is_longer_than_a_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    width = 193
    model = _model("llama", intermediate_size=width)
    policy = load_policy(model, lora=LoraConfig(rank=2), quantisation="none").train()
    move_adapter(policy)
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    monkeypatch.setattr(mlp, "_ROWS", 7)
    work, layers = fast_work(policy), len(decoder_layers(policy.get_base_model()))
    batch = flat_pairs(ROWS * 2)
    weights = 64  # a factor or a weight has as many rows as the model is wide
    seen = {}
    for count in (0, layers):
        work.recomputed = count
        with _Wide(width) as wide:
            ours, theirs = both_logps(policy, batch, chunk=64)
            (ours - theirs).sum().backward()
        seen[count] = wide.tokens
    assert batch.input_ids.shape[1] > 14
    assert seen == {0: max(weights, batch.input_ids.shape[1]), layers: weights}


# ---- attention -------------------------------------------------------------------------------


def test_heads_share_keys_and_values_without_a_copy_for_each_and_change_no_number(
    policy: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = policy.get_base_model().config
    assert text.num_attention_heads > text.num_key_value_heads
    choose_engine(policy, ROWS, 9, "fast", chunk=64)
    fast_work(policy).recomputed = 0
    batch, found, kept = flat_pairs(ROWS), [], []
    for groups in (True, False):
        if not groups:
            monkeypatch.setattr(attention, "_takes_groups", lambda *_: False)
        ledger = Ledger()
        with ledger:
            ours, _ = both_logps(policy, batch, chunk=64)
            kept.append(ledger.now)
        found.append((ours.detach(), _gradient(policy, ours)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-5
    assert kept[0] < kept[1]


def test_a_kept_layer_of_llama_3_takes_as_many_bytes_as_can_be_counted_by_hand() -> None:
    """In 16 bits, KiB a token: 8 for the input of each norm and of q, k, v and of gate and up, for q, for
    what attention returns and for the input of its last projection; 2 each for k and v, and as much of
    each again for the second answer's keys, of 1,024 of 1,536 tokens; 28 each for gate and up.
    """
    rank = LoraConfig(rank=16)
    setting = Setting(LLAMA, peft_config(rank))
    tokens = 512 + 511 + 511
    by_hand = (7 * 8 + 2 * 2 + 2 * 2 * 1023 / tokens + 2 * 28) * 1024 * tokens
    found = measure(setting, PAIR)
    assert found.kept == pytest.approx(by_hand, rel=0.01)
    assert found.recomputed == tokens * 8 * 1024
    # where each head has its own copy: k, v, and the second answer's keys and values are 8 wide
    copied = by_hand + (2 * 6 + 2 * 6 * 1023 / tokens) * 1024 * tokens
    without = Setting(LLAMA, peft_config(rank), grouped=False)
    assert measure(without, PAIR).kept == pytest.approx(copied, rel=0.01)
