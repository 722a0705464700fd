"""Which layout a run computes on: rows end to end with shared beginnings, or padded rows.

The flat layout is exact, and not every model can take it. What is known not to fit is told by its
name; the rest is proven on a few rows before training, gradients included.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_dpo.attention import NAME
from lora_dpo.data import collate_labelled, collate_pairs, flat_labelled, flat_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.forward import causal_lm, completion_logps
from lora_dpo.policy import reference

Engine = Literal["auto", "fast", "plain"]
ENGINES: tuple[str, ...] = get_args(Engine)
Row = Mapping[str, Any]


def is_flat(model: nn.Module) -> bool:
    """Whether batches for this model are laid flat."""
    return str(causal_lm(model).config._attn_implementation) == NAME


def collate(model: nn.Module, rows: Sequence[Row], *, pad_id: int = 0) -> Any:
    """Return rows as a batch of the layout that the model takes."""
    return _batch(rows, flat=is_flat(model), pad_id=pad_id)


def choose_engine(
    model: nn.Module,
    rows: Sequence[Row],
    longest: int,
    engine: Engine,
    *,
    chunk: int,
    with_reference: bool = True,
) -> str:
    """Put the model on the fastest layout that is right for it, and say in words which that is.

    Args:
        model: the policy.
        rows: two or more tokenised rows, to prove the layout on.
        longest: tokens of the longest sequence of the data.
        engine: ``auto`` takes the flat layout where it can, ``fast`` insists, ``plain`` never does.
        chunk: positions whose logits exist at one time.
        with_reference: whether the reference is tried too; it never runs where nothing reads it.

    Raises:
        ConfigError: ``fast``, and this model cannot.
    """
    if engine not in ENGINES:
        raise ConfigError(f"train.engine: got {engine!r}; expected one of {ENGINES}.")
    if engine == "plain":
        return "engine: plain, padded rows (train.engine: plain)"
    reason = _obstacle(model, longest) or _proof(model, rows, chunk, with_reference)
    if not reason:
        return "engine: fast, rows end to end without padding, prompts shared (proven on two rows)"
    if engine == "fast":
        raise ConfigError(
            f"train.engine is fast, and this model cannot: {reason}. Use auto or plain."
        )
    return f"engine: plain, padded rows ({reason})"


def _obstacle(model: nn.Module, longest: int) -> str:
    """Return what is known to be in the way, or nothing."""
    causal = causal_lm(model)
    text = causal.config.get_text_config()
    attention = str(causal.config._attn_implementation)
    if attention not in ("sdpa", NAME):
        return f"attention is {attention!r}, the flat layout needs sdpa"
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return "it takes no position_ids"
    window = getattr(text, "sliding_window", None)
    used = getattr(text, "use_sliding_window", True)
    if window and used and longest > window:
        return f"its sliding window of {window} is shorter than the longest row of {longest}"
    chunked = getattr(text, "attention_chunk_size", None)
    if chunked and longest > chunked:
        return f"it attends in chunks of {chunked}"
    if getattr(text, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    return ""


def _proof(model: nn.Module, rows: Sequence[Row], chunk: int, with_reference: bool) -> str:
    """Turn the flat layout on if it agrees with the plain one on these rows; else say why not."""
    config = causal_lm(model).config
    before = config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            options: dict[str, Any] = {"chunk": chunk, "with_reference": with_reference}
            expected = _measure(model, rows, flat=False, **options)
            config._attn_implementation = NAME
            found = _measure(model, rows, flat=True, **options)
        worst = max(
            float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
            for ours, theirs in zip(found, expected, strict=True)
        )
        # what 16 bits round differs by layout; in float32 only the order of sums does
        half = causal_lm(model).get_input_embeddings().weight.dtype != torch.float32
        reason = "" if worst <= (0.05 if half else 1e-3) else f"it differs by {worst:.2g} there"
    except Exception as error:  # whatever a foreign model raises: the plain layout is right
        reason = f"{type(error).__name__} there: {' '.join(str(error).split())[:120]}"
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    if reason:
        config._attn_implementation = before
    return reason


def _measure(
    model: nn.Module, rows: Sequence[Row], *, flat: bool, chunk: int, with_reference: bool
) -> list[Tensor]:
    """Return the policy's log-probs, the adapters' gradient of them, and the reference's log-probs."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    batch = _batch(rows, flat=flat, pad_id=0).to(device)
    theirs = []
    if with_reference:
        with reference(model):
            theirs = [completion_logps(model, batch, chunk=chunk)]
    ours = completion_logps(model, batch, chunk=chunk)
    (ours * torch.linspace(1.0, 2.0, len(ours), device=device)).sum().backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [ours.detach(), torch.cat(gradient), *theirs]


def _batch(rows: Sequence[Row], *, flat: bool, pad_id: int) -> Any:
    paired = "chosen_ids" in rows[0]
    if flat:
        return flat_pairs(rows) if paired else flat_labelled(rows)
    return (collate_pairs if paired else collate_labelled)(rows, pad_id=pad_id)
