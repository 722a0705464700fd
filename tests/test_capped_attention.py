"""Attention with capped scores, a few queries at a time: its formula, its gradient, and Gemma 2's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_dpo.config import LoraConfig
from lora_dpo.data import collate_pairs
from lora_dpo.engine import choose_engine, is_flat
from lora_dpo.forward import completion_logps
from lora_dpo.layers import capped
from lora_dpo.layers.capped import capped_attention
from lora_dpo.policy import load_policy
from tests.helpers import move_adapter
from tests.test_engine import ROWS, _gradient, _model, _one_at_a_time

SCALE, CAP = 0.4, 1.5


def _drawn(queries: int, keys: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 3, queries, 4), (2, 3, keys, 4), (2, 3, keys, 5))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = CAP * torch.tanh(query @ key.transpose(2, 3) * SCALE / CAP)
    return scores.where(mask, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("block", [1, 18 * 7, 2**23])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (3, 7), (1, 5), (4, 4)])
@pytest.mark.parametrize("masked", ["where it is True", "by what is added", ""])
def test_values_and_gradients_are_those_of_the_formula(
    masked: str, queries: int, keys: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capped, "_SCORES", block)
    values = _drawn(queries, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    given: dict[str, Any] = {"scale": SCALE, "cap": CAP}
    if masked:
        mask = mask & (torch.rand(2, 1, queries, keys) < 0.7)
        mask[..., 0] = True
        added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        given["mask"] = added if "added" in masked else mask
    found, expected = capped_attention(*values, **given), _formula(*values, mask)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, values, upstream),
        torch.autograd.grad(expected, values, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_query_that_sees_nothing_gives_numbers() -> None:
    values = _drawn(3, 3)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[0, :, 0] = False
    out = capped_attention(*values, scale=SCALE, cap=CAP, mask=mask)
    out.sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in values if value.grad is not None)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_add_no_rounding_in_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over 64 blocks are rounded twice, once in each block and at their end; those of one are once."""
    torch.manual_seed(0)
    values = [torch.randn(1, 2, 512, 16).to(dtype).requires_grad_() for _ in range(3)]
    upstream = torch.randn(1, 2, 512, 16).to(dtype)
    exact = [value.detach().double().requires_grad_() for value in values]
    out = _formula(*exact, torch.ones(512, 512, dtype=torch.bool).tril())
    expected = torch.autograd.grad(out, exact, upstream.double())
    away = {}
    for block in (2**23, 2 * 512 * 8):
        monkeypatch.setattr(capped, "_SCORES", block)
        out = capped_attention(*values, scale=SCALE, cap=CAP)
        found = torch.autograd.grad(out, values, upstream)
        errors = [f.double() - e for f, e in zip(found, expected, strict=True)]
        away[block] = [float(e.norm() / x.norm()) for e, x in zip(errors, expected, strict=True)]
    one, many = away.values()
    assert all(ours < math.sqrt(2) * theirs for ours, theirs in zip(many, one, strict=True))


class _Most(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


def test_no_more_scores_than_a_block_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "_SCORES", 1000)
    query, key, value = (torch.randn(1, 2, 90, 4, requires_grad=True) for _ in range(3))
    with _Most() as most:
        capped_attention(query, key, value, scale=SCALE, cap=CAP).sum().backward()
    assert most.numbers <= 1000 < 2 * 90 * 90


def test_gemma_2_runs_flat_and_padded_as_the_library_runs_each_sequence() -> None:
    model = _model("gemma2", sliding_window=16)
    gemma = load_policy(model, lora=LoraConfig(rank=2), quantisation="none").eval()
    move_adapter(gemma)
    expected = _one_at_a_time(gemma, ROWS)
    gradient = _gradient(gemma, expected)
    ids = torch.tensor([[5, 6, 7, 8]])
    # 24 tokens, beyond the window of every other layer
    said = gemma.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
    choose_engine(gemma, ROWS, 9, "fast", chunk=64)
    assert is_flat(gemma)
    for side in ("right", "left"):  # padded rows, beyond a window and in an evaluation
        batch = collate_pairs(ROWS, pad_id=0, padding_side=side)
        found = completion_logps(gemma, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        away = (_gradient(gemma, found) - gradient).norm() / gradient.norm()
        assert float(away) < 1e-5
    for how in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        again = gemma.generate(input_ids=ids, max_new_tokens=20, do_sample=False, **how)
        assert torch.equal(again, said)
    with pytest.raises(AssertionError):  # uncapped it is another model
        gemma.get_base_model().model.layers[0].self_attn.attn_logit_softcapping = 1e4
        torch.testing.assert_close(completion_logps(gemma, batch), expected, rtol=1e-5, atol=1e-4)
