"""What makes a step fit: each change planned by itself, with its cost, and which of them do it together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_dpo.planning.cards import LINK
from lora_dpo.planning.lengths import largest_micro_batch
from lora_dpo.planning.measuring import Bytes, Setting
from lora_dpo.planning.plans import Plan, Remedy, make_plan
from lora_dpo.stepping import Batches, batch_tokens, row_length

Row = Mapping[str, Any]
RANK = 8

# What a change costs, the cheapest first: nothing but time, an approximation, rows, the adapter's size.
_TIME, _APPROXIMATION, _ROWS, _RANK = range(4)


@dataclass(frozen=True)
class _Asked:
    """What a plan is made of, as changes alter it."""

    setting: Setting
    rows: Sequence[Row]
    batches: Batches
    recompute: bool
    offloads: bool
    trained: float = 1.0  # share of the weights that are

    def plan(self, plan: Plan) -> Plan:
        return make_plan(
            self.setting,
            self.rows,
            self.batches,
            room=plan.room,
            room_is=plan.room_is,
            recompute=self.recompute,
            card=plan.card,
            remedies=False,
            least=0 if self.recompute else plan.recomputed,
            offloaded=plan.offloaded,
            offloads=self.offloads,
            change=self.with_less,
        )

    def with_less(self, found: Bytes) -> Bytes:
        parts = ("adapters", "gradients", "optimiser")
        return replace(found, **{n: int(getattr(found, n) * self.trained) for n in parts})


@dataclass(frozen=True)
class _Change:
    """A change: its setting, what kind of cost it has, the cost in words, and what it does."""

    words: str
    kind: int
    cost: str
    make: Callable[[_Asked], _Asked]
    seconds: float = 0.0  # beside what the plan knows
    dropped: int = 0


def remedied(plan: Plan, rows: Sequence[Row]) -> Plan:
    """Return a plan that does not fit with what makes it fit, the cheapest first."""
    asked = _Asked(plan.setting, rows, plan.batches, plan.recompute, plan.offloads)
    tried = [(change, change.make(asked).plan(plan)) for change in _changes(plan, asked)]
    found = [(change, _remedy(plan, change, other)) for change, other in tried]
    found = [(change, remedy) for change, remedy in found if remedy.spared > 0]
    found.sort(key=lambda one: (one[0].kind, one[1].lost or 0.0))
    remedies = tuple(remedy for _, remedy in found)
    together = _together(plan, asked, [change for change, _ in found])
    if any(remedy.fits for remedy in remedies):
        together = ""
    return replace(plan, remedies=remedies, together=together)


def _remedy(plan: Plan, change: _Change, other: Plan) -> Remedy:
    layers = plan.recomputed if other.recompute == plan.recompute else other.bytes.layers
    lost = None
    if plan.seconds and other.seconds:
        lost = (other.seconds + change.seconds) / plan.seconds - 1
    cost = change.cost
    if change.kind == _TIME and lost is not None:
        cost += f"; {lost:+.1%} time" if abs(lost) >= 5e-4 else "; no time"
    spared = plan.peak - other.bytes.peak(layers)
    return Remedy(change.words, spared, cost, lost, change.dropped, bool(other.fits))


def _together(plan: Plan, asked: _Asked, changes: Sequence[_Change]) -> str:
    """Say how many of the changes make a plan fit, in their order."""
    for number, change in enumerate(changes, start=1):
        asked = change.make(asked)
        if number > 1 and asked.plan(plan).fits:
            return f"the first {number} together make it fit"
    return "all of these together do not make it fit: take a smaller base or a larger card"


def _changes(plan: Plan, asked: _Asked) -> Iterator[_Change]:
    setting = plan.setting
    if not plan.recompute and plan.recomputed < plan.bytes.layers:
        words = "train.gradient_checkpointing: true"
        yield _Change(words, _TIME, "exact", lambda a: replace(a, recompute=True))
    if not plan.offloads and plan.card is not None:
        words = "train.activation_offloading: true"
        yield _Change(words, _TIME, "exact", lambda a: replace(a, offloads=True))
    yield from _smaller_batches(plan, asked)
    if not setting.embeddings_on_cpu and not _tied(setting) and plan.bytes.embeddings:
        words, width = "model.embeddings_on_cpu: true", setting.architecture.get_text_config()
        copied = plan.step.count * width.hidden_size * setting.dtype.itemsize
        cost = "exact, a small copy in every micro-batch"
        yield _Change(words, _TIME, cost, _without_embeddings, seconds=copied / LINK)
    if setting.optimiser > 2:
        cost = "an approximation of AdamW's state"
        yield _Change("train.optim: adamw_8bit", _APPROXIMATION, cost, _with_small_state)
    yield from _shorter_rows(asked.rows)
    if setting.lora.r > RANK:
        share = RANK / setting.lora.r
        cost = "fewer weights are trained"
        yield _Change(
            f"lora.rank: {RANK}", _RANK, cost, lambda a: replace(a, trained=a.trained * share)
        )


def _smaller_batches(plan: Plan, asked: _Asked) -> Iterator[_Change]:
    batches, flat = plan.batches, plan.setting.flat
    one = max(batch_tokens([row], flat) for row in asked.rows)
    if batches.max_tokens is not None:
        words = f"train.max_tokens_per_batch: {one}"
        smaller = replace(batches, max_tokens=one)
        least = one < batches.max_tokens
    else:
        words = "train.per_device_train_batch_size: 1 (and as many more accumulation steps)"
        smaller = Batches(1, batches.micro_batch * batches.accumulated)
        least = batches.micro_batch > 1

    def make(asked: _Asked) -> _Asked:
        if smaller.max_tokens is None:
            return replace(asked, batches=smaller)
        most = max(batch_tokens([row], flat) for row in asked.rows)  # rows may be dropped already
        return replace(asked, batches=replace(smaller, max_tokens=most))

    if least and len(largest_micro_batch(asked.rows, batches, flat=flat)) > 1:
        yield _Change(words, _TIME, "exact, smaller matrix products", make)


def _shorter_rows(rows: Sequence[Row]) -> Iterator[_Change]:
    """Leave out the longest tenth, one row at least, by the length that ``data.max_length`` bounds."""
    ordered = sorted(map(row_length, rows))
    limit = ordered[max(1, len(ordered) * 9 // 10) - 1]
    dropped = sum(length > limit for length in ordered)
    if dropped:

        def make(asked: _Asked) -> _Asked:
            return replace(asked, rows=[row for row in asked.rows if row_length(row) <= limit])

        cost = f"{dropped} of {len(ordered)} rows are dropped (data.overflow)"
        yield _Change(f"data.max_length: {limit}", _ROWS, cost, make, dropped=dropped)


def _without_embeddings(asked: _Asked) -> _Asked:
    return replace(asked, setting=replace(asked.setting, embeddings_on_cpu=True))


def _with_small_state(asked: _Asked) -> _Asked:
    return replace(asked, setting=replace(asked.setting, optimiser=2.0))


def _tied(setting: Setting) -> bool:
    return bool(getattr(setting.architecture.get_text_config(), "tie_word_embeddings", False))
