"""Everything this package raises on purpose.

    LoraDpoError
    ├── ConfigError       a setting: unknown, of the wrong type, out of range, or at odds with another
    ├── DataError         a file of preferences: missing, broken, of no known shape, or a bad row in it
    ├── ModelError        a model, adapter or tokenizer that is not there or cannot do what was asked
    ├── OutputError       a folder to write to: in use, not empty, or holding something else
    ├── TrainingError     the run itself: a loss that is not a number, a resume that does not fit
    ├── JudgeError        a judge of answers that cannot be asked
    │   └── UnreadableAnswerError   it was asked, and said nothing that could be read as a choice
    └── ExportError       a merged model that is not the policy that was trained

Each message says where, what was given, what is expected and what to do. The command line prints
it without a traceback and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LoraDpoError(Exception):
    """Base of every error that a user can act on."""


class ConfigError(LoraDpoError):
    """One or more settings are wrong; ``problems`` holds a sentence for each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        more = len(self.problems) - MOST_TOLD
        told = [*self.problems[:MOST_TOLD], *[f"... and {more} more."] * (more > 0)]
        super().__init__("\n".join(told))


class DataError(LoraDpoError):
    """Preference data that cannot be used as it is."""


class ModelError(LoraDpoError):
    """A model, adapter or tokenizer that cannot do what was asked."""


class OutputError(LoraDpoError):
    """A folder that cannot be written to without losing something."""


class TrainingError(LoraDpoError):
    """A run that cannot go on."""


class JudgeError(LoraDpoError):
    """A judge that cannot be asked."""


class UnreadableAnswerError(JudgeError):
    """A judge's answer to one question that is none of the choices."""


class ExportError(LoraDpoError):
    """An export that is not, or cannot be, the policy that was trained."""


MOST_TOLD = 30  # problems of one config
LONGEST_NAME = 200  # characters; what is longer is no typing error, and takes long to compare


def nearest(given: str, legal: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest legal name, or an empty string."""
    near = (name for name in legal if len(name) <= LONGEST_NAME)
    close = difflib.get_close_matches(given[:LONGEST_NAME], near, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
