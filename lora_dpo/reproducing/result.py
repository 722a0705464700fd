"""What a second run has in common with the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lora_dpo.showing import Told

MOST_SHOWN = 5


@dataclass(frozen=True)
class Difference:
    """One number that is not the same.

    Args:
        where: as ``step 20``, or ``held out``.
        name: of the figure.
        was: in the first run.
        now: in the second.
    """

    where: str
    name: str
    was: float
    now: float

    @property
    def apart(self) -> float:
        """How far, in units of the figure; of a figure above 1, as a share of it."""
        far = abs(self.was - self.now) / max(1.0, abs(self.was))
        return far if math.isfinite(far) else math.inf

    def __str__(self) -> str:
        return f"{self.where}: {self.name} was {self.was!r} and is {self.now!r} ({self.apart:.1e} apart)"


@dataclass(frozen=True)
class Twin:
    """The adapters of both runs at one place.

    Args:
        where: as ``step 20``, or ``the end``.
        same: whether the two files hold the same tensors, byte by byte.
        apart: norm of the difference, as a share of the first one's norm.
    """

    where: str
    same: bool
    apart: float


@dataclass(frozen=True, repr=False)
class Reproduction(Told):
    """What ``reproduce`` found. ``print(found)``; in a notebook, its name alone.

    Args:
        run: folder of the first run.
        to: folder of the second.
        steps: that both have.
        ended: whether the first run came to its end.
        lines: of the log that were compared.
        figures: in them, and held-out ones.
        differing: every figure that is not the same, in the order of the log.
        missing: lines of the log that one of the two lacks.
        adapters: that were compared.
        changed: name, earlier and present value of versions and hardware that are not the same.
        notes: what else there is to know.
        tolerance: by how much a figure may differ, in the units of ``Difference.apart``.
    """

    run: str
    to: str
    steps: int
    ended: bool
    lines_compared: int
    figures: int
    differing: tuple[Difference, ...]
    missing: tuple[str, ...]
    adapters: tuple[Twin, ...]
    changed: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...] = ()
    tolerance: float = 0.0

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo reproduce {self.run}"

    @property
    def identical(self) -> bool:
        """Whether every figure and every byte is the same."""
        return not (self.differing or self.missing) and all(twin.same for twin in self.adapters)

    @property
    def largest(self) -> float:
        """The largest difference of all; 0 where there is none."""
        figures = (difference.apart for difference in self.differing)
        return max([*figures, *(twin.apart for twin in self.adapters)], default=0.0)

    @property
    def first(self) -> Difference | None:
        """The first figure of the log that is not the same."""
        return self.differing[0] if self.differing else None

    @property
    def passed(self) -> bool:
        """Whether the runs are identical, or no further apart than was allowed."""
        return self.identical or (not self.missing and self.largest <= self.tolerance)

    @property
    def verdict(self) -> str:
        """The end of it in one sentence."""
        if self.identical:
            return f"{self.run} is reproduced: every figure and every byte is the same"
        if self.passed:
            return f"{self.run} is reproduced within {self.tolerance:g}: {self.largest:.1e} at most"
        return f"{self.run} is not reproduced: {self.largest:.1e} apart at most"

    def lines(self) -> list[str]:
        """Return it for people, a line each."""
        return [*self._lines(), self.verdict]

    def _lines(self) -> Iterator[str]:
        ended = "" if self.ended else ", where the first run was left"
        yield f"second run: {self.to}, {self.steps} steps{ended}"
        yield f"compared: {self.figures} figures of {self.lines_compared} log lines and held-out metrics"
        for missing in self.missing:
            yield f"missing: {missing}"
        if self.first is not None:
            yield f"first difference at {self.first}"
            worst = sorted(self.differing, key=lambda found: -found.apart)
            for difference in dict.fromkeys(worst[:MOST_SHOWN]):
                yield f"  {difference}"
            if len(self.differing) > MOST_SHOWN:
                yield f"  and {len(self.differing) - MOST_SHOWN} more; --json has all"
        for twin in self.adapters:
            told = "the same bytes" if twin.same else f"{twin.apart:.1e} of its size apart"
            yield f"adapter at {twin.where}: {told}"
        for name, was, now in self.changed:
            yield f"not as it was: {name} was {was}, is {now}"
        yield from (f"note: {note}" for note in self.notes)

    def __repr__(self) -> str:
        return f"Reproduction({self.run!r}, passed={self.passed}, largest={self.largest:.1e})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is infinite or no number is a text."""
        values = asdict(self)
        values["differing"] = [_plain(asdict(found)) for found in self.differing]
        values["adapters"] = [_plain(asdict(twin)) for twin in self.adapters]
        verdict = {"passed": self.passed, "identical": self.identical, "verdict": self.verdict}
        return {**verdict, "largest": _plain({"": self.largest})[""], **values}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
