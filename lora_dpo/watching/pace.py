"""How fast a run goes and when it will be done, told by its steps alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLOW_STEPS = 3  # the first of a process lay out memory and choose kernels
LAST_STEPS = 50  # by which the present pace is judged


class Pace:
    """Seconds, rows and tokens of optimiser steps; what is done between them is left out.

    A resumed run begins anew: only steps of this process are counted.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.tokens = 0
        self.begin()

    def begin(self) -> None:
        """Forget all steps: the first one starts now."""
        self.steps, self._seconds, self._all_rows = 0, 0.0, 0
        self._last: deque[tuple[float, int]] = deque(maxlen=LAST_STEPS)
        self._rests, self._rested = 0, 0.0
        self._rows, self._rows_before = 0, 0
        self.tokens, self._line, self._step = 0, self._worked(), self._worked()

    def add(self, rows: int) -> None:
        """Count the rows of a step."""
        self._rows += rows
        self._rows_before += rows

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Leave an evaluation out: its seconds and its tokens are no part of the steps."""
        began, tokens = self._clock(), self.tokens
        try:
            yield
        finally:
            self._rests += 1
            self._rested += self._clock() - began
            self.tokens = tokens

    def step_done(self) -> None:
        """Count a step."""
        now = self._worked()
        seconds, self._step = now - self._step, now
        self.steps += 1
        self._seconds, self._all_rows = self._seconds + seconds, self._all_rows + self._rows_before
        if self.steps == SLOW_STEPS + 1:
            self._last.clear()
        if self.steps > 1:
            self._last.append((seconds, self._rows_before))
        self._rows_before = 0

    def since_last_line(self) -> dict[str, float]:
        """Return rows and tokens a second since this was last asked."""
        seconds = max(self._worked() - self._line, 1e-9)
        found = {
            "tokens_per_second": self.tokens / seconds,
            "pairs_per_second": self._rows / seconds,
        }
        self._line, self.tokens, self._rows = self._worked(), 0, 0
        return found

    @property
    def seconds_a_step(self) -> float | None:
        """Of the last steps, without the first ones; None before two are done."""
        return sum(s for s, _ in self._last) / len(self._last) if self._last else None

    @property
    def pairs_per_second(self) -> float | None:
        """Rows a second of the same steps."""
        seconds = sum(s for s, _ in self._last)
        return sum(rows for _, rows in self._last) / seconds if seconds > 0 else None

    def seconds_left(self, steps: int, evaluations: int) -> tuple[float | None, int]:
        """Return what is left of a run.

        Args:
            steps: optimiser steps still to be done.
            evaluations: still to be done.

        Returns:
            Seconds, None before two steps are done; and how many evaluations are not in them,
            because none has been timed yet.
        """
        if self.seconds_a_step is None:
            return None, evaluations
        seconds = steps * self.seconds_a_step
        if not self._rests:
            return seconds, evaluations
        return seconds + evaluations * self._rested / self._rests, 0

    def measured(self) -> dict[str, float | int | None]:
        """Return seconds of a step and pairs a second for the record; of all steps, where few are done."""
        each, pairs = self.seconds_a_step, self.pairs_per_second
        if each is None and self.steps:
            each, pairs = self._seconds / self.steps, self._all_rows / max(self._seconds, 1e-9)
        return {"seconds_a_step": each, "pairs_per_second": pairs, "steps": self.steps}

    def _worked(self) -> float:
        return self._clock() - self._rested


def clock_text(seconds: float) -> str:
    """Return seconds as ``2:05`` or ``1:02:33``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
