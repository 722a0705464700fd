"""The settings of a draft that decide its memory: the first of several that the planner says fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_dpo.errors import ConfigError
from lora_dpo.planning import Batches, Plan, Question, largest_micro_batch
from lora_dpo.stepping import batch_tokens, laid_tokens, row_length

STEP_ROWS = 32
STEPS = 20  # at least so many steps an epoch, where the data are few
SHARES = (1.0, 0.99, 0.95, 0.9)
LONG_TAIL = 1.25  # the longest row over the 99th percentile
UNEVEN = 2.0  # the longest row over the median

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """What fits, with the plan that says so."""

    plan: Plan
    max_length: int
    kept: float  # share of the rows
    settings: Mapping[str, Any]  # by dotted key


@dataclass(frozen=True)
class _Rung:
    """One proposal: what the planner is asked, and the settings that it stands for."""

    question: Question
    settings: Mapping[str, Any]

    def plan(self) -> Plan:
        return self.question.answer(remedies=False)


def first_that_fits(
    question: Question, fixed: Mapping[str, Any], positions: int, read: int, *, movable: bool
) -> Choice:
    """Return the proposal that the planner says fits and that gives up least.

    Args:
        question: with every row that was tokenised.
        fixed: what the user has set, by section.
        positions: of the model.
        read: rows before tokenising.
        movable: whether the input embeddings can be kept on the CPU.

    Raises:
        ConfigError: none fits.
    """
    lengths = sorted(map(row_length, question.rows))
    asked, train = fixed.get("data", {}).get("max_length"), fixed.get("train", {})
    for longest in [asked] if asked else _lengths(lengths, positions):
        few = [row for row in question.rows if row_length(row) <= longest]
        rungs = list(_ladder(replace(question, rows=few), fixed, movable=movable))
        rung, plan = _chosen(rungs)
        kept = len(few) / read
        if plan.fits is not False:
            plan, tokens = _by_tokens(rung.question, plan, train)
            return Choice(plan, longest, kept, {**rung.settings, **tokens})
        if plan.bytes.static > (plan.room or 0):
            break  # shorter rows do not help
    raise ConfigError(
        f"init: nothing that was tried fits into {plan.room_is}: rows of at most {longest} tokens "
        f"({kept:.0%} of them), one at a time, take {plan.peak / 2**30:.2f} GiB of "
        f"{(plan.room or 0) / 2**30:.2f}, {plan.bytes.static / 2**30:.2f} before the first row. Take a "
        "smaller base, a larger card, or shorter rows (--set data.max_length=512)."
    )


def _chosen(rungs: Sequence[_Rung]) -> tuple[_Rung, Plan]:
    """Return the first rung that fits, else the last: each look takes seconds, so few are taken."""
    first, *between = rungs
    plan = first.plan()
    if plan.fits is not False or not between:
        return first, plan
    leanest = between.pop()
    lean = leanest.plan()
    for rung in between if lean.fits else []:
        if (plan := rung.plan()).fits:
            return rung, plan
    return leanest, lean


def _lengths(lengths: Sequence[int], positions: int) -> Iterator[int]:
    """Yield limits to propose, the longest first, each a multiple of 64 where the model has as many."""
    tail = lengths[-1] > LONG_TAIL * lengths[math.ceil(0.99 * len(lengths)) - 1]
    seen = set()
    for share in SHARES[1:] if tail else SHARES:
        limit = min(64 * math.ceil(lengths[math.ceil(share * len(lengths)) - 1] / 64), positions)
        if limit not in seen:
            seen.add(limit)
            yield limit


def _ladder(question: Question, fixed: Mapping[str, Any], *, movable: bool) -> Iterator[_Rung]:
    """Yield proposals, what takes less memory later: rows of a micro-batch, embeddings, optimiser."""
    train, model = fixed.get("train", {}), fixed.get("model", {})
    micros: list[int] = [4, 2, 1]
    if "per_device_train_batch_size" in train:
        micros = [int(train["per_device_train_batch_size"])]
    movable = movable and question.setting.quantisation != "none"
    cpu = bool(model.get("embeddings_on_cpu", False))
    optim = str(train.get("optim", "adamw_torch"))
    for micro in micros:
        yield _rung(question, train, micro, cpu, optim)
    if movable and "embeddings_on_cpu" not in model:
        cpu = True
        yield _rung(question, train, micros[-1], cpu, optim)
    if question.card is not None and "optim" not in train:
        yield _rung(question, train, micros[-1], cpu, "adamw_8bit")


def _rung(
    question: Question, train: Mapping[str, Any], micro: int, on_cpu: bool, optim: str
) -> _Rung:
    times = train.get(
        "gradient_accumulation_steps", max(1, _step_rows(len(question.rows)) // micro)
    )
    state = 2.0 if optim == "adamw_8bit" else question.setting.optimiser
    setting = replace(question.setting, embeddings_on_cpu=on_cpu, optimiser=state)
    batches = Batches(micro, times, train.get("max_tokens_per_batch"))
    return _Rung(
        replace(question, setting=setting, batches=batches),
        {
            "train.per_device_train_batch_size": micro,
            "train.gradient_accumulation_steps": times,
            "train.per_device_eval_batch_size": train.get("per_device_eval_batch_size", micro),
            "train.optim": optim,
            "model.embeddings_on_cpu": on_cpu,
        },
    )


def _by_tokens(
    tried: Question, plan: Plan, train: Mapping[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """Where rows are uneven, let short ones share the room of the longest: a budget of tokens."""
    laid = sorted(map(laid_tokens, tried.rows))
    even = laid[-1] < UNEVEN * laid[len(laid) // 2]
    if "max_tokens_per_batch" in train or even or not plan.setting.flat:
        return plan, {}
    tokens = batch_tokens(largest_micro_batch(tried.rows, tried.batches), True)
    again = replace(tried, batches=replace(tried.batches, max_tokens=tokens)).answer(remedies=False)
    return (plan, {}) if again.fits is False else (again, {"train.max_tokens_per_batch": tokens})


def _step_rows(rows: int) -> int:
    """Return the rows of a step: 32, or fewer where an epoch would have less than 20 steps."""
    return min(STEP_ROWS, max(4, 1 << int(math.log2(max(rows / STEPS, 1)))))
