"""What became of the rows of a run, and how long they are: from ``data.json`` and ``lengths.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_dpo.reporting.reading import Recorded
from lora_dpo.reporting.tables import Table, table

GROUPS = ("dropped", "truncated", "repaired", "noted")


@dataclass(frozen=True)
class Reason:
    """Why rows were dropped, truncated, repaired or noted, and where first."""

    text: str
    count: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DataCard:
    """What became of the rows of one part of the data.

    Args:
        part: ``read``, ``train`` or ``held out``.
        rows: in words, read and kept.
        reasons: for all rows that were not simply kept.
        fingerprint: sha256 of the tokens, if it is known.
        lengths: quantiles of tokens.
        histogram: edges, and counts by part of a row.
    """

    part: str
    rows: str
    reasons: tuple[Reason, ...]
    fingerprint: str
    lengths: Table | None
    histogram: tuple[tuple[int, ...], dict[str, tuple[int, ...]]] | None


def data_cards(run: Recorded) -> tuple[DataCard, ...]:
    """Return what became of the run's rows, by part."""
    names = list(dict.fromkeys([*run.data, *run.lengths]))
    return tuple(_data_card(name, run.data.get(name), run.lengths.get(name)) for name in names)


def _data_card(part: str, report: Any, card: Any) -> DataCard:
    reasons: list[Reason] = []
    rows, sha256, lengths, histogram = "", "", None, None
    if report is not None:
        for entry in report["entries"]:
            examples = tuple((str(origin), str(detail)) for origin, detail in entry["examples"])
            reasons.append(Reason(str(entry["reason"]), int(entry["count"]), examples))
        dropped = sum(r.count for r in reasons if r.text.startswith("dropped:"))
        kept = report["read"] - dropped + report["added"]
        rows = f"{report['read']} rows read, {kept} kept"
        counts = {
            group: sum(r.count for r in reasons if r.text.startswith(f"{group}:"))
            for group in GROUPS
        }
        rows += "".join(f", {count} {group}" for group, count in counts.items() if count)
    if card is not None:
        sha256, found = str(card["fingerprint"]), card["histogram"]
        sides = {str(k): tuple(map(int, v)) for k, v in found["counts"].items()}
        histogram = (tuple(map(int, found["edges"])), sides)
        if any(len(bars) != len(histogram[0]) - 1 for bars in sides.values()):
            raise ValueError("a histogram whose bins are not those of its edges")
        quantiles = card["quantiles"]
        named = {"prompt": quantiles["prompt"], **quantiles["answers"]}
        named |= {"total": quantiles["total"], "before max_length": quantiles["before"]}
        heads = ("p50", "p90", "p99", "max")
        each = ([name, *(q[head] for head in heads)] for name, q in named.items())
        lengths = table("Lengths in tokens", ("tokens", *heads), each)
        rows = rows or f"{card['rows']} rows"
    ordered = tuple(sorted(reasons, key=lambda r: (_rank(r.text), -r.count)))
    return DataCard(part, rows, ordered, sha256, lengths, histogram)


def _rank(reason: str) -> int:
    group = reason.partition(":")[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)
