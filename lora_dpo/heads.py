"""A model's head: found inside its wrappers, swapped for the time of one call, proven to be its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_dpo.errors import ModelError
from lora_dpo.logprobs import Head
from lora_dpo.positions import counted_positions

IN_FLOAT32 = "_lora_dpo_float32"  # on a model that ``float32_compute`` has made so


def causal_lm(model: nn.Module) -> Any:
    """Return the transformers model inside the wrappers of peft, accelerate and torch."""
    while True:
        if isinstance(model, PeftModel):
            return model.get_base_model()
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def home_device(model: nn.Module) -> torch.device:
    """Return where a model computes: where its head is, for the embeddings may be elsewhere.

    Where the head waits on disk, the first weight that is in memory says it.
    """
    causal = causal_lm(model)
    weights = [*causal.get_output_embeddings().parameters(), *causal.parameters()]
    found = next((weight.device for weight in weights if weight.device.type != "meta"), None)
    return found or torch.device("cpu")


def base_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of what the base does not quantise: that of its computation."""
    causal = causal_lm(model)
    if IN_FLOAT32 in vars(causal):
        return torch.float32
    embeddings = causal.get_input_embeddings()
    original = getattr(embeddings, "original_module", embeddings)  # not peft's float32 copy
    dtype: torch.dtype = original.weight.dtype
    return dtype


def compute_context(model: nn.Module) -> AbstractContextManager[Any]:
    """Autocast to the dtype of the base where that is 16 bits: the adapters stay float32."""
    dtype = base_dtype(model)
    if dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(home_device(model).type, dtype=dtype)


def check_head(model: nn.Module) -> None:
    """Prove on eight tokens that the swapped head is the model's own and that rows stand for themselves.

    Raises:
        ModelError: the model does something to its logits that we do not know, is not causal, lets
            padding or the row beside it into a row, or gives no numbers, so that every log-prob would
            be wrong.
    """
    causal = causal_lm(model)
    vocabulary = range(causal.get_input_embeddings().num_embeddings)
    named: Any = getattr(causal.config.get_text_config(), "pad_token_id", None)
    padding = int(named) if named in vocabulary else 0  # old configs name -1, or one too many
    *tokens, other = [token for token in vocabulary[:10] if token != padding][:9]
    ids = torch.tensor([tokens], device=home_device(model))
    was_training = model.training
    model.eval()
    with torch.no_grad(), compute_context(model):
        ours, dense = _logits_by_own_head(model, ids), _dense_logits(model, ids)
        ids[0, -1] = other
        ahead = _dense_logits(model, ids)
        beside = _padded_logits(model, ids, padding)
    model.train(was_training)
    if bool(dense.isnan().any()):
        raise ModelError(
            f"{type(causal).__name__}: its logits are no numbers on eight tokens, so its weights are damaged, or "
            f"overflow in {base_dtype(model)}. Look at its files, or set model.compute_dtype: float32."
        )
    scale = float(dense.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) + 1e-6  # masked tokens
    if not torch.allclose(ours, dense, rtol=1e-2, atol=1e-3 * scale):
        raise ModelError(
            f"{type(causal).__name__}: its logits are not head(hidden) with a known scale or soft cap "
            f"(they differ by {(ours - dense).abs().max():.3g}); this model is not supported."
        )
    # in one shape of a batch nothing but what is behind differs; in another the kernels may too
    exact = not torch.is_autocast_enabled() and base_dtype(model) == torch.float32
    bound = 1e-5 if exact else 1e-2
    beside_bound = 10 * max(bound, 1e-3)
    if any(type(weight).__name__ == "Int8Params" for weight in causal.parameters()):
        bound = beside_bound = 0.1  # all tokens choose together which columns are not rounded
    if not torch.allclose(ahead[:, :-1], dense[:, :-1], rtol=0, atol=bound * scale):
        raise ModelError(
            f"{type(causal).__name__}: a token changes the logits before it, so this is no causal model."
        )
    alone = dense[:, : beside.shape[1]]
    if not torch.allclose(beside, alone, rtol=0, atol=beside_bound * scale):
        raise ModelError(
            f"{type(causal).__name__}: the logits of a row are others beside a longer row than alone (by "
            f"{(beside - alone).abs().max():.3g} of {scale:.3g}), so padding reaches them, or its positions "
            "do not count from 0 (RoBERTa's do not); this model is not supported."
        )


def _logits_by_own_head(model: nn.Module, ids: Tensor) -> Tensor:
    found: list[Tensor] = []

    def score(hidden: Tensor, head: Head) -> Tensor:
        found.append(head(hidden).float())
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with swapped_head(causal_lm(model), score):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return found[0]


def _dense_logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return logits.float()


def _padded_logits(model: nn.Module, ids: Tensor, padding: int) -> Tensor:
    """Return the logits of the first half of a row, which runs padded beside the whole of it."""
    half = max(1, ids.shape[1] // 2)
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, half:] = 0
    positions = counted_positions(causal_lm(model), mask)
    logits: Tensor = model(
        input_ids=ids.where(mask.bool(), padding),
        attention_mask=mask,
        use_cache=False,
        **positions,
    ).logits
    return logits[1:, :half].float()


@contextmanager
def swapped_head(causal: Any, score: Callable[[Tensor, Head], Tensor]) -> Iterator[None]:
    """Call ``score(hidden, head)`` in place of the model's head, on this instance, in this block."""
    head = causal.get_output_embeddings()
    transform = _logit_transform(causal.config.get_text_config())
    patched_before = "forward" in vars(head)
    original = head.forward

    def own_head(states: Tensor) -> Tensor:
        return transform(original(states))

    head.forward = lambda hidden: score(hidden, own_head)
    try:
        yield
    finally:
        if patched_before:
            head.forward = original
        else:
            del head.forward


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to its logits behind the head; ``check_head`` proves it complete."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    factor = (getattr(config, "logits_scaling", None) or 1.0) ** _SCALING.get(config.model_type, -1)
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        factor *= getattr(config, name, None) or 1.0
    return (lambda logits: logits) if factor == 1.0 else (lambda logits: logits * factor)


# The power of ``logits_scaling`` in the logits: MiniCPM3 scales its states before the head.
_SCALING = {"hyperclovax": 1, "minicpm3": 0}
