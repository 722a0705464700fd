"""What a diagnostic says: whether it found its failure, what it measured, and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lora_dpo.showing import Told
from lora_dpo.store import read_json, write_json

State = Literal["found", "not found", "not measured"]


@dataclass(frozen=True)
class Finding:
    """One diagnostic's answer.

    Args:
        name: of the failure.
        state: whether it is there; ``not measured`` says in ``what`` why not.
        what: one sentence on what was measured.
        why: why it matters.
        remedies: what to change, an objective or a setting by its name.
        measured: the numbers, by name; units are in the names or in ``what``.
        rows: rows of the data that it is about, as ``file:row``.
    """

    name: str
    state: State
    what: str
    why: str
    remedies: tuple[str, ...]
    measured: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the failure is there."""
        return self.state == "found"

    def lines(self) -> list[str]:
        """Return the finding for people; remedies only where there is something to mend."""
        mark = {"found": "FOUND", "not found": "ok", "not measured": "-"}[self.state]
        lines = [f"{mark:<5}  {self.name}: {self.what}"]
        if self.found:
            lines.append(f"       why it matters: {self.why}")
            lines += [f"       try: {remedy}" for remedy in self.remedies]
            lines += [f"       row: {row}" for row in self.rows[:5]]
            if len(self.rows) > 5:
                lines.append(f"       ... and {len(self.rows) - 5} more rows in diagnostics.json")
        return lines


@dataclass(frozen=True, repr=False)
class Diagnosis(Told):
    """The findings of one run, or of data before any training."""

    subject: str
    findings: tuple[Finding, ...]

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    @property
    def title(self) -> str:
        """Of what, and what was found."""
        found = [finding.name for finding in self.findings if finding.state == "found"]
        return f"{self.subject}: {', '.join(found) or 'nothing'} found"

    def lines(self) -> list[str]:
        """Return the diagnosis for people, what was found first."""
        order: Sequence[State] = ("found", "not found", "not measured")
        ordered = sorted(self.findings, key=lambda finding: order.index(finding.state))
        return [f"diagnosis of {self.subject}", *(line for f in ordered for line in f.lines())]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"subject": self.subject, "findings": [asdict(f) for f in self.findings]}

    def write(self, path: Any) -> None:
        """Write the diagnosis as JSON."""
        values = self.to_dict()
        for finding in values["findings"]:
            measured = finding["measured"].items()
            finding["measured"] = {k: v if math.isfinite(v) else None for k, v in measured}
        write_json(path, values)

    @classmethod
    def read(cls, path: Any) -> Diagnosis:
        """Read what ``write`` wrote."""
        values = read_json(path)
        findings = [
            Finding(
                **{
                    **item,
                    "remedies": tuple(item["remedies"]),
                    "rows": tuple(item["rows"]),
                    "measured": {
                        k: math.nan if v is None else v for k, v in item["measured"].items()
                    },
                }
            )
            for item in values["findings"]
        ]
        return cls(values["subject"], tuple(findings))


@dataclass(frozen=True)
class Failure:
    """What is known of a failure before anything is measured."""

    name: str
    why: str
    remedies: tuple[str, ...]

    def __call__(
        self, found: bool, what: str, measured: Mapping[str, float], rows: Sequence[str] = ()
    ) -> Finding:
        """Return the finding."""
        state: State = "found" if found else "not found"
        numbers = {key: float(value) for key, value in measured.items()}
        return Finding(self.name, state, what, self.why, self.remedies, numbers, tuple(rows))

    def not_measured(self, reason: str) -> Finding:
        """Return that it could not be told, and why."""
        what = f"not measured: {reason}"
        return Finding(self.name, "not measured", what, self.why, self.remedies)
