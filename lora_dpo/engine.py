"""What a run computes on: the layout of its rows, and fast layers or the library's own.

Both are exact, and not every model can take them. What is known not to fit is told by its name; the
rest is proven on a few rows before training, against padded rows and plain layers, gradients included.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_dpo.data import collate_labelled, collate_pairs, flat_labelled, flat_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.forward import both_logps, completion_logps
from lora_dpo.heads import base_dtype, causal_lm, home_device
from lora_dpo.layers import NAME, Taken, decoder_layers, release, take, work_of
from lora_dpo.policy import shaken, unwrap
from lora_dpo.positions import check_positions
from lora_dpo.randomness import forked
from lora_dpo.stepping import row_length

Engine = Literal["auto", "fast", "plain"]
ENGINES: tuple[str, ...] = get_args(Engine)
Row = Mapping[str, Any]


def is_flat(model: nn.Module) -> bool:
    """Whether batches for this model are laid flat."""
    return str(causal_lm(model).config._attn_implementation) == NAME


def has_fast_layers(model: nn.Module) -> bool:
    """Whether layers of this model are ours, recomputation included."""
    work = work_of(causal_lm(model))
    return work is not None and bool(decoder_layers(causal_lm(model)))


def collate(model: nn.Module, rows: Sequence[Row], *, pad_id: int = 0) -> Any:
    """Return rows as a batch of the layout that the model takes."""
    return lay_out(rows, flat=is_flat(model) and not _beyond_window(model, rows), pad_id=pad_id)


def _beyond_window(model: nn.Module, rows: Sequence[Row]) -> bool:
    """Whether rows are longer than what the model sees: the flat layout knows no window."""
    window = _window(causal_lm(model).config.get_text_config())
    return window is not None and max(map(row_length, rows)) > window


def _window(text: Any) -> int | None:
    """Return how many tokens a token sees at most, or None where it sees all."""
    sliding = getattr(text, "sliding_window", None)
    sliding = sliding if getattr(text, "use_sliding_window", True) else None
    windows = [w for w in (sliding, getattr(text, "attention_chunk_size", None)) if w]
    return min(windows) if windows else None


def choose_engine(
    model: nn.Module,
    rows: Sequence[Row],
    longest: int,
    engine: Engine,
    *,
    chunk: int,
    with_reference: bool = True,
    recompute: bool = True,
) -> str:
    """Put the model on the fastest layout and layers that are right for it; say in words which.

    Args:
        model: the policy.
        rows: two or more tokenised rows, to prove it on.
        longest: tokens of the longest sequence of the data.
        engine: ``auto`` takes of the engine what the model can; ``fast`` insists on rows laid end to
            end; ``plain`` takes padded rows and the library's layers.
        chunk: positions whose logits exist at one time.
        with_reference: whether the reference is tried too; it never runs where nothing reads it.
        recompute: whether the fast layers keep their input alone until backward.

    Raises:
        ConfigError: ``fast``, and this model cannot; or the longest sequence is one with which rows
            would change each other (``check_positions``).
    """
    if engine not in ENGINES:
        raise ConfigError(f"train.engine: got {engine!r}; expected one of {ENGINES}.")
    check_positions(causal_lm(model).config, longest)
    _take(model, _Way(flat=False, layers=False))
    if engine == "plain":
        return "engine: plain, padded rows (train.engine: plain)"
    reason = obstacle(model, longest)
    ways = [_Way(False, True), _Way(False, True, False)]
    if not reason:
        ways = [_Way(True, True), _Way(True, True, False), _Way(True, False), *ways]
    proof, refused = _Proof(model, rows, chunk, with_reference), ""
    for way in ways:
        if engine == "fast" and not way.flat:
            break
        taken = _take(model, way)
        if way.layers and not taken:
            refused = refused or str(taken).strip()
            continue
        found = proof.disagreement(flat=way.flat)
        if not found:
            count = len(decoder_layers(causal_lm(model))) if recompute else 0
            recompute_layers(model, count)
            layers = f"; {taken}" if taken else f"; the library's layers ({refused})"
            layout = _FLAT if way.flat else f"padded rows ({reason})"
            return f"engine: fast, {layout}{layers} (proven on two rows)"
        refused = refused or found
        reason = reason or found
    _take(model, _Way(flat=False, layers=False))
    if engine == "fast":
        raise ConfigError(
            f"train.engine is fast, and this model cannot: {reason}. Use auto or plain."
        )
    return f"engine: plain, padded rows ({reason})"


_FLAT = "rows end to end without padding, prompts shared"


@dataclass(frozen=True)
class _Way:
    flat: bool
    layers: bool
    skips_last: bool = True


def _take(model: nn.Module, way: _Way) -> Taken | None:
    causal = causal_lm(model)
    config = causal.config
    if way.flat:
        config._attn_implementation = NAME
    elif config._attn_implementation == NAME:
        config._attn_implementation = "sdpa"
    if not way.layers:
        release(causal)
        return None
    taken = take(unwrap(model), skips_last=way.skips_last)
    recompute_layers(model, (taken.layers + 1) // 2)  # so that the proof sees both kinds
    return taken


def recompute_layers(
    model: nn.Module, count: int, *, keeps_weights: bool = True, offloaded: bool = False
) -> None:
    """Let so many layers, the first ones, keep their input alone until backward; see ``Work``."""
    work = work_of(causal_lm(model))
    if work is not None:
        work.recomputed, work.keeps_weights, work.offloaded = count, keeps_weights, offloaded


def obstacle(model: nn.Module, longest: int) -> str:
    """Return what is known to be in the way of the flat layout, or nothing."""
    causal = causal_lm(model)
    text = causal.config.get_text_config()
    attention = str(causal.config._attn_implementation)
    if attention not in ("sdpa", NAME):
        return f"attention is {attention!r}, the flat layout needs sdpa"
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return "it takes no position_ids"
    window = _window(text)
    if window and longest > window:
        return f"its sliding window of {window} is shorter than the longest row of {longest}"
    if getattr(text, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    return ""


class _Proof:
    """Compares a way of computing with padded rows and plain layers, on a policy off its reference."""

    def __init__(
        self, model: nn.Module, rows: Sequence[Row], chunk: int, with_reference: bool
    ) -> None:
        # Short rows: the plain way recomputes nothing, and must fit where training does.
        self.model, self.rows, self.chunk = model, [_short(row) for row in rows], chunk
        self.with_reference = with_reference
        self._expected: tuple[list[Tensor], list[Tensor]] | None = None
        # what 16 bits round differs by layout, most in small gradients that are sums of large terms;
        # in float32 only the order of sums does
        half = base_dtype(model) != torch.float32
        self.bounds = ((0.05, 0.25) if half else (1e-3, 1e-3)), (0.1 if half else 1e-3)

    def disagreement(self, *, flat: bool) -> str:
        """Return how the model as it stands differs from the plain one, or nothing."""
        try:
            if self._expected is None:
                self._expected = self._plain()
            found = self._measured(flat=flat)
        except torch.OutOfMemoryError:
            raise  # the plain way needs no less
        except Exception as error:  # whatever a foreign model raises: the plain way is right
            return f"{type(error).__name__} there: {' '.join(str(error).split())[:120]}"
        bounds, least = self.bounds
        for ours, theirs, bound in zip(found, self._expected, bounds, strict=True):
            away = _away(ours, theirs, least)
            if not away <= bound:  # nor is NaN
                return f"it differs by {away:.2g} there"
        return ""

    def _plain(self) -> tuple[list[Tensor], list[Tensor]]:
        causal = causal_lm(self.model)
        before, work = causal.config._attn_implementation, work_of(causal)
        if before == NAME:
            causal.config._attn_implementation = "sdpa"
        try:
            with nullcontext() if work is None else work.turned(off=True):
                return self._measured(flat=False)
        finally:
            causal.config._attn_implementation = before

    def _measured(self, *, flat: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return log-probs of policy and reference, and the gradient of each trained tensor."""
        was_training = self.model.training
        self.model.eval()
        self.model.zero_grad(set_to_none=True)
        device = home_device(self.model)
        batch = lay_out(self.rows, flat=flat).to(device)
        try:
            with torch.enable_grad(), forked(), shaken(self.model):
                theirs = []
                if self.with_reference:
                    ours, other = both_logps(self.model, batch, chunk=self.chunk)
                    theirs = [other]
                else:
                    ours = completion_logps(self.model, batch, chunk=self.chunk)
                (ours * torch.linspace(1.0, 2.0, len(ours), device=device)).sum().backward()
            trained = [p for p in self.model.parameters() if p.requires_grad]
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            return [ours.detach(), *theirs], gradient
        finally:
            self.model.zero_grad(set_to_none=True)
            self.model.train(was_training)


def _away(found: Sequence[Tensor], expected: Sequence[Tensor], least: float) -> float:
    """Return the largest difference of a tensor relative to its norm, or to ``least`` of the largest."""
    norms = torch.stack([value.float().norm() for value in expected])
    away = [(ours - theirs).float().norm() for ours, theirs in zip(found, expected, strict=True)]
    return float((torch.stack(away) / norms.clamp(min=least * float(norms.max()) + 1e-12)).max())


def _short(row: Row) -> Row:
    """Return the end of a row's prompt and the beginnings of its answers."""
    names = [name for name in row if name.endswith("_ids")]
    return {**row, **{n: row[n][-24:] if n == "prompt_ids" else row[n][:16] for n in names}}


def lay_out(rows: Sequence[Row], *, flat: bool, pad_id: int = 0) -> Any:
    """Return rows as a flat or a padded batch."""
    paired = "chosen_ids" in rows[0]
    if flat:
        return flat_pairs(rows) if paired else flat_labelled(rows)
    return (collate_pairs if paired else collate_labelled)(rows, pad_id=pad_id)
