"""The single place where a model meets a batch: log-probs of completions, policy and reference.

The model that is called is the one that accelerate prepared, so that the hooks of DDP run; its
head is swapped on the instance for the time of one call, and sees only the positions that predict
a completion token.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora_dpo.data import FlatBatch
from lora_dpo.errors import DataError, ModelError
from lora_dpo.heads import causal_lm, compute_context, swapped_head
from lora_dpo.layers import SEGMENTS, Work, work_of
from lora_dpo.logprobs import (
    CHUNK_TOKENS,
    Fixed,
    Head,
    predicting_positions,
    sum_by_row,
    token_values,
)
from lora_dpo.policy import reference
from lora_dpo.positions import check_positions, counted_positions, longest_of_its_own
from lora_dpo.stats import UNKEPT, LabelledStats, PairStats


class Batch(Protocol):
    """Rows of tokens, padded, with the completion tokens marked."""

    @property
    def input_ids(self) -> Tensor: ...  # [rows, time]
    @property
    def attention_mask(self) -> Tensor: ...  # [rows, time], 1 at tokens
    @property
    def completion_mask(self) -> Tensor: ...  # [rows, time], True at completion tokens


class Labelled(Batch, Protocol):
    """Single answers with labels and, for a need of that name, mismatched completions."""

    @property
    def label(self) -> Tensor: ...  # [rows] bool
    @property
    def mismatched(self) -> Any: ...  # a Batch, or None


def pair_stats(
    model: nn.Module,
    batch: Batch | FlatBatch,
    *,
    with_reference: bool = True,
    needs: Set[str] = frozenset(),
    fixed: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> PairStats:
    """Return the statistics of a batch of pairs under policy and, if asked, reference.

    Args:
        model: the policy, bare or prepared by accelerate, in the mode that the caller chose.
        batch: chosen rows first, then the rejected ones in the same order.
        with_reference: whether the reference runs; it runs first, while no graph takes memory.
        needs: further statistics, among ``stats.PAIR_NEEDS``; they are taken in the same passes.
        fixed: summed log-probs of all rows under the reference where they are known, ``[rows]``;
            it then runs only if a need of its own asks for it.
        chunk: positions whose logits exist at one time.
    """
    scores = _scores(batch) if "scores" in needs else {}
    parts = _token_subsets(batch, needs)
    theirs = {"logps": fixed} if fixed is not None and not needs & UNKEPT else None
    if theirs is None and (with_reference or "kls" in needs):
        values, others = _both_values(model, batch, chunk, needs)
        theirs = _sums(others, batch, parts)
    else:
        values, _ = _completion_values(model, batch, chunk, wants=needs)
    ours = _sums(values, batch, parts)
    found = {"chosen_lengths": completion_lengths(batch).chunk(2)[0]}
    found["rejected_lengths"] = completion_lengths(batch).chunk(2)[1]
    for owner, sums in (("policy_", ours), ("reference_", theirs if with_reference else None)):
        for name, value in (sums or {}).items():
            prefix = "" if name == "confidences" else owner
            for side, half in zip(("chosen", "rejected"), value.chunk(2), strict=True):
                found[f"{prefix}{side}_{name}"] = half
    return PairStats(**found, **scores)


def labelled_stats(
    model: nn.Module,
    batch: Labelled | FlatBatch,
    *,
    with_reference: bool = True,
    needs: Set[str] = frozenset(),
    fixed: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> LabelledStats:
    """Return the statistics of a batch of single answers; arguments as in ``pair_stats``."""
    labels: Any = batch.label
    found = {"lengths": completion_lengths(batch), "labels": labels}
    if "mismatched" in needs:
        other: Any = batch.mismatched
        with reference(model):
            found["reference_mismatched_logps"] = completion_logps(model, other, chunk=chunk)
        with torch.no_grad():
            found["policy_mismatched_logps"] = completion_logps(model, other, chunk=chunk)
    if with_reference and fixed is None:
        found["policy_logps"], found["reference_logps"] = both_logps(model, batch, chunk=chunk)
    else:
        found["policy_logps"] = completion_logps(model, batch, chunk=chunk)
        if fixed is not None:
            found["reference_logps"] = fixed
    return LabelledStats(**found)


def completion_logps(
    model: nn.Module, batch: Batch | FlatBatch, *, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """Return the summed log-prob of each row's completion, ``[rows]``, nats, float32.

    Gradient flows if the caller's mode lets it. Rows, padding and chunks do not touch each other.
    """
    values, _ = _completion_values(model, batch, chunk)
    return _sums(values, batch, {})["logps"]


def both_logps(
    model: nn.Module, batch: Batch | FlatBatch, *, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Return ``completion_logps`` of policy and reference, in one pass where the layers can."""
    ours, theirs = _both_values(model, batch, chunk, frozenset())
    return _sums(ours, batch, {})["logps"], _sums(theirs, batch, {})["logps"]


