"""What a run computes on: the layout of its rows, and fast layers or the library's own.

Both are exact, and not every model can take them. What is known not to fit is told by its name; the
rest is proven on a few rows before training, against padded rows and plain layers, gradients included.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_dpo.data import collate_labelled, collate_pairs, flat_labelled, flat_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.float32 import computes_in_float32, float32_compute
from lora_dpo.forward import both_logps, completion_logps
from lora_dpo.heads import base_dtype, causal_lm, home_device
from lora_dpo.layers import NAME, Taken, decoder_layers, release, take, work_of
from lora_dpo.policy import shaken, unwrap
from lora_dpo.positions import check_positions
from lora_dpo.randomness import forked
from lora_dpo.stepping import row_length

logger = logging.getLogger("lora_dpo")

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
) -> EngineLine:
    """Put the model on the fastest layout and layers that are right for it; say in words which.

    A way that should be right for the model and is not, or ``fast`` where part of it is out of reach, is a
    warning at once; what the model does not support is told in the words alone.

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
        return EngineLine("engine: plain, padded rows (train.engine: plain)")
    known = obstacle(model, longest)
    no_flat = _Difference(known, known=True) if known else None
    ways = [_Way(False, True), _Way(False, True, False)]
    if no_flat is None:
        ways = [_Way(True, True), _Way(True, True, False), _Way(True, False), *ways]
    proof, no_layers = _Proof(model, rows, chunk, with_reference), None
    for way in ways:
        if engine == "fast" and not way.flat:
            break
        taken = _take(model, way)
        if taken is not None and not taken:
            no_layers = no_layers or _Difference(", ".join(taken.obstacles), known=True)
            continue
        found = proof.difference(flat=way.flat)
        if found is None:
            recompute_layers(model, len(decoder_layers(causal_lm(model))) if recompute else 0)
            layout = _FLAT if way.flat else f"padded rows ({no_flat})"
            layers = str(taken) if taken else f"the library's layers ({no_layers})"
            partly = engine == "fast" and (not taken or bool(taken.obstacles))
            lost = [None if way.flat else no_flat, None if taken else no_layers]
            words = f"engine: fast, {layout}; {layers} ({proof.words})"
            return _told(words, warns=partly or any(d and not d.known for d in lost))
        if way.layers and not way.skips_last:  # else a norm that reads what was left out
            no_layers = no_layers or found
        elif not way.layers:
            no_flat = no_flat or found
    _take(model, _Way(flat=False, layers=False))
    if engine == "fast":
        raise ConfigError(
            f"train.engine is fast, and this model cannot: {no_flat}. Use auto or plain."
        )
    words = f"engine: plain, padded rows ({no_flat})"
    words += f"; the library's layers ({no_layers})" if no_layers else ""
    return _told(words, warns=any(d and not d.known for d in (no_flat, no_layers)))


_FLAT = "rows end to end without padding, prompts shared"


class EngineLine(str):
    """What was taken, in words; ``warns`` if it is less than the model should be able to take."""

    warns: bool = False


def _told(words: str, *, warns: bool) -> EngineLine:
    """Warn now, of whatever run this is: one that resumes has no other lines at its start."""
    line = EngineLine(words)
    line.warns = warns
    if warns:
        logger.warning(line)
    return line


