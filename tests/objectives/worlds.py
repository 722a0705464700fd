"""Finite worlds of answers with exact Bradley-Terry preferences, and the minimum of a loss there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from lora_dpo.objectives import BoundObjective
from lora_dpo.stats import PairStats


@dataclass(frozen=True)
class World:
    """Answers to one prompt: what they are worth, how likely they were, how long they are.

    ``noise`` is the share of rows whose preference is recorded the wrong way round.
    """

    strengths: tuple[float, ...]
    reference_logits: tuple[float, ...]
    lengths: tuple[int, ...]
    noise: float = 0.0

    @property
    def rewards(self) -> Tensor:  # [answers]
        return torch.tensor(self.strengths, dtype=torch.float64).log()

    @property
    def reference(self) -> Tensor:  # [answers]
        return torch.tensor(self.reference_logits, dtype=torch.float64).log_softmax(0)

    @property
    def tokens(self) -> Tensor:  # [answers]
        return torch.tensor(self.lengths)

    @property
    def wins(self) -> Tensor:  # [answers, answers]
        """``P(row beats column)`` by Bradley-Terry, 1/2 on the diagonal."""
        return torch.sigmoid(self.rewards[:, None] - self.rewards[None, :])

    @property
    def win_rates(self) -> Tensor:  # [answers]
        """Probability of beating an opponent that is drawn uniformly among the other answers."""
        return (self.wins.sum(1) - 0.5) / (len(self.strengths) - 1)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return winner, loser and weight of every ordered pair of different answers."""
        winner, loser = (~torch.eye(len(self.strengths), dtype=torch.bool)).nonzero(as_tuple=True)
        clean = self.wins[winner, loser]
        recorded = (1 - self.noise) * clean + self.noise * (1 - clean)
        return winner, loser, recorded / recorded.sum()

    def stats(self, logps: Tensor) -> PairStats:
        """Return the record of all rows for a policy with these log-probs of the answers."""
        winner, loser, _ = self.rows()
        return PairStats(
            policy_chosen_logps=logps[winner],
            policy_rejected_logps=logps[loser],
            chosen_lengths=self.tokens[winner],
            rejected_lengths=self.tokens[loser],
            reference_chosen_logps=self.reference[winner],
            reference_rejected_logps=self.reference[loser],
            chosen_scores=self.rewards[winner],
            rejected_scores=self.rewards[loser],
        )

    def loss(self, objective: BoundObjective, logps: Tensor) -> Tensor:
        """Return the expected loss of a policy."""
        return (self.rows()[2] * objective(self.stats(logps))).sum()


FOUR = World((1.0, 2.5, 3.0, 7.0), (0.4, -1.1, 0.7, -0.2), (2, 6, 3, 9))
FIVE = World((2.0, 0.5, 0.9, 4.0, 1.0), (-0.5, 1.0, 0.2, -0.8, 0.1), (4, 1, 5, 7, 2))
TWO = World((1.0, 4.0), (0.6, -0.3), (3, 8))


def minimum(
    world: World, objective: BoundObjective, *, normalised: bool = True, start: Tensor | None = None
) -> Tensor:
    """Return the log-probs of the answers at the minimum of the expected loss, found by L-BFGS.

    Tabular logits, beginning at the reference; where ``normalised`` is False the log-probs are free
    numbers, not a distribution.
    """
    free = (world.reference if start is None else start).clone().requires_grad_()
    search = torch.optim.LBFGS(
        [free],
        max_iter=2000,
        history_size=20,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def logps() -> Tensor:
        return free.log_softmax(0) if normalised else free

    def evaluate() -> float:
        search.zero_grad()
        loss = world.loss(objective, logps())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    search.step(evaluate)
    evaluate()
    assert free.grad is not None
    assert float(free.grad.abs().max()) < 1e-8, "the search has not arrived at a minimum"
    return logps().detach()


def total_variation(one: Tensor, other: Tensor) -> float:
    """Return half the sum of the differences of two distributions, given as log-probs."""
    return 0.5 * float((one.exp() - other.exp()).abs().sum())


def assert_reaches(world: World, objective: BoundObjective, expected: Tensor) -> None:
    """Hold the minimum against a distribution, which is not the place where the search began."""
    assert float(expected.logsumexp(0)) == pytest.approx(0, abs=1e-10)
    assert total_variation(world.reference, expected) > 1e-2
    found = minimum(world, objective)
    assert total_variation(found, expected) < 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # small probabilities count too


def tilted(world: World, tilt: Tensor) -> Tensor:
    """Return ``ref * exp(tilt) / Z`` as log-probs."""
    return (world.reference + tilt).log_softmax(0)


def normalised_by(shifted: Callable[[float], Tensor], low: float, high: float) -> Tensor:
    """Return ``shifted(k)`` for the one ``k`` at which it is a distribution; it rises with ``k``."""
    k = brentq(lambda k: float(shifted(k).logsumexp(0)), low, high, xtol=1e-14, rtol=1e-14)
    return shifted(float(k))
