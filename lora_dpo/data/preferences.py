"""A set of checked preferences, and its split by prompt."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_dpo.data.records import Labelled, Origin, Pair
from lora_dpo.data.report import DataReport
from lora_dpo.errors import DataError

# pairs; single answers, wanted or not; single answers that are all wanted
Kind = Literal["paired", "unpaired", "demonstrations"]


@dataclass(frozen=True, repr=False)
class Preferences:
    """Rows of one kind, the recognised shape, the columns that decided, and what was left out."""

    kind: Kind
    rows: tuple[Pair, ...] | tuple[Labelled, ...]
    shape: str
    why: str
    report: DataReport = field(default_factory=DataReport)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        prompts = len({row.prompt_key for row in self.rows})
        return (
            f"Preferences({len(self)} {self.kind} rows, {prompts} prompts, shape: {self.shape}, "
            f"{self.report.dropped} dropped)"
        )

    def split(
        self, fraction: float, maximum: int | None = None, seed: int = 0
    ) -> tuple[Preferences, Preferences]:
        """Return (train, held out); no prompt is on both sides.

        Prompts are ordered by a hash of seed and prompt, so the split depends neither on the order
        of the rows nor on anything but the prompts themselves. With at least two prompts and
        ``fraction > 0`` at least one prompt is held out and at least one stays.

        Args:
            fraction: share of the prompts to hold out, in [0, 1).
            maximum: the most rows to hold out (exceeded only where every single prompt has more).
            seed: another seed holds out other prompts.
        """
        if not 0 <= fraction < 1:
            raise DataError(f"split: fraction is {fraction}; a share in [0, 1) is expected.")
        if maximum is not None and maximum < 1:
            raise DataError(f"split: maximum is {maximum}; at least 1 row, or None, is expected.")
        keys = [row.prompt_key for row in self.rows]
        chosen = _held_out(Counter(keys), fraction, maximum, seed)
        train = [i for i, key in enumerate(keys) if key not in chosen]
        held = [i for i, key in enumerate(keys) if key in chosen]
        return self._take(train, self.report), self._take(held, DataReport("held out", len(held)))

    def shared_prompts(self, other: Preferences) -> dict[str, tuple[tuple[Origin, ...], Origin]]:
        """Return the prompts that stand in both: by key, the rows here and the first row there."""
        first: dict[str, Origin] = {}
        for row in other.rows:
            first.setdefault(row.prompt_key, row.origin)
        here: dict[str, list[Origin]] = {}
        for row in self.rows:
            if row.prompt_key in first:
                here.setdefault(row.prompt_key, []).append(row.origin)
        return {key: (tuple(origins), first[key]) for key, origins in here.items()}

    def _take(self, indices: list[int], report: DataReport) -> Preferences:
        rows = tuple(self.rows[i] for i in indices)
        return replace(self, rows=rows, report=report)  # type: ignore[arg-type]


def _held_out(sizes: Counter[str], fraction: float, maximum: int | None, seed: int) -> set[str]:
    if fraction == 0 or len(sizes) < 2:
        return set()
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    wanted = min(max(1, round(fraction * len(order))), len(order) - 1)
    room = maximum if maximum is not None else sum(sizes.values())
    chosen: set[str] = set()
    for key in order:
        if len(chosen) < wanted and sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
    return chosen or {min(order, key=sizes.__getitem__)}