@dataclass(frozen=True)
class _Difference:
    """Why a way is not taken; ``known`` if that is what the model is, and no error."""

    words: str
    known: bool = False

    def __str__(self) -> str:
        return self.words


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
        config._attn_implementation = _without_segments(causal)
    if not way.layers:
        release(causal)
        return None
    taken = take(unwrap(model), skips_last=way.skips_last)
    recompute_layers(model, (taken.layers + 1) // 2)  # so that the proof sees both kinds
    return taken


def recompute_layers(
    model: nn.Module,
    count: int,
    *,
    keeps_weights: bool = True,
    offloaded: bool = False,
    moved: int = 0,
) -> None:
    """Let so many layers, the first ones, keep their input alone until backward; see ``Work``."""
    work = work_of(causal_lm(model))
    if work is not None:
        work.recomputed, work.keeps_weights, work.offloaded = count, keeps_weights, offloaded
        work.moved = moved


def obstacle(model: nn.Module, longest: int) -> str:
    """Return what is known to be in the way of the flat layout, or nothing."""
    causal = causal_lm(model)
    text = causal.config.get_text_config()
    attention = str(causal.config._attn_implementation)
    if attention not in (_without_segments(causal), NAME):
        return f"attention is {attention!r}, the flat layout needs {_without_segments(causal)}"
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return "it takes no position_ids"
    window = _window(text)
    if window and longest > window:
        return f"its sliding window of {window} is shorter than the longest row of {longest}"
    return other_layers(text)


_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def other_layers(text: Any) -> str:
    """Say which of a config's layers carry a state from token to token, or pick what they see; or nothing.

    Laid end to end, one row would reach the next through them.
    """
    others = sorted({*(getattr(text, "layer_types", None) or ())} - _ATTENTION)
    return f"its layers are not of attention alone ({', '.join(others)})" if others else ""


def _without_segments(causal: Any) -> str:
    """Return the attention of the library's whose place ours takes: sdpa, if it does what a model asks for."""
    lacks = causal._supports_attention_backend and not causal._supports_sdpa  # Gemma 2
    return "eager" if lacks else "sdpa"


@dataclass(frozen=True)
class _Bounds:
    """How far two ways may differ, relative to a tensor's norm or to ``least`` of the largest."""

    logps: float
    gradients: float
    least: float


_FLOAT = _Bounds(1e-3, 1e-3, 1e-3)  # only the order of sums differs
# what 16 bits round differs by layout, most in small gradients that are sums of large terms
_HALF = _Bounds(0.05, 0.25, 0.1)


class _Proof:
    """Compares a way of computing with padded rows and plain layers, on a policy off its reference.

    What trains in 16 bits is compared in float32 first, where no error is small enough to hide, and then
    as it trains, where rounding hides those of some percent.
    """

    def __init__(
        self, model: nn.Module, rows: Sequence[Row], chunk: int, with_reference: bool
    ) -> None:
        # Short rows: the plain way recomputes nothing, and must fit where training does.
        self.model, self.rows, self.chunk = model, [_short(row) for row in rows], chunk
        self.with_reference = with_reference
        self._half, self._widens = base_dtype(model) != torch.float32, computes_in_float32(model)
        self._expected: dict[_Bounds, list[list[Tensor]]] = {}

    @property
    def words(self) -> str:
        """What was proven."""
        return "proven on two rows" + (", in float32 too" if len(self._expected) > 1 else "")

    def difference(self, *, flat: bool) -> _Difference | None:
        """Return how the model as it stands differs from the plain one, or None."""
        try:
            self._expect()
            for bounds, expected in self._expected.items():
                found = self._measured(bounds, flat=flat)
                for ours, theirs, bound in zip(
                    found, expected, (bounds.logps, bounds.gradients), strict=True
                ):
                    away = largest_difference(ours, theirs, bounds.least)
                    if not away <= bound:  # nor is NaN
                        return _Difference(f"it differs by {away:.2g} there")
        except torch.OutOfMemoryError:
            raise  # the plain way needs no less
        except Exception as error:  # whatever a foreign model raises: the plain way is right
            words = f"{type(error).__name__} there: {' '.join(str(error).split())[:120]}"
            return _Difference(words, known=isinstance(error, NotImplementedError))
        return None

    def _expect(self) -> None:
        """Run the plain way, once for each precision that the proof is made in."""
        if self._expected:
            return
        if self._widens or not self._half:
            # a model of which this is too much to ask is proven in 16 bits alone
            with suppress(Exception) if self._half else nullcontext():
                self._expected[_FLOAT] = self._plain(_FLOAT)
        if self._half:
            self._expected[_HALF] = self._plain(_HALF)

    def _plain(self, bounds: _Bounds) -> list[list[Tensor]]:
        causal = causal_lm(self.model)
        before, work = causal.config._attn_implementation, work_of(causal)
        if before == NAME:
            causal.config._attn_implementation = _without_segments(causal)
        try:
            with nullcontext() if work is None else work.turned(off=True):
                return self._measured(bounds, flat=False)
        finally:
            causal.config._attn_implementation = before

    def _measured(self, bounds: _Bounds, *, flat: bool) -> list[list[Tensor]]:
        """Return log-probs of policy and reference, and the gradient of each trained tensor.

        They wait in the memory of the CPU: on a card they would be more than a step's own.
        """
        was_training = self.model.training
        self.model.eval()
        self.model.zero_grad(set_to_none=True)
        device = home_device(self.model)
        batch = lay_out(self.rows, flat=flat).to(device)
        widened = bounds is _FLOAT and self._widens
        precision = float32_compute(self.model) if widened else nullcontext()
        with precision:
            try:
                with torch.enable_grad(), forked(), shaken(self.model):
                    theirs = []
                    if self.with_reference:
                        ours, other = both_logps(self.model, batch, chunk=self.chunk)
                        theirs = [other.cpu()]
                    else:
                        ours = completion_logps(self.model, batch, chunk=self.chunk)
                    weights = torch.linspace(1.0, 2.0, len(ours), device=device)
                    (ours * weights).sum().backward()
                trained = [p for p in self.model.parameters() if p.requires_grad]
                found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
                return [[ours.detach().cpu(), *theirs], [value.cpu() for value in found]]
            finally:
                self.model.zero_grad(set_to_none=True)
                self.model.train(was_training)


def largest_difference(
    found: Sequence[Tensor], expected: Sequence[Tensor], least: float = 0.1
) -> float:
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
