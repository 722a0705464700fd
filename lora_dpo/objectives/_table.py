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
from lora_dpo.objectives.bound import BoundObjective, Data, State, Term
from lora_dpo.stats import LABELLED_NEEDS, PAIR_NEEDS

OBJECTIVES: dict[str, Objective] = {}

Loss = Callable[..., Tensor]
Rewards = Callable[..., tuple[Tensor, ...]]
Update = Callable[..., State]
Extremes = Literal["linear", "bounded", "quadratic", "logarithmic", "exponential"]


@dataclass(frozen=True)
class Interval:
    """The legal values of a hyperparameter."""

    above: float = -math.inf
    below: float = math.inf
    includes_lower: bool = False
    includes_upper: bool = False

    def __contains__(self, value: float) -> bool:
        low = value >= self.above if self.includes_lower else value > self.above
        high = value <= self.below if self.includes_upper else value < self.below
        return low and high

    def __str__(self) -> str:
        left, right = "[" if self.includes_lower else "(", "]" if self.includes_upper else ")"
        return f"{left}{self.above:g}, {self.below:g}{right}"


Number = Annotated[float, Interval()]
Positive = Annotated[float, Interval(above=0.0)]
NonNegative = Annotated[float, Interval(above=0.0, includes_lower=True)]
Share = Annotated[float, Interval(above=0.0, below=1.0, includes_lower=True, includes_upper=True)]
Smoothing = Annotated[float, Interval(above=0.0, below=0.5, includes_lower=True)]


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword of an objective, as its signature states it; a switch has no interval."""

    name: str
    default: float | bool
    interval: Interval | None

    @property
    def expected(self) -> str:
        """What a legal value is, in words."""
        return f"a number in {self.interval}" if self.interval else "true or false"

    def accepts(self, value: object) -> bool:
        """Whether a value is of the right type and range."""
        if self.interval is None:
            return isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return math.isfinite(value) and value in self.interval


NLL_WEIGHT = Hyperparameter("nll_weight", 0.0, Interval(above=0.0, includes_lower=True))


@dataclass(frozen=True)
class Objective:
    """One row of the table.

    Args:
        name: the name in configs, commands, metrics and documents.
        loss: the function; called with a stats record (and its state, if it has one) and
            keyword-only hyperparameters.
        rewards: the objective's own implicit rewards: ``(chosen, rejected)`` of pairs, ``(reward,)``
            of labelled rows, each ``[batch]``.
        data: ``paired`` rows, ``unpaired`` ones with a label, or ``demonstrations``: single answers that
            are all wanted.
        reference: whether it reads the reference; if not, the reference never runs.
        logps: whether it reads summed or per-token mean log-probs.
        needs: statistics beyond log-probs that it reads; ``stats.PAIR_NEEDS`` lists them.
        reduction: the mean that the paper takes: over rows, or over completion tokens (then a row
            counts by its length).
        couples_rows: whether a row's loss depends on the other rows of the batch.
        monotone: whether the loss never rises when the chosen (wanted) log-prob does.
        extremes: how the mean loss of a batch grows as the margin of one row goes to minus infinity.
        smooth: whether the loss has a derivative everywhere.
        initial_state: what it remembers between steps, at the start; empty for most.
        update: ``(state, stats, **hyperparameters) -> state`` after each optimiser step.
        nll_weight: default weight of the SFT term that any paired objective takes; None where the
            loss has such a term of its own.
        paper: title and year; ``arxiv``: identifier; ``equation``: where in the paper.
    """

    name: str
    loss: Loss
    rewards: Rewards
    data: Data
    reference: bool
    logps: Literal["sum", "mean"]
    monotone: bool
    extremes: Extremes
    paper: str
    arxiv: str
    equation: str
    needs: tuple[str, ...] = ()
    reduction: Literal["rows", "tokens"] = "rows"
    couples_rows: bool = False
    smooth: bool = True
    initial_state: Mapping[str, float] = field(default_factory=dict)
    update: Update | None = None
    nll_weight: float | None = None
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.loss) or "").split("\n", 1)[0]

    @property
    def documentation(self) -> str:
        """The function's docstring: formula, hyperparameters, limits, source."""
        return inspect.getdoc(self.loss) or ""

    @property
    def reads_lengths(self) -> bool:
        """Whether the numbers of tokens matter, beside the log-probs."""
        return self.logps == "mean" or "lengths" in self.needs

    def bind(self, /, **given: float | bool) -> BoundObjective:
        """Return the objective with its hyperparameters fixed.

        ``nll_weight``, which any paired objective takes, adds that much of the SFT loss on the
        chosen side (RPO, arXiv:2404.19733).

        Raises:
            ConfigError: a hyperparameter that this objective does not have, or outside its range.
        """
        problems = [problem for key, value in given.items() if (problem := self._check(key, value))]
        if problems:
            raise ConfigError(problems)
        values = {
            key: given.get(key, h.default)
            if h.interval is None
            else float(given.get(key, h.default))
            for key, h in self.hyperparameters.items()
        }
        terms = [Term(1.0, self, values)]
        if weight := given.get("nll_weight", self.nll_weight or 0.0) * (
            self.nll_weight is not None
        ):
            terms.append(Term(float(weight), get("sft"), {}))
        return BoundObjective(tuple(terms), frozenset(given))

    def _check(self, key: str, value: object) -> str | None:
        accepted = dict(self.hyperparameters)
        if self.nll_weight is not None:
            accepted[NLL_WEIGHT.name] = NLL_WEIGHT
        known = accepted.get(key)
        if known is None:
            takes = ", ".join(accepted) or "none"
            owners = [o.name for o in OBJECTIVES.values() if key in o.hyperparameters]
            verb = "does" if len(owners) == 1 else "do"
            whose = f" ({', '.join(owners[:4])} {verb}.)" if owners else nearest(key, accepted)
            return f"objective.{key}: {self.name!r} has no such hyperparameter; it takes {takes}.{whose}"
        if not known.accepts(value):
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            return f"objective.{key}: got {shown}; {self.name!r} expects {known.expected}."
        return None


