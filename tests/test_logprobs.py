"""Log-probs from hidden states equal the dense computation, gradients too."""

from __future__ import annotations

import pytest
import torch

from lora_dpo.logprobs import predicting_positions, sum_by_row, token_logps


def _parts(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, dtype=dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(0, 50, (23,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    hidden, weight, targets = _parts()
    hidden.requires_grad_()
    weight.requires_grad_()
    found = token_logps(hidden, targets, lambda x: x @ weight.T, chunk=chunk)
    scale = torch.linspace(-1, 2, 23)
    (found * scale).sum().backward()
    mine = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    dense = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (dense * scale).sum().backward()
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], weight.grad, rtol=1e-4, atol=1e-5)


def test_log_sum_exp_is_float32_behind_a_bfloat16_head() -> None:
    hidden, weight, targets = _parts()
    half = hidden.bfloat16(), weight.bfloat16()
    found = token_logps(half[0], targets, lambda x: x @ half[1].T)
    logits = (half[0] @ half[1].T).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1), rtol=1e-6, atol=1e-6
    )


def test_no_more_logits_than_a_chunk_exist_at_a_time() -> None:
    hidden, weight, targets = _parts()
    sizes: list[int] = []

    def head(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return states @ weight.T

    token_logps(hidden.requires_grad_(), targets, head, chunk=4).sum().backward()
    assert max(sizes) == 4
    assert sum(sizes) == 2 * 23  # once forward, once again in backward


def test_positions_predict_the_next_token_and_sums_go_to_their_row() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    rows, columns = predicting_positions(mask)
    assert rows.tolist() == [0, 0, 1]
    assert columns.tolist() == [1, 2, 0]
    assert sum_by_row(torch.tensor([1.0, 2.0, 4.0]), rows, 2).tolist() == [3.0, 4.0]
