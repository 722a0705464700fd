"""One optimiser step: gradients of the mean over all its rows, however it is split.

Where the rows of an objective do not touch each other, each micro-batch is run and backpropagated in
turn. Where they do (KTO's baseline, AOT's sort), a first pass without graphs collects the statistics
of the whole step, the objective is differentiated with respect to these, and a second pass carries
that gradient into the model, a micro-batch at a time: exact, for the price of one more forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dpo.objectives import BoundObjective
from lora_dpo.objectives.bound import States
from lora_dpo.randomness import random_state, restore_random
from lora_dpo.stats import AnyStats
from lora_dpo.stepping import batch_tokens

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What an optimiser step found: statistics without gradient, and losses ``[rows]``."""

    stats: AnyStats
    losses: Tensor


@dataclass(frozen=True)
class Passes:
    """Runs the passes of a step.

    Args:
        objective: with its hyperparameters.
        collect: ``(model, rows, gradient_only) -> stats``.
        backward: what takes a loss backwards (accelerate's, which scales and counts).
        no_sync: a context in which gradients of ranks are not yet added up.
        micro_batch: rows at a time.
        max_tokens: tokens at a time, in place of rows; a longer row has a micro-batch to itself.
        flat: whether they are laid end to end; else padding counts.
    """

    objective: BoundObjective
    collect: Callable[[nn.Module, Sequence[Row], bool], AnyStats]
    backward: Callable[[Tensor], None]
    no_sync: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
    micro_batch: int
    max_tokens: int | None = None
    flat: bool = True

    def __call__(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        states: States,
        *,
        scale: float,
        tokens_a_row: float,
    ) -> Step:
        """Backpropagate ``scale`` times the sum of the losses of ``rows``.

        Args:
            scale: 1 / rows of the step (times the ranks, whose gradients are averaged).
            tokens_a_row: mean completion length of the step, which token means divide by.
        """
        parts = self._parts(rows)
        if self.objective.couples_rows and len(parts) > 1:
            return self._in_two_passes(model, parts, states, scale, tokens_a_row)
        found = []
        for part, syncing in self._synchronised(model, parts):
            with syncing:
                stats = self.collect(model, part, False)
                losses = self.objective(stats, states, tokens_a_row=tokens_a_row)
                self.backward(losses.sum() * scale)
            found.append(Step(stats.detach(), losses.detach()))
        return Step(_cat([s.stats for s in found]), torch.cat([s.losses for s in found]))

    def _parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Return the rows in their order, split by number or by tokens."""
        if self.max_tokens is None:
            return [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
        parts: list[list[Row]] = []
        for row in rows:
            if not parts or batch_tokens([*parts[-1], row], self.flat) > self.max_tokens:
                parts.append([])
            parts[-1].append(row)
        return list(parts)

    def _in_two_passes(
        self,
        model: nn.Module,
        parts: Sequence[Sequence[Row]],
        states: States,
        scale: float,
        tokens_a_row: float,
    ) -> Step:
        randomness, found = [], []
        with torch.no_grad():
            for part in parts:
                randomness.append(random_state())
                found.append(self.collect(model, part, False))
        after = random_state()
        whole = _cat(found)
        leaves = whole.map(lambda name, v: v.clone().requires_grad_() if _moves(name) else v)
        with torch.enable_grad():
            losses = self.objective(leaves, states, tokens_a_row=tokens_a_row)
            (losses.sum() * scale).backward()
        gradients = {
            name: leaf.grad for name, leaf in leaves.present().items() if leaf.grad is not None
        }
        start = 0
        for (part, syncing), before in zip(
            self._synchronised(model, parts), randomness, strict=True
        ):
            restore_random(before)  # the same dropout and draws as in the first pass
            with syncing:
                values = self.collect(model, part, True).present()
                here = slice(start, start + len(part))
                self.backward(
                    torch.stack([(values[k] * g[here]).sum() for k, g in gradients.items()]).sum()
                )
            start += len(part)
        restore_random(after)
        return Step(whole, losses.detach())

    def _synchronised(
        self, model: nn.Module, parts: Sequence[Sequence[Row]]
    ) -> Iterator[tuple[Sequence[Row], contextlib.AbstractContextManager[Any]]]:
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            yield part, contextlib.nullcontext() if last else self.no_sync(model)


def _moves(name: str) -> bool:
    return name.startswith("policy_") and "mismatched" not in name


def _cat(parts: Sequence[AnyStats]) -> AnyStats:
    return type(parts[0]).cat(parts)  # type: ignore[arg-type]  # all of one kind