def objective(
    *,
    rewards: Rewards,
    data: Data,
    reference: bool,
    logps: Literal["sum", "mean"],
    monotone: bool,
    extremes: Extremes,
    paper: str,
    arxiv: str,
    equation: str,
    needs: tuple[str, ...] = (),
    reduction: Literal["rows", "tokens"] = "rows",
    couples_rows: bool = False,
    smooth: bool = True,
    initial_state: Mapping[str, float] | None = None,
    update: Update | None = None,
    nll_weight: float | None = 0.0,
) -> Callable[[Loss], Loss]:
    """Enter a function into the table under its own name; see ``Objective`` for the arguments.

    The function comes back unchanged. Users register their own with the same decorator.

    Raises:
        ValueError: a name that is taken, a need that no record has, a state without update, or a
            hyperparameter without keyword, default or range.
    """
    facts = {key: value for key, value in locals().items() if key != "initial_state"}

    def enter(loss: Loss) -> Loss:
        name = loss.__name__
        if name in OBJECTIVES and OBJECTIVES[name].loss.__module__ != loss.__module__:
            raise ValueError(f"objective {name!r}: the name is taken by {OBJECTIVES[name].loss}.")
        legal = PAIR_NEEDS if data == "paired" else LABELLED_NEEDS
        if unknown := [need for need in needs if need not in legal]:
            raise ValueError(f"objective {name!r}: needs {unknown}; expected among {list(legal)}.")
        if (initial_state is None) != (update is None):
            raise ValueError(
                f"objective {name!r}: a state has initial_state and update, or neither."
            )
        found = _read_hyperparameters(loss, skip=1 if initial_state is None else 2)
        own = {"nll_weight": None} if data != "paired" or "nll_weight" in found else {}
        OBJECTIVES[name] = Objective(
            name=name,
            loss=loss,
            hyperparameters=found,
            initial_state=dict(initial_state or {}),
            **{**facts, **own},
        )
        return loss

    return enter


