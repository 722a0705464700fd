"""What a person has answered, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from rich.console import RenderableType

from lora_dpo.showing import Displayed, said


@dataclass(frozen=True, repr=False)
class Labels(Displayed):
    """The answers of a labelling session. ``print(labels)``; in a notebook, its name alone.

    Args:
        mode: ``pairs`` or ``thumbs``.
        to: the file of preferences, for training.
        journal: the file of answers, from which a later session goes on.
        questions: how many there are.
        choices: how often each answer was given: left, right, tie and skip, or up, down and skip.
        written: rows in the file of preferences; ties and skipped ones are not among them.
        wins: for each source that the data name (``policy`` and ``reference``, or ``chosen`` and
            ``rejected``): how often it was preferred, a tie counting half (or got a thumb up), and
            of how many. Empty where the data name none.
        left_out: what was not asked, and how often.
    """

    mode: Literal["pairs", "thumbs"]
    to: str
    journal: str
    questions: int
    choices: Mapping[str, int]
    written: int
    wins: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    template: ClassVar[str] = "lines"

    @property
    def title(self) -> str:
        """The page's."""
        return "lora-dpo label"

    @property
    def answered(self) -> int:
        """Questions with an answer, skipped ones among them."""
        return sum(self.choices.values())

    def __repr__(self) -> str:
        given = ", ".join(f"{count} {name}" for name, count in self.choices.items())
        return f"Labels({self.answered} of {self.questions} {self.mode} answered: {given})"

    def lines(self) -> list[str]:
        """Return the counts for people."""
        given = ", ".join(f"{count} {name}" for name, count in self.choices.items())
        lines = [f"{self.answered} of {self.questions} answered: {given}"]
        lines += [f"{count} {what}" for what, count in self.left_out.items()]
        verb = "preferred" if self.mode == "pairs" else "liked"
        lines += [f"{name} {verb} {won:g} of {of}" for name, (won, of) in self.wins.items()]
        if ties := self.choices.get("tie", 0):
            lines.append(f"{ties} ties are kept with the answers, and make no pair")
        lines.append(f"{self.written} rows in {self.to}" if self.written else "no preferences yet")
        if self.answered < self.questions:
            lines.append(f"go on later: every answer is kept in {self.journal}")
        return lines

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        return [said(line) for line in self.lines()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
