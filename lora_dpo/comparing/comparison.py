"""What a comparison found, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import RenderableType
from rich.table import Table

from lora_dpo.comparing.measures import LABELS, SHARES, WINS, Measured
from lora_dpo.evaluation import Estimate
from lora_dpo.showing import Displayed, hanging, said

FIRST_SHOWN = 3
EVEN = 0.5
Cells = tuple[str, str, str]  # value, change, p value; empty where there is none


@dataclass(frozen=True)
class ModelFigures:
    """One model of a comparison.

    Args:
        name: for people.
        run: its folder; empty for the reference.
        rule: what its implicit reward is; empty for the reference.
        measures: by the names of ``measures.LABELS``.
        notes: what else is to be known, as on the judge.
    """

    name: str
    run: str
    rule: str
    measures: Mapping[str, Measured]
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> Measured:
        return self.measures[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "run": self.run,
            "rule": self.rule,
            "measures": {name: found.to_dict() for name, found in self.measures.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class AnswerRow:
    """A prompt and each model's answer to it, by name."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True, repr=False)
class Comparison(Displayed):
    """Policies beside their reference. ``print(comparison)``; in a notebook, its name alone.

    Args:
        models: the reference first.
        answers: prompt by prompt, sample by sample.
        prompts: distinct ones; intervals and tests are by prompt.
        samples: answers a prompt of each model.
        max_new_tokens: longest answer.
        seed: of the random numbers, the same for all models.
        judge: who it was; None where nobody was asked.
    """

    models: tuple[ModelFigures, ...]
    answers: tuple[AnswerRow, ...]
    prompts: int
    samples: int
    max_new_tokens: int
    seed: int
    judge: str | None = None

    template: ClassVar[str] = "comparison"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo compare: {', '.join(model.name for model in self.models)}"

    @property
    def policies(self) -> tuple[ModelFigures, ...]:
        """All models but the reference."""
        return self.models[1:]

    def __getitem__(self, name: str) -> ModelFigures:
        return next(model for model in self.models if model.name == name)

    def __repr__(self) -> str:
        found = [f"{m.name} wins {m['reward_wins'].value.mean:.3g}" for m in self.policies]
        return (
            f"Comparison({self.prompts} prompts, {self.samples} samples each; {', '.join(found)} by "
            "implicit reward)"
        )

    def heading(self) -> str:
        """Say what was done in one sentence."""
        each = "1 answer" if self.samples == 1 else f"{self.samples} answers"
        return (
            f"{self.prompts} prompts, {each} a prompt of each model at temperature 1, at most "
            f"{self.max_new_tokens} tokens, the same random numbers (seed {self.seed}); mean and 95\u00a0% "
            "interval by prompt"
        )

    def rows(self) -> list[tuple[str, list[Cells]]]:
        """Return the table: of each figure its name, and the cells of each model."""
        names = [name for name in LABELS if any(name in model.measures for model in self.models)]
        return [
            (
                ", ".join(LABELS[name]),
                [
                    _cells(name, model.measures[name]) if name in model.measures else ("", "", "")
                    for model in self.models
                ],
            )
            for name in names
        ]

    def findings(self) -> list[str]:
        """Return what differs from the reference beyond chance, a sentence each, with its test."""
        found = []
        for model in self.policies:
            changed = [
                _sentence(model.name, name, measured)
                for name, measured in model.measures.items()
                if measured.p_value is not None and measured.p_value < 0.05
            ]
            found += changed or [
                f"{model.name}: no figure differs beyond chance (all p above 0.05)"
            ]
        return found

    def tests(self) -> list[str]:
        """Return which test was made of which figure, in words."""
        by_test: dict[str, list[str]] = {}
        for model in self.policies:
            for name, measured in model.measures.items():
                names = by_test.setdefault(measured.test, [])
                if measured.test and LABELS[name][0] not in names:
                    names.append(LABELS[name][0])
        lines = [f"{test}: {', '.join(names)}" for test, names in by_test.items() if test]
        return [*lines, "p values are two-sided and not corrected for how many figures there are"]

    def notes(self) -> list[str]:
        """Return what else is to be known of each model."""
        rules = [f"{m.name}: implicit reward {m.rule}" for m in self.policies]
        if self.policies:
            rules.append(
                "reward win rate: the model judges itself, and a policy's own samples are above half "
                "as soon as it has moved; a judge, or a reward from elsewhere, is evidence"
            )
        return rules + [f"{m.name}: {note}" for m in self.policies for note in m.notes]

    def terminal(self) -> list[RenderableType]:
        """Return what is printed: answers first, and the figures where a terminal stops."""
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for model in self.models:
            table.add_column(said(model.name), justify="right")
        for label, cells in self.rows():
            for name, lines in zip(
                (label, "  change", "  p"), zip(*cells, strict=True), strict=True
            ):
                if any(lines):
                    style = "" if name == label else "dim"
                    table.add_row(said(name, style), *(said(cell, style) for cell in lines))
        parts: list[RenderableType] = []
        width = max(len(model.name) for model in self.models) + 2
        for row in self.answers[: FIRST_SHOWN * self.samples : self.samples]:
            parts += [hanging(f"{'prompt':<{width}}{row.prompt}", width, "bold")]
            parts += [hanging(f"{name:<{width}}{text}", width) for name, text in row.texts.items()]
            parts.append(said(""))
        parts += [said(self.heading(), "bold"), table, said("")]
        parts += [hanging(line, 2) for line in self.findings()]
        return parts + [hanging(line, 2, "dim") for line in (*self.tests(), *self.notes())]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "judge": self.judge,
            "models": [model.to_dict() for model in self.models],
            "findings": self.findings(),
            "tests": self.tests(),
            "answers": [{"prompt": row.prompt, "texts": dict(row.texts)} for row in self.answers],
        }


def _cells(name: str, measured: Measured) -> Cells:
    change = _estimate(name, measured.change, sign=True) if measured.change else ""
    p_value = _p(measured.p_value) if measured.p_value is not None else ""
    return _estimate(name, measured.value), change, p_value


def _sentence(model: str, name: str, measured: Measured) -> str:
    label, unit = LABELS[name]
    assert measured.p_value is not None
    if name in WINS:
        better = "more" if measured.value.mean > EVEN else "less"
        said_of = f"{_estimate(name, measured.value)}, {better} than half"
    else:
        assert measured.change is not None
        direction = "higher" if measured.change.mean > 0 else "lower"
        said_of = f"{direction} by {_estimate(name, measured.change, sign=True)} {unit}"
    return f"{model}: {label} {said_of} (p {_p(measured.p_value)})"


def _estimate(name: str, estimate: Estimate, *, sign: bool = False) -> str:
    if math.isnan(estimate.mean):
        return "none"
    digits = ".3f" if name in SHARES | WINS | {"distinct"} else ".2f" if name == "kl" else ".1f"
    plus = "+" if sign else ""
    if not math.isfinite(estimate.low):
        return f"{estimate.mean:{plus}{digits}}"
    return (
        f"{estimate.mean:{plus}{digits}} [{estimate.low:{plus}{digits}}, "
        f"{estimate.high:{plus}{digits}}]"
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"
