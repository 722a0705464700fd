"""An objective with its hyperparameters fixed, and weighted sums of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lora_dpo.stats import UNKEPT, AnyStats, PairStats

if TYPE_CHECKING:
    from lora_dpo.objectives._table import Objective

Data = Literal["paired", "unpaired", "demonstrations"]
State = Mapping[str, float]
States = Mapping[str, State]


@dataclass(frozen=True)
class Term:
    """One objective of a weighted sum."""

    weight: float
    objective: Objective
    hyperparameters: Mapping[str, float | bool]

    def __str__(self) -> str:
        values = ", ".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else format(value, 'g')}"
            for key, value in self.hyperparameters.items()
        )
        return f"{self.objective.name}({values})"


@dataclass(frozen=True)
class BoundObjective:
    """Objectives with their hyperparameters: call it on a record to get losses ``[batch]``.

    Most hold one term; the SFT term (``nll_weight``) and mixtures add further ones.

    Args:
        terms: weights and objectives, the leading one first; rewards are the leading one's.
        given: the hyperparameters that were given, the others having their defaults.
    """

    terms: tuple[Term, ...]
    given: frozenset[str] = frozenset()

    def __call__(
        self,
        stats: AnyStats,
        states: States | None = None,
        *,
        tokens_a_row: float | None = None,
    ) -> Tensor:
        """Return losses ``[batch]`` whose mean is the objective.

        Args:
            stats: the record of a batch.
            states: what the terms remember, as ``initial_states`` and ``updated`` return it.
            tokens_a_row: mean completion length that token-weighted terms divide by; that of this
                batch if not given. A micro-batch is given that of its whole optimiser step.
        """
        total = None
        for term in self.terms:
            losses = term.objective.loss(stats, *self._state(term, states), **term.hyperparameters)
            if term.objective.reduction == "tokens":
                lengths = counted_lengths(stats).to(losses.dtype)
                mean = lengths.mean() if tokens_a_row is None else tokens_a_row
                losses = losses * lengths / mean
            part = losses if term.weight == 1.0 else term.weight * losses
            total = part if total is None else total + part
        assert total is not None
        return total

    def rewards(self, stats: AnyStats) -> tuple[Tensor, ...]:
        """Return the leading term's implicit rewards: of both sides of pairs, or of single rows."""
        leading = self.terms[0]
        return leading.objective.rewards(stats, **leading.hyperparameters)

    def initial_states(self) -> dict[str, State]:
        """Return what the terms remember before the first step; empty for most objectives."""
        return {
            term.objective.name: dict(term.objective.initial_state)
            for term in self.terms
            if term.objective.initial_state
        }

    def updated(self, states: States, stats: AnyStats) -> dict[str, State]:
        """Return what the terms remember after an optimiser step over all rows of ``stats``."""
        fresh = dict(states)
        with torch.no_grad():
            for term in self.terms:
                row = term.objective
                if row.update is not None:
                    fresh[row.name] = row.update(fresh[row.name], stats, **term.hyperparameters)
        return fresh

    def balanced(self, wanted: int, unwanted: int) -> BoundObjective:
        """Return the objective with class weights that make up for unequal counts of labels.

        The rarer class gets ``larger / smaller``, so that ``desirable_weight * wanted :
        undesirable_weight * unwanted`` is 1 : 1 (arXiv:2402.01306, section 4.2). Weights that were
        given stay, and so does an objective without such weights.
        """
        names = ("desirable_weight", "undesirable_weight")
        values = self.terms[0].hyperparameters
        if not set(names) <= set(values) or self.given & set(names) or not wanted * unwanted:
            return self
        most = max(wanted, unwanted)
        weights = dict(zip(names, (most / wanted, most / unwanted), strict=True))
        leading = replace(self.terms[0], hyperparameters={**values, **weights})
        return replace(self, terms=(leading, *self.terms[1:]))

    @property
    def objective(self) -> Objective:
        """The leading row of the table."""
        return self.terms[0].objective

    @property
    def hyperparameters(self) -> Mapping[str, float | bool]:
        """Those of the leading term."""
        return self.terms[0].hyperparameters

    @property
    def name(self) -> str:
        """The names of all terms."""
        return " + ".join(term.objective.name for term in self.terms)

    @property
    def data(self) -> Data:
        """The kind of rows that it trains on."""
        return self.objective.data

    @property
    def reference(self) -> bool:
        """Whether any term reads the reference."""
        return any(term.objective.reference for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics beyond log-probs and lengths that any term reads."""
        every = {need for term in self.terms for need in term.objective.needs}
        return frozenset(every - {"lengths"})

    @property
    def needs_running_reference(self) -> str:
        """Why summed log-probs of the reference, known beforehand, would spare nothing; or nothing."""
        if not self.reference:
            return f"{self.name} reads no reference, so there is nothing to keep; leave it out."
        if needs := sorted(self.needs & UNKEPT):
            return (
                f"{self.name} reads {' and '.join(needs)} of the reference, which summed log-probs do "
                "not tell, so it runs in every step anyway; leave it out."
            )
        return ""

    @property
    def couples_rows(self) -> bool:
        """Whether any term's rows depend on each other."""
        return any(term.objective.couples_rows for term in self.terms)

    def __str__(self) -> str:
        if len(self.terms) == 1 and self.terms[0].weight == 1.0:
            return str(self.terms[0])
        return " + ".join(f"{term.weight:g} * {term}" for term in self.terms)

    @staticmethod
    def _state(term: Term, states: States | None) -> tuple[State, ...]:
        row = term.objective
        if not row.initial_state:
            return ()
        return ((states or {}).get(row.name, row.initial_state),)


def counted_lengths(stats: AnyStats) -> Tensor:
    """Return the tokens that a token-weighted mean counts: of the chosen side, or of the row."""
    return stats.chosen_lengths if isinstance(stats, PairStats) else stats.lengths
