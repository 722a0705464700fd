"""Out of memory: the longest micro-batch is tried before step 1, a step that fails is done in less.

What is changed then is exact: more is recomputed, or a step is split further. No number depends on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_dpo.checkup import free_memory
from lora_dpo.engine import is_flat, largest_difference, recompute_layers
from lora_dpo.errors import TrainingError
from lora_dpo.heads import causal_lm
from lora_dpo.layers import decoder_layers, work_of
from lora_dpo.layers.offloading import has_link
from lora_dpo.planning import (
    Batches,
    Lengths,
    Plan,
    compact_rows,
    has_several,
    largest_places,
    make_plan,
    moved_instead,
    optimiser_bytes,
    plan_policy,
    setting_of,
    this_card,
)
from lora_dpo.randomness import random_state, restore_random
from lora_dpo.shortage import Shortage, forget, is_out_of_memory
from lora_dpo.stats import AnyStats
from lora_dpo.stepping import batch_tokens

logger = logging.getLogger("lora_dpo")

Row = Mapping[str, Any]
Result = TypeVar("Result")
_NO_LIMIT = "nothing limits the memory: no GPU, and train.memory_budget_gib is not set"
_SMALL = 20_000_000  # weights
_FOUND = "what could be had when memory ran out"
_SHARE = 2  # of the CPU's free memory, what may wait there
_NONE_WAITS = ", and none waits elsewhere"
_AGREE = 0.05  # of two ways through the same kernels, some of which add up in no fixed order


class Memory:
    """What a run does about its memory.

    Args:
        model: the policy, with its engine chosen.
        rows: all rows of training.
        batches: how they become steps; a shortage makes them smaller.
        device: where the model computes.
        alone: whether this is the only process; several must agree, so they stop.
        settings: of ``plan_policy``.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        batches: Batches,
        *,
        device: torch.device,
        alone: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.model, self.rows, self.batches = model, rows, batches
        self.device, self.alone, self.settings = device, alone, settings
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._optimiser = int(optimiser_bytes(settings["args"]) * trained)
        self._no_plan = _NO_LIMIT
        self.changes: list[str] = []  # after memory ran out, in words
        self.tried = ""  # which of two ways was faster, in words
        self._recomputed = 0  # layers that are where none waits in the memory of the CPU
        self.tell: Callable[[], None] | None = None  # when the plan has changed
        self.plan = self._planned()
        if self.plan is not None:
            self._take(self.plan)

    def foresee(self) -> None:
        """Plan as well where nothing limits the memory, for the reader of a run.

        Not for a base so small that planning takes longer than its memory is worth.
        """
        weights = sum(p.numel() for p in self.model.parameters())
        if self.plan is None and self._no_plan == _NO_LIMIT and weights > _SMALL:
            self.plan = self._planned(brief=True)

    def _take(self, plan: Plan) -> None:
        how: dict[str, Any] = {"offloaded": plan.offloaded, "moved": plan.moved}
        how["keeps_weights"] = plan.setting.keeps_weights
        recompute_layers(self.model, plan.recomputed, **how)

    def lines(self) -> list[str]:
        """Return the plan in sentences; what the rows' lengths mean, where there is none."""
        if self.plan is not None:
            return self.plan.lines()
        return [f"data: {Lengths.of(compact_rows(self.rows), self.batches.micro_batch).line()}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON, as it holds now.

        ``not_planned`` says why there is none, ``tried`` which of two ways was faster, ``changes`` what
        running out of memory has changed.
        """
        found = {"not_planned": self._no_plan} if self.plan is None else self.plan.to_dict()
        found |= {"tried": self.tried} if self.tried else {}
        return {**found, "changes": list(self.changes)} if self.changes else found

    def _planned(self, *, brief: bool = False) -> Plan | None:
        try:
            rows = compact_rows(self.rows)
            return plan_policy(self.model, rows, self.batches, brief=brief, **self.settings)
        except Exception as error:  # a plan is an estimate: without it the run is as good
            reason = " ".join(str(error).split())[:200]
            self._no_plan = f"{type(error).__name__}: {reason}"
            logger.warning("no plan of the memory (%s)", self._no_plan)
            return None

    def probe(self, collect: Callable[[nn.Module, Sequence[Row]], AnyStats]) -> None:
        """Run the micro-batch that takes most, forward and backward, without an update.

        Where layers are recomputed that could wait in the memory of the CPU, both are timed.

        Raises:
            TrainingError: it does not fit, however it is split.
        """

        def attempt() -> None:
            flat = is_flat(self.model)
            rows = [self.rows[i] for i in largest_places(compact, self.batches, flat=flat)]
            # what is there in a real step from the second on: the optimiser's state, and the
            # gradients of the micro-batches before this one
            held = torch.empty(self._optimiser, dtype=torch.uint8, device=self.device)
            if has_several(compact, self.batches, flat=flat):
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            values = collect(self.model, rows).present()
            policy = [v.sum() for name, v in values.items() if v.requires_grad and "policy" in name]
            torch.stack(policy).sum().backward()
            del held

        compact = compact_rows(self.rows)
        was_training = self.model.training
        self.model.train()
        before = random_state()
        self.fitted(attempt, "the longest micro-batch, tried before step 1")
        if self.alone and has_link(self.device) and self.plan is not None and not self.changes:
            self._take_the_faster(attempt, self.plan)
        restore_random(before)
        self.model.zero_grad(set_to_none=True)
        self.model.train(was_training)

    def _take_the_faster(self, attempt: Callable[[], None], plan: Plan) -> None:
        """Let layers wait in the memory of the CPU if that is faster than the plan, and as right."""
        other = moved_instead(plan, free_memory() // _SHARE)
        if other is None:
            return
        where, takes = f"{other.moved} layers in the memory of the CPU", False
        try:
            before, expected = self._timed(attempt)
            self._take(other)
            now, found = self._timed(attempt)
            away = largest_difference(found, expected)
            takes = now < before and away < _AGREE  # nor is NaN
            self.tried = (
                f"the longest micro-batch takes {now:.3f} s with {where}, {before:.3f} without"
            )
            if not away < _AGREE:
                self.tried += f", but gradients differ by {away:.2g}"
        except Exception as error:  # whatever goes wrong there: the plan has been tried
            self.tried = f"{where} could not be tried ({' '.join(str(error).split())[:160]})"
        if takes:
            self.plan, self._recomputed = other, plan.recomputed
        else:  # outside of the handler: its traceback keeps tensors alive
            self._take(plan)
            self.model.zero_grad(set_to_none=True)
            forget(self.device)
        logger.info("%s: %s is taken", self.tried, "the former" if takes else "the plan without")
        if self.tell is not None:
            self.tell()

    def _timed(self, attempt: Callable[[], None]) -> tuple[float, list[Tensor]]:
        """Return the seconds of the faster of two times, behind a first one, and the gradients."""
        found, random = [], random_state()
        for _ in range(3):
            self.model.zero_grad(set_to_none=True)
            restore_random(random)
            _synchronise(self.device)
            start = time.perf_counter()
            attempt()
            _synchronise(self.device)
            found.append(time.perf_counter() - start)
        gradients = [p.grad.cpu() for p in self.model.parameters() if p.grad is not None]
        return min(found[1:]), gradients

    def fitted(self, attempt: Callable[[], Result], what: str) -> Result:
        """Return what an attempt returns; when memory runs out, try again in less of it.

        Args:
            attempt: begins without gradients, and reads ``batches`` anew each time.
            what: it is, for messages.

        Raises:
            TrainingError: nothing is left to be spared.
        """
        before, tries = random_state(), 0
        while True:
            try:
                return attempt()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                short = Shortage.of(error, self.device)
            # Outside of the handler: its traceback keeps tensors alive.
            self.model.zero_grad(set_to_none=True)
            forget(self.device)
            plan = self.plan
            room = None if plan is None else plan.peak - short.missing(plan.peak)
            change = self._shrink(room, tries) if self.alone else ""
            if not change:
                raise TrainingError(self._too_large(what, short))
            tries = 0 if change.endswith(_NONE_WAITS) else tries + 1
            logger.warning("out of memory in %s (%s); from now on %s", what, short.said, change)
            self.changes.append(f"out of memory in {what}; from now on {change}")
            if room is not None:
                self.plan = self._as_it_stands(room) or plan
            if self.tell is not None:
                self.tell()
            restore_random(before)

    def _shrink(self, room: int | None, tries: int) -> str:
        """Make the next exact change that takes less memory; return it in words, or nothing.

        Args:
            room: bytes that a step may take by the plan's account, in which it took too many.
            tries: changes that this step has had. At the first the plan says how many more layers are
                recomputed; if that was wrong too, all are.
        """
        causal = causal_lm(self.model)
        work, layers = work_of(causal), len(decoder_layers(causal))
        if work is not None and work.moved:
            work.recomputed, work.moved = self._recomputed, 0
            return f"{work.recomputed} of {layers} layers are recomputed{_NONE_WAITS}"
        if work is not None and work.recomputed < layers:
            count = None
            if self.plan is not None and room is not None and tries == 0:
                count = self.plan.bytes.fewest_recomputed(room, work.recomputed + 1)
            work.recomputed = layers if count is None else count
            return f"{work.recomputed} of {layers} layers are recomputed"
        if work is not None and work.keeps_weights:
            work.keeps_weights = False
            return "no plain weight waits for its second use"
        offloads = has_link(self.device) and self.settings["offloads"]
        if work is not None and layers and not work.offloaded and offloads:
            work.offloaded = True
            return "inputs of layers wait in the memory of the CPU"
        now = self.batches
        if now.max_tokens is not None:
            flat = is_flat(self.model)
            longest = max(batch_tokens([row], flat) for row in compact_rows(self.rows))
            smaller = max(longest, now.max_tokens // 2)
            if smaller < now.max_tokens:
                self.batches = replace(now, max_tokens=smaller)
                return f"a micro-batch has at most {smaller} tokens"
        elif now.micro_batch > 1:
            half = now.micro_batch // 2
            self.batches = Batches(half, now.accumulated * now.micro_batch // half)
            return f"a micro-batch has {half} rows (a step keeps its rows)"
        return ""

    def _as_it_stands(self, room: int | None = None, *, remedies: bool = False) -> Plan | None:
        """Plan the step as the model and its batches are now, in the room that was found."""
        known = {name: self.settings[name] for name in ("args", "chunk", "with_reference")}
        work = work_of(causal_lm(self.model))
        how: dict[str, Any] = {"recompute": self.settings["recompute"], "room_is": _FOUND}
        if work is not None:  # nothing is left to choose
            how |= {"recompute": False, "least": work.recomputed, "offloaded": work.offloaded}
        how["offloads"] = self.settings["offloads"]
        how |= {"card": this_card(self.device), "remedies": remedies, "room": room}
        try:
            return make_plan(
                setting_of(self.model, **known), compact_rows(self.rows), self.batches, **how
            )
        except Exception as error:  # the run and its message matter more than the plan
            logger.warning("no plan of what holds now (%s: %s)", type(error).__name__, error)
            return None

    def _too_large(self, what: str, short: Shortage) -> str:
        text = f"out of memory in {what}: {short.said}. Nothing is lost: checkpoints are kept."
        if not self.alone:
            return f"{text} Several processes cannot change their batches alone; set smaller ones."
        plan = self._as_it_stands()
        if plan is not None:
            plan = self._as_it_stands(plan.peak - short.missing(plan.peak), remedies=True)
        if plan is None or not plan.remedies:
            return (
                f"{text} Nothing exact is left to be spared: take a smaller base or a larger card."
            )
        lines = [f"{text} What takes less, the cheapest first:", *map(str, plan.remedies[:3])]
        return "\n".join([*lines, plan.together] if plan.together else lines)


def _synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
