"""Rows that are longer than the model may see, and how long rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lora_dpo.data.encoding import Encoded
from lora_dpo.data.problems import Problems
from lora_dpo.data.report import DataReport
from lora_dpo.data.vocabulary import Vocabulary

Overflow = Literal["drop", "truncate-prompt", "truncate-completion", "error"]


@dataclass(frozen=True)
class Fitter:
    """Makes rows fit ``max_length`` tokens, or leaves them out; both answers are treated alike."""

    vocabulary: Vocabulary
    max_length: int
    overflow: Overflow
    report: DataReport

    def __call__(self, row: Encoded, problems: Problems) -> Encoded | None:
        """Return a row that fits, or None for one that was dropped or is a problem."""
        if row.length <= self.max_length:
            return row
        detail = f"{row.length} tokens"
        if self.overflow == "error":
            problems.add(
                row.origin,
                f"{row.length} tokens, and max_length is {self.max_length}. Raise max_length, or "
                "set overflow to drop, truncate-prompt or truncate-completion.",
            )
            return None
        if self.overflow == "drop":
            self.report.add("dropped: longer than max_length", row.origin, detail)
            return None
        by_prompt = self.overflow == "truncate-prompt"
        cut = self._cut_prompt(row) if by_prompt else self._cut_answers(row)
        what = "answer" if by_prompt else "prompt"
        if cut is None:
            self.report.add(f"dropped: {what} alone fills max_length", row.origin, detail)
            return None
        if len(cut.answers) == 2 and cut.answers[0] == cut.answers[1]:
            problems.add(
                row.origin,
                f"cut to {self.max_length} tokens, chosen and rejected are identical. Raise "
                "max_length, or set overflow: drop.",
            )
            return None
        self.report.add(f"truncated: {self.overflow.removeprefix('truncate-')}", row.origin, detail)
        return cut

    def _cut_prompt(self, row: Encoded) -> Encoded | None:
        room = self.max_length - max(map(len, row.answers))
        if room < 1:
            return None
        first = row.prompt[:1] if row.prompt[0] == self.vocabulary.bos else []
        tail = row.prompt[len(row.prompt) - (room - len(first)) :]
        return replace(row, prompt=[*first, *tail])

    def _cut_answers(self, row: Encoded) -> Encoded | None:
        room = self.max_length - len(row.prompt)
        # Where one answer loses its stop token the other must too, or the objective would learn
        # to tell them apart by it.
        answers = tuple(ids[:room] if len(ids) > room else ids[:-1] for ids in row.answers)
        return replace(row, answers=answers) if room >= 1 and all(answers) else None


@dataclass(frozen=True)
class Lengths:
    """Quantiles of a number of tokens (nearest rank)."""

    p50: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Lengths:
        """Measure a non-empty list of lengths."""
        ordered = sorted(values)
        p50, p90, p99 = (ordered[-(-len(ordered) * q // 100) - 1] for q in (50, 90, 99))
        return cls(p50, p90, p99, ordered[-1])


@dataclass(frozen=True)
class Summary:
    """Token lengths of the rows kept, and of all rows before ``max_length`` was applied."""

    prompt: Lengths
    answers: Mapping[str, Lengths]
    total: Lengths
    before: Lengths
    chosen_longer: float | None

    @property
    def chosen(self) -> Lengths:
        """Lengths of the chosen answers (of paired data)."""
        return self.answers["chosen"]

    @property
    def rejected(self) -> Lengths:
        """Lengths of the rejected answers (of paired data)."""
        return self.answers["rejected"]

    @property
    def completion(self) -> Lengths:
        """Lengths of the answers of unpaired data."""
        return self.answers["completion"]

    def lines(self) -> list[str]:
        """Return a table for printing."""
        parts = {"prompt": self.prompt, **self.answers, "total": self.total}
        parts["before max_length"] = self.before
        lines = [f"{'tokens':<18}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}"]
        lines += [f"{n:<18}{x.p50:>8}{x.p90:>8}{x.p99:>8}{x.max:>8}" for n, x in parts.items()]
        if self.chosen_longer is not None:
            lines.append(f"chosen is longer in {self.chosen_longer:.0%} of the pairs")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values that ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Summary:
        """Rebuild a summary from ``to_dict``."""
        answers = {name: Lengths(**found) for name, found in values["answers"].items()}
        others = {name: Lengths(**values[name]) for name in ("prompt", "total", "before")}
        return cls(answers=answers, chosen_longer=values["chosen_longer"], **others)


class Measure:
    """Collects lengths while rows are encoded, so that no row is read twice."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.before: list[int] = []
        self.prompts: list[int] = []
        self.answers: list[tuple[int, ...]] = []

    def add(self, row: Encoded) -> None:
        """Count a row that is kept."""
        self.prompts.append(len(row.prompt))
        self.answers.append(tuple(map(len, row.answers)))

    def summary(self) -> Summary:
        """Return the quantiles; at least one row must have been added."""
        columns = list(zip(*self.answers, strict=True))
        totals = [p + max(a) for p, a in zip(self.prompts, self.answers, strict=True)]
        longer = [a[0] > a[1] for a in self.answers if len(a) == 2]
        return Summary(
            prompt=Lengths.of(self.prompts),
            answers={n: Lengths.of(c) for n, c in zip(self.names, columns, strict=True)},
            total=Lengths.of(totals),
            before=Lengths.of(self.before),
            chosen_longer=sum(longer) / len(longer) if longer else None,
        )
