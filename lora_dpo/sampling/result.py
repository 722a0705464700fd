"""What was drawn and how it was scored, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rich.console import RenderableType

from lora_dpo.labelling import Labels
from lora_dpo.showing import Displayed, said


@dataclass(frozen=True, repr=False)
class Samples(Displayed):
    """Completions of a policy in a file. ``print(samples)``; in a notebook, its name alone.

    Args:
        policy: that they were drawn from.
        to: the file of rankings: ``prompt``, ``completions`` and, where they were scored, ``scores``.
        prompts: asked.
        drawn: completions, over all prompts.
        written: completions in the file.
        rows: prompts in the file.
        left_out: what is not in the file, and how often.
        scored_by: what scored them; None where nothing has.
        best: mean score of the best completion of each prompt in the file; None without scores.
        mean: mean score of all.
        worst: mean score of the worst of each prompt.
        tied: prompts of the file whose completions all have the same score, and so give no pair.
        pairs_to: the file of pairs, if one was asked for.
        pairs: rows in it.
        pairs_left_out: by ``min_margin`` and the like, and how often.
        labels: what a person answered, where one was asked.
        notes: what else there is to know, as of a judge.
    """

    policy: str
    to: str
    prompts: int
    drawn: int
    written: int
    rows: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    scored_by: str | None = None
    best: float | None = None
    mean: float | None = None
    worst: float | None = None
    tied: int = 0
    pairs_to: str | None = None
    pairs: int = 0
    pairs_left_out: Mapping[str, int] = field(default_factory=dict)
    labels: Labels | None = None
    notes: tuple[str, ...] = ()

    template: ClassVar[str] = "lines"

    @property
    def title(self) -> str:
        """The page's."""
        return "lora-dpo sample"

    def __repr__(self) -> str:
        scored = f", scored by {self.scored_by}, {self.tied} tied" if self.scored_by else ""
        return f"Samples({self.written} completions of {self.rows} prompts in {self.to}{scored})"

    def lines(self) -> list[str]:
        """Return the counts for people."""
        lines = [f"{self.drawn} completions of {self.prompts} prompts, drawn from {self.policy}"]
        lines += [f"{count} {what}" for what, count in self.left_out.items()]
        lines.append(f"{self.written} completions of {self.rows} prompts in {self.to}")
        if self.scored_by is not None:
            lines.append(f"scored by {self.scored_by}")
            lines.append(
                f"score: best {self.best:.4g}, mean {self.mean:.4g}, worst {self.worst:.4g}"
            )
            lines.append(f"{self.tied} prompts whose completions all tie, which give no pair")
            lines += self.notes
        elif self.labels is None:
            lines.append(
                f"no scores: judge them by hand with lora-dpo label {self.to}, or give --by"
            )
        if self.pairs_to is not None:
            lines += [f"{count} {what}" for what, count in self.pairs_left_out.items()]
            lines.append(f"{self.pairs} pairs in {self.pairs_to}")
        return [*lines, *(self.labels.lines() if self.labels else [])]

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        return [said(line) for line in self.lines()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
