"""How far a run is: redrawn on a terminal, one plain line a log step everywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lora_dpo.metrics import peak_gib
from lora_dpo.showing import Redrawn, can_redraw
from lora_dpo.watching.pace import Pace, clock_text

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "logratios/chosen": "chosen vs reference",
    "logratios/rejected": "rejected vs reference",
    "grad_norm": "grad",
    "learning_rate": "lr",
    "tokens_per_second": "tokens/s",
    "pairs_per_second": "pairs/s",
    "memory/peak_gib": "peak GiB",
}
_OF_THE_MOMENT = ("tokens_per_second", "pairs_per_second", "memory/peak_gib")
_ON_THE_BAR = ("loss", "rewards/margins", "rewards/accuracies")


class ProgressDisplay(TrainerCallback):
    """Says how far a run is, in place of the library's bars and dictionaries.

    On a terminal two or three lines are redrawn at its bottom: steps, time left, loss, margin,
    accuracy, pairs a second and memory. Every log step is a plain line as well, which is all that a
    file, a pipe or a notebook gets. ``disable_tqdm`` leaves the plain lines alone on a terminal too.

    Args:
        pace: of the run; this counts its steps.
        args: of the trainer.
        unit: of the data, ``pairs`` or ``answers``.
    """

    def __init__(self, pace: Pace, args: TrainingArguments, unit: str) -> None:
        self.pace, self.args, self.unit = pace, args, unit
        self.state: TrainerState | None = None
        self._latest: dict[str, float] = {}
        self._doing, self._done, self._total = "", 0, 0
        self._redrawn: Redrawn | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar inside the block, where it can be redrawn; a block inside of it adds nothing."""
        first = self._redrawn is None
        if first and not self.args.disable_tqdm and self.args.process_index == 0 and can_redraw():
            self._redrawn = Redrawn(self._picture)
            self._redrawn.begin()
        try:
            yield
        finally:
            self._doing = ""
            if first and self._redrawn is not None:
                self._redrawn.end()
                self._redrawn = None

    def doing(self, what: str) -> None:
        """Say what is done between two steps."""
        self._doing, self._done, self._total = what, 0, 0
        self._draw(now=True)

    # ---- the library's events ----------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Begin to count: a resumed run from where it goes on."""
        self.state = state
        self.pace.begin()
        self._draw(now=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Count the step."""
        self.state = state
        self.pace.step_done()
        self._draw()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Count a batch of an evaluation."""
        first = self._doing != "evaluating"
        self._doing, self._done = "evaluating", 1 if first else self._done + 1
        self._total = len(kw["eval_dataloader"])
        self._draw(now=first)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kw: Any,
    ) -> None:
        """Print the few numbers that tell whether it goes well."""
        self.state, values = state, logs or {}
        if "loss" in values:
            self._latest = values
        if state.is_world_process_zero and (line := self._line(values)):
            print(line, flush=True)

    # ---- what is shown -----------------------------------------------------------------------

    def _line(self, logs: Mapping[str, float]) -> str:
        assert self.state is not None
        prefix = "eval_" if "eval_loss" in logs else ""
        if f"{prefix}loss" not in logs:
            return ""
        above_the_bar = self._redrawn is not None and sys.stdout.isatty()
        names = {**_SHOWN, "pairs_per_second": f"{self.unit}/s"}
        parts = [
            f"{shown} {logs[prefix + key]:.4g}"
            for key, shown in names.items()
            if prefix + key in logs and not (above_the_bar and key in _OF_THE_MOMENT)
        ]
        if not prefix and not above_the_bar and (left := self._left()):
            parts.append(left)
        head = f"step {self.state.global_step}/{self.state.max_steps}"
        return f"{head} {'held-out ' if prefix else ''}" + "  ".join(parts)

    def _left(self) -> str:
        """Return the time left in words; nothing at the end of a run."""
        state = self.state
        if state is None or state.global_step >= state.max_steps:
            return ""
        evaluations = evaluations_left(self.args, state)
        seconds, untimed = self.pace.seconds_left(state.max_steps - state.global_step, evaluations)
        if seconds is None:
            return "left ?"
        s = "s" if untimed > 1 else ""
        return f"left {clock_text(seconds)}" + (f" + {untimed} evaluation{s}" if untimed else "")

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.state is not None and self.state.max_steps > 0:
            parts = [self._steps(self.state), self._figures()]
        if self._doing:
            count = f" {self._done}/{self._total}" if self._total else ""
            parts.append(_row(f"{self._doing}{count}", self._done, self._total))
        return Group(*parts)

    def _steps(self, state: TrainerState) -> RenderableType:
        step, steps = state.global_step, state.max_steps
        return _row(f"step {step}/{steps}", step, steps, self._left())

    def _figures(self) -> RenderableType:
        found = [
            f"{_SHOWN[key]} {self._latest[key]:.4g}" for key in _ON_THE_BAR if key in self._latest
        ]
        pace = self.pace.pairs_per_second
        found += [] if pace is None else [f"{pace:.3g} {self.unit}/s"]
        found.append(f"peak {peak_gib(self.args.device):.1f} GiB")
        return Text("  ".join(found), no_wrap=True, overflow="ellipsis")

    def _draw(self, now: bool = False) -> None:
        if self._redrawn is not None:
            self._redrawn.draw(now)


def _row(words: str, done: int, total: int, rest: str = "") -> Table:
    """Return words, a bar where a total is known, and more words."""
    grid = Table.grid(padding=(0, 1), expand=False)
    for _ in range(3):
        grid.add_column(no_wrap=True)
    drawn: RenderableType = ProgressBar(total=total, completed=done, width=24) if total else ""
    grid.add_row(Text(words), drawn, Text(rest, style="cyan"))
    return grid


def evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    """Return how many evaluations a run will still do before it ends."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "steps" and state.eval_steps:
        every = int(state.eval_steps)
        return state.max_steps // every - state.global_step // every
    if strategy == "epoch":
        return max(int(state.num_train_epochs) - int(state.epoch or 0), 0)
    return 0


def put_display(trainer: Any) -> ProgressDisplay:
    """Put our lines, and notes below them, in place of the library's bars and dictionaries."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    unit = "pairs" if trainer.objective.data == "paired" else "answers"
    display = ProgressDisplay(trainer.pace, trainer.args, unit)
    for callback in (display, trainer.advice):  # a note stands below the line that it is about
        trainer.add_callback(callback)
    return display
