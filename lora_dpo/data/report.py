"""What became of every row: nothing is dropped, cut or changed without standing in a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_dpo.data.records import Origin
from lora_dpo.showing import visible

GROUPS = ("dropped", "truncated", "repaired", "noted")
MOST_EXAMPLES = 5
EXCERPT = 80


@dataclass(frozen=True)
class Example:
    """One row that a reason applies to, with a short excerpt of it."""

    origin: str
    detail: str = ""


@dataclass
class Entry:
    """How often one reason applied, and to which rows first."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass
class DataReport:
    """Counts per (stage, reason); a reason reads ``"dropped: chosen and rejected are identical"``.

    ``read`` is the number of rows that came in, ``added`` the net number that weights and the
    conversion of pairs added (negative for weights below 1), so that always
    ``rows kept == read - dropped + added``.
    """

    stage: str = "loading"
    read: int = 0
    added: int = 0
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def add(self, reason: str, origin: Origin | None, detail: str = "", count: int = 1) -> None:
        """Count one row (or ``count`` rows) under a reason that begins with its group."""
        if reason.partition(":")[0] not in GROUPS:
            raise ValueError(f"{reason!r} must begin with one of {', '.join(GROUPS)} and a colon")
        entry = self.entries.setdefault((self.stage, reason), Entry())
        entry.count += count
        if len(entry.examples) < MOST_EXAMPLES:
            entry.examples.append(Example(str(origin) if origin else "", excerpt(detail)))

    def merge(self, other: DataReport) -> None:
        """Add another report's counts; ``read`` stays this one's if the other is a later stage."""
        for key, theirs in other.entries.items():
            entry = self.entries.setdefault(key, Entry())
            entry.count += theirs.count
            entry.examples = (entry.examples + theirs.examples)[:MOST_EXAMPLES]
        self.added += other.added
        if other.stage == self.stage:
            self.read += other.read

    def count(self, group: str) -> int:
        """Return the total of all reasons of one group."""
        return sum(e.count for (_, reason), e in self.entries.items() if _group(reason) == group)

    @property
    def dropped(self) -> int:
        """How many rows were left out, over all reasons and stages."""
        return self.count("dropped")

    @property
    def truncated(self) -> int:
        """How many rows were cut to fit the length."""
        return self.count("truncated")

    @property
    def repaired(self) -> int:
        """How many times something was put right and kept (a row may be repaired twice)."""
        return self.count("repaired")

    @property
    def noted(self) -> int:
        """How many times something was kept as it is but deserves a look."""
        return self.count("noted")

    def lines(self) -> list[str]:
        """Return the report for printing: a heading, then per group the reasons by count."""
        lines = [
            f"{self.stage}: {self.read} rows read, {self.read - self.dropped + self.added} kept"
        ]
        for group in GROUPS:
            found = [(key, e) for key, e in self.entries.items() if _group(key[1]) == group]
            for (_, reason), entry in sorted(found, key=lambda item: -item[1].count):
                lines.append(f"  {entry.count:>7}  {reason}")
                lines += [f"           {_sentence(example)}" for example in entry.examples[:2]]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values that ``from_dict`` reads back."""
        entries = [
            {
                "stage": stage,
                "reason": reason,
                "count": entry.count,
                "examples": [[example.origin, example.detail] for example in entry.examples],
            }
            for (stage, reason), entry in self.entries.items()
        ]
        return {"stage": self.stage, "read": self.read, "added": self.added, "entries": entries}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """Rebuild a report from ``to_dict``."""
        report = cls(values["stage"], values["read"], values["added"])
        for item in values["entries"]:
            examples = [Example(origin, detail) for origin, detail in item["examples"]]
            report.entries[item["stage"], item["reason"]] = Entry(item["count"], examples)
        return report


def excerpt(text: str, length: int = EXCERPT) -> str:
    """Return one line of some ``length`` characters, in which control characters can be seen."""
    line = " ".join(text[: 20 * length].split())
    cut = len(line) > length or len(text) > 20 * length
    return visible(line[: length - 3] + "..." if cut else line)


def _group(reason: str) -> str:
    return reason.partition(":")[0]


def _sentence(example: Example) -> str:
    return f"{example.origin}: {example.detail}" if example.detail else example.origin
