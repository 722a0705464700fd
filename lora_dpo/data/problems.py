"""Bad rows are collected, so that one message names the first ten and not only the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_dpo.data.records import Origin
from lora_dpo.data.report import excerpt
from lora_dpo.errors import DataError

MOST_SHOWN = 10
MOST_NAMES = 20


class Problems:
    """Sentences about rows that cannot be used; raised together."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.total = 0

    def add(self, origin: Origin, sentence: str) -> None:
        """Keep one sentence about one row."""
        self.total += 1
        if len(self.sentences) < MOST_SHOWN:
            self.sentences.append(f"{origin}: {sentence}")

    def raise_if_any(self) -> None:
        """Raise one ``DataError`` with all sentences, if there are any."""
        if not self.total:
            return
        if self.total == 1:
            raise DataError(self.sentences[0])
        lines = [f"{self.total} rows cannot be used:", *self.sentences]
        if self.total > len(self.sentences):
            lines.append(f"... and {self.total - len(self.sentences)} more.")
        raise DataError("\n".join(lines))


class BadRow(Exception):  # noqa: N818  (a signal between our functions; users see DataError)
    """A row that breaks a rule: becomes a sentence of a ``DataError``."""


class DroppedRow(Exception):  # noqa: N818  (a signal between our functions, always counted)
    """A row that cannot be a preference: left out and counted under a reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def few(names: Iterable[str]) -> str:
    """Return the first names for a sentence, and how many more there are."""
    every = [excerpt(str(name), 40) for name in names]
    more = f" and {len(every) - MOST_NAMES} more" if len(every) > MOST_NAMES else ""
    return ", ".join(every[:MOST_NAMES]) + more


def listing(names: Sequence[str]) -> str:
    """Return names for a sentence: ``'a', 'b' and 'c'``."""
    quoted = [repr(name) for name in names]
    return (
        " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)
    )
