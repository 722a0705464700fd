"""What an inspection found, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rich.console import RenderableType

from lora_dpo.data import Lengths, Summary
from lora_dpo.diagnostics.findings import Finding
from lora_dpo.inspecting.measures import Count, Histogram, Readiness, Work
from lora_dpo.inspecting.tokens import ShownRow
from lora_dpo.showing import Displayed


@dataclass(frozen=True, repr=False)
class Inspection(Displayed):
    """Preferences as they will be trained on. ``print(inspection)``; in a notebook, its name alone.

    Args:
        subject: what was looked at.
        base: the model whose tokenizer was used.
        kind: ``paired``, ``unpaired`` or ``demonstrations``.
        shape: the recognised format.
        why: the columns that decided.
        read: rows of the files.
        kept: rows that would be trained on.
        counts: every reason for which rows were dropped, truncated, repaired or noted.
        totals: rows dropped and truncated; of the dropped ones the duplicate, empty, identical ones;
            and those that leak, None where that was not looked for.
        rows: the first ones, token by token.
        lengths: quantiles of tokens.
        histogram: of tokens.
        work: tokens by layout.
        readiness: of the base; None where its weights were not loaded.
        findings: advice, as in ``lora_dpo.diagnostics``.
        max_length: that rows were fitted to.
        show_ids: whether token ids are shown beside the tokens.
    """

    subject: str
    base: str
    kind: str
    shape: str
    why: str
    read: int
    kept: int
    counts: tuple[Count, ...]
    totals: Mapping[str, int | None]
    rows: tuple[ShownRow, ...]
    lengths: Summary
    histogram: Histogram
    work: Work
    readiness: Readiness | None
    findings: tuple[Finding, ...]
    max_length: int
    show_ids: bool = False

    template: ClassVar[str] = "inspection"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo inspect: {self.subject}"

    @property
    def ready(self) -> bool | None:
        """Whether the base is fit for preference tuning on these rows; None: not measured."""
        states = [self[name].state for name in ("unlikely answers", "answers without an end")]
        return None if "not measured" in states else "found" not in states

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def __repr__(self) -> str:
        found = [finding.name for finding in self.findings if finding.found]
        return (
            f"Inspection({self.kept} of {self.read} {self.kind} rows kept, at most "
            f"{self.lengths.total.max} tokens, found: {', '.join(found) or 'nothing to mend'})"
        )

    def length_rows(self) -> list[tuple[str, Lengths]]:
        """Return the table of lengths by row."""
        lengths = self.lengths
        ends = [("total", lengths.total), ("before max_length", lengths.before)]
        return [("prompt", lengths.prompt), *lengths.answers.items(), *ends]

    def work_in_words(self) -> str:
        """Return what laying rows flat saves, for people."""
        work = self.work
        whole = (
            f"{work.padded} tokens padded (a row a micro-batch), {work.flat} laid flat: "
            f"{work.saved:.1%} saved"
        )
        if self.kind != "paired":
            return whole
        return f"{whole}; {work.saved_by_sharing:.1%} by what both answers share, prompts above all"

    def verdict(self) -> str:
        """Return the base's readiness in one sentence."""
        if self.ready is None:
            return "readiness of the base: not measured"
        if self.ready:
            return "readiness of the base: ready, preference tuning can start from it"
        return "readiness of the base: not ready; see the advice above"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        from lora_dpo.inspecting.printing import printed

        return printed(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {name: getattr(self, name) for name in _PLAIN}
        return {
            **values,
            "totals": dict(self.totals),
            "counts": [asdict(count) for count in self.counts],
            "rows": [asdict(row) for row in self.rows],
            "lengths": self.lengths.to_dict(),
            "histogram": asdict(self.histogram),
            "work": {
                **asdict(self.work),
                "saved": self.work.saved,
                "saved_by_sharing": self.work.saved_by_sharing,
            },
            "readiness": self.readiness.to_dict() if self.readiness else None,
            "ready": self.ready,
            "findings": [_finding(finding) for finding in self.findings],
        }


_PLAIN = ("subject", "base", "kind", "shape", "why", "read", "kept", "max_length")


def _finding(finding: Finding) -> dict[str, Any]:
    measured = {k: v if math.isfinite(v) else None for k, v in finding.measured.items()}
    return {**asdict(finding), "measured": measured}
