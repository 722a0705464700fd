"""The table of objectives, and the record that stands on each of its functions.

An objective is a pure function from a record of statistics and keyword-only hyperparameters to
losses ``[batch]``. The decorator says what it needs; hyperparameters, defaults and legal ranges
are read from the signature, so each stands in one place only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_type_hints

from torch import Tensor

from lora_dpo.errors import ConfigError, nearest
from lora_dpo.stats import PairStats

OBJECTIVES: dict[str, Objective] = {}


@dataclass(frozen=True)
class Interval:
    """The legal values of a hyperparameter."""

    above: float = -math.inf
    below: float = math.inf
    includes_lower: bool = False

    def __contains__(self, value: float) -> bool:
        low = value >= self.above if self.includes_lower else value > self.above
        return low and value < self.below

    def __str__(self) -> str:
        return f"{'[' if self.includes_lower else '('}{self.above:g}, {self.below:g})"


Positive = Annotated[float, Interval(above=0.0)]
Smoothing = Annotated[float, Interval(above=0.0, below=0.5, includes_lower=True)]


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword of an objective, as its signature states it."""

    name: str
    default: float
    interval: Interval


Loss = Callable[..., Tensor]
Rewards = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """One row of the table.

    Args:
        name: the name in configs, commands, metrics and documents.
        loss: the function; called with a stats record and keyword-only hyperparameters.
        rewards: the objective's own implicit rewards, ``(chosen [batch], rejected [batch])``.
        data: ``paired`` or ``unpaired`` rows.
        reference: whether it reads the reference; if not, the reference never runs.
        logps: whether it reads summed or per-token mean log-probs.
        couples_rows: whether a row's loss depends on the other rows of the batch.
        monotone: whether the loss never rises when the chosen log-prob does.
        extremes: what the loss does as the margin goes to minus infinity.
        paper: title and year; ``arxiv``: identifier; ``equation``: where in the paper.
    """

    name: str
    loss: Loss
    rewards: Rewards
    data: Literal["paired", "unpaired"]
    reference: bool
    logps: Literal["sum", "mean"]
    couples_rows: bool
    monotone: bool
    extremes: Literal["linear", "bounded", "quadratic"]
    paper: str
    arxiv: str
    equation: str
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.loss) or "").split("\n", 1)[0]

    @property
    def documentation(self) -> str:
        """The function's docstring: formula, hyperparameters, limits, source."""
        return inspect.getdoc(self.loss) or ""

    def bind(self, **given: float) -> BoundObjective:
        """Return the objective with its hyperparameters fixed.

        Raises:
            ConfigError: a hyperparameter that this objective does not have, or outside its range.
        """
        problems = [problem for key, value in given.items() if (problem := self._check(key, value))]
        if problems:
            raise ConfigError(problems)
        values = {key: float(given.get(key, h.default)) for key, h in self.hyperparameters.items()}
        return BoundObjective(self, values)

    def _check(self, key: str, value: object) -> str | None:
        known = self.hyperparameters.get(key)
        if known is None:
            takes = ", ".join(self.hyperparameters) or "none"
            owners = [o.name for o in OBJECTIVES.values() if key in o.hyperparameters]
            whose = (
                f" ({', '.join(owners)} does.)" if owners else nearest(key, self.hyperparameters)
            )
            return f"objective.{key}: {self.name!r} has no such hyperparameter; it takes {takes}.{whose}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"objective.{key}: got {value!r}; {self.name!r} expects a number in {known.interval}."
        if value not in known.interval:
            return f"objective.{key}: got {value:g}; {self.name!r} expects a number in {known.interval}."
        return None


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its hyperparameters: call it on a record to get losses ``[batch]``."""

    objective: Objective
    hyperparameters: Mapping[str, float]

    def __call__(self, stats: PairStats) -> Tensor:
        return self.objective.loss(stats, **self.hyperparameters)

    def rewards(self, stats: PairStats) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards ``(chosen [batch], rejected [batch])``."""
        return self.objective.rewards(stats, **self.hyperparameters)

    @property
    def name(self) -> str:
        """The objective's name."""
        return self.objective.name

    def __str__(self) -> str:
        values = ", ".join(f"{key}={value:g}" for key, value in self.hyperparameters.items())
        return f"{self.name}({values})"


def objective(
    *,
    rewards: Rewards,
    data: Literal["paired", "unpaired"],
    reference: bool,
    logps: Literal["sum", "mean"],
    monotone: bool,
    extremes: Literal["linear", "bounded", "quadratic"],
    paper: str,
    arxiv: str,
    equation: str,
    couples_rows: bool = False,
) -> Callable[[Loss], Loss]:
    """Enter a function into the table under its own name; see ``Objective`` for the arguments.

    The function comes back unchanged. Users register their own with the same decorator.

    Raises:
        ValueError: a name that is taken, or a hyperparameter without keyword, default or range.
    """

    def enter(loss: Loss) -> Loss:
        name = loss.__name__
        if name in OBJECTIVES and OBJECTIVES[name].loss.__module__ != loss.__module__:
            raise ValueError(f"objective {name!r}: the name is taken by {OBJECTIVES[name].loss}.")
        OBJECTIVES[name] = Objective(
            name=name,
            loss=loss,
            rewards=rewards,
            data=data,
            reference=reference,
            logps=logps,
            couples_rows=couples_rows,
            monotone=monotone,
            extremes=extremes,
            paper=paper,
            arxiv=arxiv,
            equation=equation,
            hyperparameters=_read_hyperparameters(loss),
        )
        return loss

    return enter


def get(name: str) -> Objective:
    """Return the row of the table, or a ``ConfigError`` that names the nearest one."""
    if name not in OBJECTIVES:
        legal = ", ".join(sorted(OBJECTIVES))
        raise ConfigError(
            f"objective.name: {name!r} is not in the table; it holds {legal}."
            f"{nearest(name, OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def _read_hyperparameters(loss: Loss) -> dict[str, Hyperparameter]:
    hints = get_type_hints(loss, include_extras=True)
    found = {}
    for parameter in list(inspect.signature(loss).parameters.values())[1:]:
        intervals = [m for m in get_args(hints[parameter.name]) if isinstance(m, Interval)]
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise ValueError(
                f"objective {loss.__name__!r}: {parameter.name} needs keyword and default."
            )
        if not intervals:
            raise ValueError(f"objective {loss.__name__!r}: {parameter.name} states no interval.")
        default: Any = parameter.default
        found[parameter.name] = Hyperparameter(parameter.name, float(default), intervals[0])
    return found
