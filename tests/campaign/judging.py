"""What every case is held to: read, or refused with one message that says where."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.errors import LoraDpoError

LONGEST_MESSAGE = 8000
READ, REFUSED = "read", "refused"


class BrokenLawError(AssertionError):
    """A case in which the law does not hold."""


def hold(true: bool, what: str) -> None:
    """Raise ``BrokenLawError`` unless a statement is true."""
    if not true:
        raise BrokenLawError(what)


def refusal(error: LoraDpoError, names: Iterable[str]) -> str:
    """Hold that a refusal is one readable message that names a place; return the outcome.

    Args:
        error: what was raised.
        names: of files, rows or keys, one of which must stand in it.
    """
    text = str(error)
    hold(bool(text.strip()), "an empty message")
    hold(len(text) <= LONGEST_MESSAGE, f"a message of {len(text)} characters: {text[:300]}")
    hold("Traceback (most recent" not in text, f"a traceback in a message: {text[:300]}")
    hold(
        not re.search("[\ud800-\udfff]", text), f"a message that cannot be written: {text[:300]!r}"
    )
    hold(any(name in text for name in names), f"the message names no place: {text[:300]}")
    return REFUSED


@dataclass
class Tally:
    """Cases of one kind by outcome, and the first example of each defect."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    defects: dict[str, str] = field(default_factory=dict)

    def run(self, judge: Callable[[Any], str], case: Any) -> None:
        """Judge a case and count it; a broken law is kept once for each place in the package."""
        try:
            self.outcomes[judge(case)] += 1
        except Exception as error:
            self.outcomes["DEFECT"] += 1
            self.defects.setdefault(_signature(error), f"{case!r}"[:2000])

    @property
    def total(self) -> int:
        return sum(self.outcomes.values())


def _signature(error: BaseException) -> str:
    """Return kind, place in the package and text of an error, numbers left out."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{Path('/')}lora_dpo{Path('/')}" in frame.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "law"
    text = re.sub(r"\d+", "N", str(error).splitlines()[0] if str(error) else "")
    return f"{type(error).__name__} at {place}: {text[:160]}"