def completion_token_logps(
    model: nn.Module, batch: Batch | FlatBatch, *, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """Return the log-prob of every completion token, ``[tokens]``, row by row, nats, float32."""
    return _completion_values(model, batch, chunk)[0]["logps"]


def _both_values(
    model: nn.Module, batch: Batch | FlatBatch, chunk: int, wants: Set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the per-token values of policy and reference, in one pass where the layers can."""
    work = work_of(causal_lm(model))
    keeps = "kls" in wants
    fusable = work is not None and work.fusable and not work.off
    if work is not None and fusable and not keeps and torch.is_grad_enabled():
        return _fused_values(model, work, batch, chunk, wants)
    with reference(model):  # it runs first, while no graph takes memory
        theirs, states = _completion_values(model, batch, chunk, keep=keeps)
    ours, _ = _completion_values(model, batch, chunk, wants=wants, fixed=states)
    return ours, theirs


def _fused_values(
    model: nn.Module, work: Work, batch: Batch | FlatBatch, chunk: int, wants: Set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run each layer for policy and reference, which come out as the two halves of the rows."""
    places = _places(batch)
    options: dict[str, Any] = {"chunk": chunk, "frozen_head": _head_is_frozen(model)}
    found: list[dict[str, Tensor]] = []

    def score(hidden: Tensor, head: Head) -> Tensor:
        ours, theirs = hidden.chunk(2)
        with torch.no_grad():
            found.append(token_values(places.states(theirs), places.targets, head, **options))
        found.append(
            token_values(places.states(ours), places.targets, head, wants=wants, **options)
        )
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with work.turned(fused=True, reference_state=None):
        _run(model, batch, score)
    theirs, ours = found
    return ours, theirs


def _completion_values(
    model: nn.Module,
    batch: Batch | FlatBatch,
    chunk: int,
    *,
    wants: Set[str] = frozenset(),
    fixed: Fixed | None = None,
    keep: bool = False,
) -> tuple[dict[str, Tensor], Fixed | None]:
    """Return per-token values ``[tokens]`` and, if they are to be kept, the states behind them."""
    places = _places(batch)
    options: dict[str, Any] = {"wants": wants, "fixed": fixed, "chunk": chunk}
    options["frozen_head"] = _head_is_frozen(model)
    found: list[dict[str, Tensor]] = []
    kept: list[Fixed] = []

    def score(hidden: Tensor, head: Head) -> Tensor:
        states = places.states(hidden)
        found.append(token_values(states, places.targets, head, **options))
        if keep:
            _check_shared_head(model)
            kept.append(Fixed(states, head))
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    _run(model, batch, score)
    return found[0], kept[0] if kept else None


def _run(
    model: nn.Module, batch: Batch | FlatBatch, score: Callable[[Tensor, Head], Tensor]
) -> None:
    """Run a batch through the model with ``score`` in place of its head."""
    causal = causal_lm(model)
    _hold_positions(causal.config, batch)
    work = work_of(causal)
    fast = nullcontext() if work is None else work.batch()
    with swapped_head(causal, score), compute_context(model), fast:
        model(input_ids=batch.input_ids, use_cache=False, **_layout(model, batch))


def _hold_positions(config: Any, batch: Batch | FlatBatch) -> None:
    """Refuse rows that would move the positions of those beside them, wherever they come from."""
    own = longest_of_its_own(config)
    if own is None:
        return
    if isinstance(batch, FlatBatch):  # an answer's last token is not laid out
        check_positions(config, 1 + max(trunk + max(ends) for trunk, ends in batch.segments))
    elif batch.attention_mask.shape[1] > own[1]:  # else the device need not be waited for
        check_positions(config, int(batch.attention_mask.sum(1).max()))


def _head_is_frozen(model: nn.Module) -> bool:
    head = causal_lm(model).get_output_embeddings()
    return not any(p.requires_grad for p in head.parameters())


@dataclass(frozen=True)
class _Places:
    """Where a batch's completion tokens are predicted; tokens stand row by row."""

    rows: Tensor  # [tokens]
    targets: Tensor  # [tokens]
    states: Callable[[Tensor], Tensor]  # [rows, time, hidden] -> [tokens, hidden]


def _places(batch: Batch | FlatBatch) -> _Places:
    if isinstance(batch, FlatBatch):
        flat = batch.places
        return _Places(batch.token_rows, batch.targets, lambda hidden: hidden[0, flat])
    known = getattr(batch, "predicted", None)  # of the batches of ours
    rows, columns = predicting_positions(batch.completion_mask) if known is None else known
    targets = batch.input_ids[rows, columns + 1]
    return _Places(rows, targets, lambda hidden: hidden[rows, columns])


def _layout(model: nn.Module, batch: Batch | FlatBatch) -> dict[str, Any]:
    """Return what tells a model where each token stands and what it may see."""
    if isinstance(batch, FlatBatch):
        # a mask of four dimensions is handed on as it is, where a layer keeps to itself what else it is
        # given; our attention does not read it
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        setattr(nothing, SEGMENTS, batch.segments)
        return {
            "attention_mask": nothing,
            "position_ids": batch.position_ids,
            SEGMENTS: batch.segments,
        }
    mask = batch.attention_mask
    return {"attention_mask": mask, **counted_positions(causal_lm(model), mask)}


def _sums(
    values: dict[str, Tensor], batch: Batch | FlatBatch, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return each value by row: summed, over a part of the tokens where one is named, or meaned."""
    rows, count = _places(batch).rows, len(completion_lengths(batch))
    sums = {name: sum_by_row(value, rows, count) for name, value in values.items()}
    if "confidences" in sums:
        sums["confidences"] = sums["confidences"] / completion_lengths(batch)
    for name, chosen in parts.items():
        sums[name] = sum_by_row(values["logps"] * chosen, rows, count)
    return sums


def _token_subsets(batch: Batch | FlatBatch, needs: Set[str]) -> dict[str, Tensor]:
    """Return which tokens belong to each wanted part, ``[tokens]`` bool, the same for both models."""
    wanted = needs & {"first_logps", "sampled_logps"}
    if not wanted:
        return {}
    rows = _places(batch).rows
    lengths = completion_lengths(batch)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)  # [rows], of both sides of a pair
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(rows), device=rows.device) - starts[rows]  # in its own completion
    found = {}
    if "first_logps" in wanted:
        found["first_logps"] = place < shorter[rows]
    if "sampled_logps" in wanted:
        found["sampled_logps"] = _draw(lengths, shorter)
    return found


def _draw(lengths: Tensor, shorter: Tensor) -> Tensor:
    """Draw ``shorter`` tokens of each completion; pair by pair, so that no batch split matters."""
    pairs = len(lengths) // 2
    tokens, drawn = torch.stack([lengths, shorter]).tolist()  # the device is waited for once
    masks: list[Tensor] = [torch.empty(0)] * len(lengths)
    for pair in range(pairs):
        for row in (pair, pair + pairs):
            masks[row] = torch.rand(tokens[row]).argsort() < drawn[row]
    return torch.cat(masks).to(lengths.device)


def _scores(batch: Batch | FlatBatch) -> dict[str, Tensor]:
    names = ("chosen_scores", "rejected_scores")
    found = {name: getattr(batch, name, None) for name in names}
    if absent := [name for name, value in found.items() if value is None]:
        raise DataError(
            f"{', '.join(absent)}: not in the data; an objective that reads scores needs the columns "
            "score_chosen and score_rejected."
        )
    return cast(dict[str, Tensor], found)


def _check_shared_head(model: nn.Module) -> None:
    head = causal_lm(model).get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ModelError(
            "the KL of whole distributions (TDPO) needs policy and reference to share their head, and "
            "this policy trains it; leave lm_head out of lora.targets and lora.modules_to_save."
        )


def completion_lengths(batch: Batch | FlatBatch) -> Tensor:
    """Return the number of completion tokens of each row, ``[rows]``."""
    if isinstance(batch, FlatBatch):
        return batch.lengths
    return batch.completion_mask[:, 1:].sum(dim=1)