def get(name: str) -> Objective:
    """Return the row of the table, or a ``ConfigError`` that names the nearest one."""
    if name not in OBJECTIVES:
        legal = ", ".join(sorted(OBJECTIVES))
        raise ConfigError(
            f"objective.name: {name[:200]!r} is not in the table; it holds {legal}."
            f"{nearest(name, OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def build(values: Mapping[str, Any]) -> BoundObjective:
    """Return the objective that a config's section describes: one name, or a weighted mixture.

    Args:
        values: ``{"name": "dpo", "beta": 0.1}``, or ``{"name": "mixture", "terms": [{"name": "dpo",
            "weight": 0.8, "beta": 0.1}, ...]}``.

    Raises:
        ConfigError: with a sentence for every problem.
    """
    further = {key: value for key, value in values.items() if key != "name"}
    name = values.get("name", "dpo")
    if name != "mixture":
        return get(str(name)).bind(**further)
    terms = further.pop("terms", None)
    if further or not isinstance(terms, (list, tuple)) or not terms:
        raise ConfigError(
            "objective: a mixture takes 'terms' alone, a list such as [{name: dpo, weight: 0.8}, "
            f"{{name: sft, weight: 1.0}}]; got {', '.join(map(str, values))[:200]}."
        )
    problems, parts = [], []
    for number, term in enumerate(terms):
        where = f"objective.terms.{number}"
        if not isinstance(term, Mapping) or not {"name", "weight"} <= set(term):
            problems.append(
                f"{where}: got {repr(term)[:200]}; expected a mapping with name and weight."
            )
            continue
        rest = {k: v for k, v in term.items() if k not in ("name", "weight")}
        try:
            parts.append((term["weight"], get(str(term["name"])).bind(**rest)))
        except ConfigError as error:
            problems += [problem.replace("objective", where, 1) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return mixture(parts)


def mixture(parts: list[tuple[float, BoundObjective]]) -> BoundObjective:
    """Return ``sum_k weight_k * objective_k`` (MPO, arXiv:2411.10442); rewards are the first one's.

    Args:
        parts: weights, positive, and objectives with their hyperparameters fixed, all on the same
            kind of data.

    Raises:
        ConfigError: no part, a weight that is not positive, or paired and unpaired objectives.
    """
    problems = []
    if not parts:
        problems.append("objective: a mixture needs at least one term.")
    for weight, part in parts:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight > 0):
            problems.append(
                f"objective.terms: weight of {part.name} is {weight!r}; expected a number above 0."
            )
    if len({part.data for _, part in parts}) > 1:
        kinds = ", ".join(f"{part.name} ({part.data})" for _, part in parts)
        problems.append(f"objective.terms: all terms need the same kind of data; got {kinds}.")
    if problems:
        raise ConfigError(problems)
    terms = [
        Term(weight * term.weight, term.objective, term.hyperparameters)
        for weight, part in parts
        for term in part.terms
    ]
    return BoundObjective(tuple(terms), frozenset(key for _, part in parts for key in part.given))


def _read_hyperparameters(loss: Loss, skip: int) -> dict[str, Hyperparameter]:
    hints = get_type_hints(loss, include_extras=True)
    found = {}
    for parameter in list(inspect.signature(loss).parameters.values())[skip:]:
        name, hint = parameter.name, hints[parameter.name]
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise ValueError(f"objective {loss.__name__!r}: {name} needs keyword and default.")
        intervals = [m for m in get_args(hint) if isinstance(m, Interval)]
        if not intervals and hint is not bool:
            raise ValueError(f"objective {loss.__name__!r}: {name} states no interval.")
        default: Any = parameter.default if hint is bool else float(parameter.default)
        found[name] = Hyperparameter(name, default, intervals[0] if intervals else None)
    return found
