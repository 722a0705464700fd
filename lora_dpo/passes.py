"""One optimiser step: gradients of the mean over all its rows, however it is split.

Where the rows of an objective do not touch each other, each micro-batch is run and backpropagated in
turn. Where they do (KTO's baseline, AOT's sort), a first pass without graphs collects the statistics
of the whole step, the objective is differentiated with respect to these, and a second pass carries
that gradient into the model, a micro-batch at a time: exact, for the price of one more forward pass.

Several processes deal the micro-batches of a step among themselves; statistics and losses are gathered,
so that each of them knows those of the whole step.
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
from lora_dpo.randomness import random_state, restore_random, seeded
from lora_dpo.ranks import check_averaged, dealt, gathered, places, processes, rank
from lora_dpo.stats import AnyStats
from lora_dpo.stepping import Batches, batch_tokens

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What an optimiser step found in all processes: statistics without gradient, losses ``[rows]``."""

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
        batches: rows or tokens at a time; a row of more tokens has a micro-batch to itself.
        flat: whether they are laid end to end; else padding counts.
        seed: of what an objective draws that couples rows, of this step alone.
    """

    objective: BoundObjective
    collect: Callable[[nn.Module, Sequence[Row], bool], AnyStats]
    backward: Callable[[Tensor], None]
    no_sync: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
    batches: Batches
    flat: bool = True
    seed: int = 0

    def __call__(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        states: States,
        *,
        tokens_a_row: float,
    ) -> Step:
        """Backpropagate the mean of the losses of ``rows``.

        Args:
            model: as accelerate prepared it.
            rows: of the whole step, the same in every process.
            states: what the objective remembers.
            tokens_a_row: mean completion length of the step, which token means divide by.
        """
        check_averaged(model)
        parts = self._parts(rows)
        if self.objective.couples_rows and (len(parts) > 1 or processes() > 1):
            return self._in_two_passes(model, parts, states, tokens_a_row)
        scale = processes() / len(rows)  # gradients of processes are averaged
        found = []
        for part, counts, syncing in self._synchronised(model, dealt(parts)):
            with syncing:
                stats = self.collect(model, part, False)
                losses = self._losses(stats, states, tokens_a_row)
                self.backward(losses.sum() * (scale if counts else 0.0))
            found.append(Step(stats.detach(), losses.detach()))
        stats, losses = _cat([s.stats for s in found]), torch.cat([s.losses for s in found])
        values = gathered({**stats.present(), "losses": losses}, parts)
        losses = values.pop("losses")
        return Step(type(stats)(**values), losses)

    def _losses(self, stats: AnyStats, states: States, tokens_a_row: float) -> Tensor:
        if not self.objective.couples_rows:
            return self.objective(stats, states, tokens_a_row=tokens_a_row)
        with seeded(self.seed):  # what is drawn for a whole step is the same in every process
            return self.objective(stats, states, tokens_a_row=tokens_a_row)

    def _parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Return the rows in their order, split by number or by tokens."""
        width, most = self.batches.micro_batch, self.batches.max_tokens
        if most is None:
            return [rows[i : i + width] for i in range(0, len(rows), width)]
        parts: list[list[Row]] = []
        for row in rows:
            if not parts or batch_tokens([*parts[-1], row], self.flat) > most:
                parts.append([])
            parts[-1].append(row)
        return list(parts)

    def _in_two_passes(
        self,
        model: nn.Module,
        parts: Sequence[Sequence[Row]],
        states: States,
        tokens_a_row: float,
    ) -> Step:
        randomness, found = [], []
        own = dealt(parts)
        with torch.no_grad():
            for part, _ in own:
                randomness.append(random_state())
                found.append(self.collect(model, part, False))
        after = random_state()
        stats = _cat(found)
        whole = type(stats)(**gathered(stats.present(), parts))
        leaves = whole.map(lambda name, v: v.clone().requires_grad_() if _moves(name) else v)
        with torch.enable_grad():  # in every process alike, from the same values
            losses = self._losses(leaves, states, tokens_a_row)
            (losses.sum() * (processes() / len(whole))).backward()
        mine = places(parts, rank())
        gradients = {
            # behind them a zero, for a row that counts nothing
            name: torch.cat([leaf.grad[mine], leaf.grad.new_zeros(1)])
            for name, leaf in leaves.present().items()
            if leaf.grad is not None
        }
        start = 0
        turns = zip(self._synchronised(model, own), randomness, strict=True)
        for (part, counts, syncing), before in turns:
            restore_random(before)  # the same dropout and draws as in the first pass
            with syncing:
                values = self.collect(model, part, True).present()
                here = slice(start, start + len(part)) if counts else slice(len(mine), None)
                self.backward(
                    torch.stack([(values[k] * g[here]).sum() for k, g in gradients.items()]).sum()
                )
            start += len(part)
        restore_random(after)
        return Step(whole, losses.detach())

    def _synchronised(
        self, model: nn.Module, parts: Sequence[tuple[Sequence[Row], bool]]
    ) -> Iterator[tuple[Sequence[Row], bool, contextlib.AbstractContextManager[Any]]]:
        for number, (part, counts) in enumerate(parts):
            last = number + 1 == len(parts)
            yield part, counts, contextlib.nullcontext() if last else self.no_sync(model)


def _moves(name: str) -> bool:
    return name.startswith("policy_") and "mismatched" not in name


def _cat(parts: Sequence[AnyStats]) -> AnyStats:
    return type(parts[0]).cat(parts)  # type: ignore[arg-type]  # all of one kind
