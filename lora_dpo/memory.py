"""Out of memory: the longest micro-batch is tried before step 1, a step that fails is done in less.

What is changed then is exact: more is recomputed, or a step is split further. No number depends on it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lora_dpo.engine import is_flat, recompute_layers
from lora_dpo.errors import TrainingError
from lora_dpo.heads import causal_lm
from lora_dpo.layers import decoder_layers, work_of
from lora_dpo.metrics import peak_gib
from lora_dpo.planning import (
    Batches,
    Plan,
    largest_micro_batch,
    optimiser_bytes,
    plan_policy,
)
from lora_dpo.randomness import random_state, restore_random
from lora_dpo.stats import AnyStats
from lora_dpo.stepping import batch_tokens

logger = logging.getLogger("lora_dpo")

Row = Mapping[str, Any]
Result = TypeVar("Result")


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
        self._no_plan = "nothing limits the memory: no GPU, and train.memory_budget_gib is not set"
        self.plan = self._planned()
        if self.plan is not None:
            how = {
                "keeps_weights": self.plan.setting.keeps_weights,
                "offloaded": self.plan.offloaded,
            }
            recompute_layers(model, self.plan.recomputed, **how)

    def lines(self) -> list[str]:
        """Return the plan in sentences, where there is one."""
        return [] if self.plan is None else self.plan.lines()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON; ``not_planned`` says why there is none."""
        return {"not_planned": self._no_plan} if self.plan is None else self.plan.to_dict()

    def _planned(self) -> Plan | None:
        try:
            return plan_policy(self.model, self.rows, self.batches, **self.settings)
        except Exception as error:  # a plan is an estimate: without it the run is as good
            reason = " ".join(str(error).split())[:200]
            self._no_plan = f"{type(error).__name__}: {reason}"
            logger.warning("no plan of the memory (%s)", self._no_plan)
            return None

    def probe(self, collect: Callable[[nn.Module, Sequence[Row]], AnyStats]) -> None:
        """Run the micro-batch that takes most, forward and backward, without an update.

        Raises:
            TrainingError: it does not fit, however it is split.
        """

        def attempt() -> None:
            rows = largest_micro_batch(self.rows, self.batches, flat=is_flat(self.model))
            values = collect(self.model, rows).present()
            held = torch.empty(self._optimiser, dtype=torch.uint8, device=self.device)
            policy = [v.sum() for name, v in values.items() if v.requires_grad and "policy" in name]
            torch.stack(policy).sum().backward()
            del held  # what the optimiser will have allocated by the second step

        was_training = self.model.training
        self.model.train()
        before = random_state()
        self.fitted(attempt, "the longest micro-batch, tried before step 1")
        restore_random(before)
        self.model.zero_grad(set_to_none=True)
        self.model.train(was_training)

    def fitted(self, attempt: Callable[[], Result], what: str) -> Result:
        """Return what an attempt returns; when memory runs out, try again in less of it.

        Args:
            attempt: begins without gradients, and reads ``batches`` anew each time.
            what: it is, for messages.

        Raises:
            TrainingError: nothing is left to be spared.
        """
        before = random_state()
        while True:
            try:
                return attempt()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                said = " ".join(str(error).split())[:160]
            # Outside of the handler: its traceback keeps tensors alive.
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            change = self._shrink() if self.alone else ""
            if not change:
                raise TrainingError(self._too_large(what, said))
            logger.warning("out of memory in %s (%s); from now on %s", what, said, change)
            restore_random(before)

    def _shrink(self) -> str:
        """Make the next exact change that takes less memory; return it in words, or nothing."""
        causal = causal_lm(self.model)
        work, layers = work_of(causal), len(decoder_layers(causal))
        if work is not None and work.recomputed < layers:
            work.recomputed = layers
            return "all layers are recomputed"
        if work is not None and work.keeps_weights:
            work.keeps_weights = False
            return "no plain weight waits for its second use"
        if work is not None and layers and not work.offloaded and self.device.type == "cuda":
            work.offloaded = True
            return "inputs of layers wait in the memory of the CPU"
        now = self.batches
        if now.max_tokens is not None:
            flat = is_flat(self.model)
            longest = max(batch_tokens([row], flat) for row in self.rows)
            smaller = max(longest, now.max_tokens // 2)
            if smaller < now.max_tokens:
                self.batches = replace(now, max_tokens=smaller)
                return f"a micro-batch has at most {smaller} tokens"
        elif now.micro_batch > 1:
            half = now.micro_batch // 2
            self.batches = Batches(half, now.accumulated * now.micro_batch // half)
            return f"a micro-batch has {half} rows (a step keeps its rows)"
        return ""

    def _too_large(self, what: str, said: str) -> str:
        text = f"out of memory in {what}: {said}. Nothing is lost: checkpoints are kept."
        if not self.alone:
            return f"{text} Several processes cannot change their batches alone; set smaller ones."
        settings = {**self.settings, "budget_gib": max(peak_gib(self.device), 0.01) * 1e-3}
        try:
            plan = plan_policy(self.model, self.rows, self.batches, **settings)
        except Exception:  # the message matters more than its numbers
            plan = None
        remedies = plan.remedies[:3] if plan is not None else ()
        if not remedies:
            return (
                f"{text} Nothing exact is left to be spared: take a smaller base or a larger card."
            )
        return "\n".join([f"{text} What takes less, the cheapest first:", *map(str, remedies)])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a card or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _SIGNS)


_SIGNS = (
    "DefaultCPUAllocator",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
