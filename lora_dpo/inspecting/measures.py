"""What is counted and measured of data: reasons with examples, lengths, work, the base's readiness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_dpo.data import DataReport, Preferences, Tokenised, flat_tokens
from lora_dpo.data.rows import IDENTICAL
from lora_dpo.stepping import row_length

MOST_BINS = 16
MOST_LEAKS_SHOWN = 5


@dataclass(frozen=True)
class Count:
    """How often something was met, and the first places where."""

    name: str
    count: int
    examples: tuple[tuple[str, str], ...] = ()  # (file:row, excerpt)


def counts_of(reports: Iterable[DataReport]) -> tuple[Count, ...]:
    """Return every reason of the reports, as ``dropped: ...``, with its first rows."""
    return tuple(
        Count(reason, entry.count, tuple((e.origin, e.detail) for e in entry.examples))
        for report in reports
        for (_, reason), entry in report.entries.items()
    )


def leaks_of(rows: Preferences, held: Preferences) -> Count:
    """Return the rows whose prompt is in the held-out file too, each with the row there."""
    found = [
        (str(here), f"the prompt of {there}")
        for origins, there in rows.shared_prompts(held).values()
        for here in origins
    ]
    return Count("leaking", len(found), tuple(found[:MOST_LEAKS_SHOWN]))


# The summary's names, and how the reasons begin that each adds up.
_SUMMED = {
    "dropped": ("dropped: ",),
    "truncated": ("truncated: ",),
    "duplicate": ("dropped: duplicate",),
    "empty": ("dropped: empty",),
    "identical": (IDENTICAL,),
}


def summed(counts: Sequence[Count]) -> dict[str, int]:
    """Return the rows dropped and truncated, and of the dropped ones the duplicate, empty, identical."""
    return {
        name: sum(c.count for c in counts if c.name.startswith(begins))
        for name, begins in _SUMMED.items()
    }


@dataclass(frozen=True)
class Histogram:
    """How many rows have how many tokens; bin ``i`` holds ``edges[i] <= tokens < edges[i + 1]``."""

    edges: tuple[int, ...]
    counts: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, lengths: Mapping[str, Sequence[int]]) -> Histogram:
        """Count into bins of one width (1, 2 or 5 times a power of ten) for all sides."""
        longest = max(map(max, lengths.values()))
        width = next(
            step * 10**power
            for power in range(12)
            for step in (1, 2, 5)
            if longest // (step * 10**power) < MOST_BINS
        )
        edges = tuple(range(0, longest + width + 1, width))
        counts = {
            name: tuple(map(int, np.histogram(values, edges)[0]))
            for name, values in lengths.items()
        }
        return cls(edges, counts)


@dataclass(frozen=True)
class Work:
    """Tokens that a model goes through for all rows, by layout.

    Args:
        padded: a row a micro-batch, each side padded to the longer one.
        apart: laid end to end, each side with its own copy of the prompt.
        flat: laid end to end, what the sides begin with once (``data.flat_tokens``).
    """

    padded: int
    apart: int
    flat: int

    @property
    def saved(self) -> float:
        """Share of the padded layout's tokens that the flat one does without."""
        return 1 - self.flat / self.padded

    @property
    def saved_by_sharing(self) -> float:
        """Share of the tokens laid end to end that shared beginnings save."""
        return 1 - self.flat / self.apart


def lengths_of(data: Tokenised) -> dict[str, list[int]]:
    """Return the tokens of each part of every row."""
    table = data.rows.with_format("arrow")[:]  # as Python lists, large data would fill the memory
    names = [name for name in table.column_names if name.endswith("_ids")]
    return {
        name.removesuffix("_ids"): table.column(name).combine_chunks().value_lengths().to_pylist()
        for name in names
    }


def data_card(data: Tokenised) -> dict[str, Any]:
    """Return what a run keeps of its tokenised rows: count, sha256, quantiles and histogram of tokens."""
    return {
        "rows": len(data),
        "fingerprint": data.fingerprint,
        "quantiles": data.summary.to_dict(),
        "histogram": asdict(Histogram.of(lengths_of(data))),
    }


def work_of(rows: Iterable[Mapping[str, Any]]) -> Work:
    """Add up the tokens of each layout."""
    padded = apart = flat = 0
    for row in rows:
        sides = [row[key] for key in ("chosen_ids", "rejected_ids", "completion_ids") if key in row]
        apart += sum(flat_tokens(row["prompt_ids"], [side]) for side in sides)
        flat += flat_tokens(row["prompt_ids"], sides)
        padded += len(sides) * row_length(row)
    return Work(padded, apart, flat)


@dataclass(frozen=True)
class Readiness:
    """What the base makes of the answers before any training.

    Args:
        rows: wanted answers that were looked at.
        wanted_nats_a_token: mean log-prob of their tokens, the end token among them.
        unwanted_nats_a_token: of the unwanted answers of the same rows; NaN without any.
        end_token: that the answers end with.
        end_probability: of that token behind a whole wanted answer, the median over rows; NaN
            where all were cut.
    """

    rows: int
    wanted_nats_a_token: float
    unwanted_nats_a_token: float
    end_token: str
    end_probability: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which knows no NaN."""
        return {
            k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(self).items()
        }
