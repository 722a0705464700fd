"""What acts on a run's events: ``metrics.jsonl``, stopping in order, weights that rest."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from lora_dpo.lines import json_line, refuse_link, whole_lines
from lora_dpo.ranks import largest, launched_as
from lora_dpo.showing import Lines
from lora_dpo.store import MANIFEST, sync, write_bytes

logger = logging.getLogger("lora_dpo")


def show_log_lines() -> None:
    """Show our own log lines on standard output, unless the program has set up logging itself.

    Of several processes the first one speaks; the others tell errors alone.
    """
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(Lines())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if launched_as() > 0:
        logger.setLevel(logging.ERROR)


class JsonlCallback(TrainerCallback):
    """Every log line as JSON in ``metrics.jsonl``, in step with the checkpoint after a resume.

    The file is the record: a checkpoint holds how far it was, not the lines. In memory stay the last
    ones of training and of evaluation, so that neither grows with the steps.
    """

    KEPT = 256

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes, self._sha256 = 0, hashlib.sha256()
        self._most = 2 * self.KEPT  # lines in memory, before some of them go
        self._resumed: Mapping[str, Any] | None = None

    def mark(self) -> dict[str, Any]:
        """Return how far the file is, once that is on the disk."""
        sync(self.path)
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def resume(self, mark: Mapping[str, Any] | None) -> None:
        """Go on, when training begins, from where ``mark`` was taken."""
        self._resumed = mark

    def on_train_begin(self, args: Arguments, state: TrainerState, *rest: Any, **kw: Any) -> None:
        """Leave what the resumed checkpoint had logged; the rest of an older file never happened."""
        if not state.is_world_process_zero:
            return
        mark, self._resumed = self._resumed, None
        refuse_link(self.path)
        self._bytes, self._sha256 = 0, hashlib.sha256()
        if mark is not None and self._has_begun(mark):
            os.truncate(self.path, self._bytes)
            return
        entries = list(state.log_history)
        if mark is not None and mark["bytes"]:
            entries = self._mended(entries, state.global_step)
        lines = "".join(json_line(entry) + "\n" for entry in entries)
        self._bytes, self._sha256 = 0, hashlib.sha256()
        write_bytes(self.path, self._counted(lines))

    def on_log(self, args: Arguments, state: TrainerState, *rest: Any, **kw: Any) -> None:
        """Append the newest line."""
        if not (state.is_world_process_zero and state.log_history):
            return
        with self.path.open("ab") as stream:
            stream.write(self._counted(json_line(state.log_history[-1]) + "\n"))
        if len(state.log_history) > self._most:
            state.log_history[:] = last_lines(state.log_history, self.KEPT)
            self._most = len(state.log_history) + self.KEPT // 4

    def _mended(self, held: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Return the lines up to a step of a file that is not what it was, which is kept beside.

        What the checkpoint holds of them is its own; the older ones are the file's, as far as they can
        be read.
        """
        first = {False: step + 1, True: step + 1}  # held of training, of evaluation
        for entry in reversed(held):
            first["eval_loss" in entry] = entry["step"]
        older = [e for _, e in whole_lines(self.path) if e["step"] < first["eval_loss" in e]]
        kept = self.path.with_name(f"{self.path.stem}.damaged{self.path.suffix}")
        where = "it is gone"
        if self.path.is_file():
            os.replace(self.path, kept)
            where = f"it is kept as {kept.name}"
        logger.warning(
            "%s: is not what it was at step %d; %s. Written again from the last %d lines, which the "
            "checkpoint holds, and %d older ones that can be read there",
            self.path, step, where, len(held), len(older),
        )  # fmt: skip
        return sorted([*older, *held], key=lambda entry: (entry["step"], "eval_loss" in entry))

    def _counted(self, text: str) -> bytes:
        content = text.encode()
        self._bytes += len(content)
        self._sha256.update(content)
        return content

    def _has_begun(self, mark: Mapping[str, Any]) -> bool:
        """Whether the file begins with what the mark was taken of; if so, count that."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as stream:
            left = int(mark["bytes"])
            while left and (piece := stream.read(min(left, 1 << 20))):
                self._bytes, left = self._bytes + len(piece), left - len(piece)
                self._sha256.update(piece)
        return bool(self._sha256.hexdigest() == mark["sha256"])


def last_lines(lines: Sequence[dict[str, Any]], each: int) -> list[dict[str, Any]]:
    """Return the last lines of evaluations and the last others, as many of each, in their order."""
    left = {True: each, False: each}
    kept = []
    for line in reversed(lines):
        held_out = "eval_loss" in line
        left[held_out] -= 1
        if left[held_out] >= 0:
            kept.append(line)
    return kept[::-1]


class NothingLeftError(Exception):
    """Every step of a resumed run was done before; ``ResumableTrainer`` catches it."""


class ResumeCallback(TrainerCallback):
    """Mends what the library makes of a resumed run that was moved, or that was killed at its end."""

    def on_step_begin(self, args: Arguments, state: TrainerState, *rest: Any, **kw: Any) -> None:
        """Do no step behind the last one."""
        if state.global_step >= state.max_steps:
            raise NothingLeftError

    def on_train_begin(self, args: Arguments, state: TrainerState, *rest: Any, **kw: Any) -> None:
        """Name the best checkpoint by where its folder is now."""
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if (best / MANIFEST).is_file():
            state.best_model_checkpoint = str(best)


class StopCallback(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save a checkpoint, end. A second signal ends at once.

    Of several processes all end at the same step, whichever of them got the signal. Their launcher
    sends on what the terminal has sent them already: within some seconds that is no second signal.
    """

    SAME = 5.0  # seconds

    def __init__(self) -> None:
        self.signal: int | None = None

    def agree(self) -> None:
        """Take over the signal that another process has got."""
        self.signal = int(largest(self.signal or 0)) or None

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> TrainerControl:
        """Ask for the checkpoint and the end."""
        self.agree()
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than a logging window has figures too
        return control

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the two signals inside the block (in the main thread, where Python delivers them)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        began: float | None = None

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal began
            self.signal, now = number, time.monotonic()
            if began is None:
                print(
                    "stopping: the step is finished and a checkpoint saved first", file=sys.stderr
                )
                began = now
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                signal.signal(number, before[signal.Signals(number)])
            elif now - began > self.SAME:
                raise KeyboardInterrupt

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class EndCallback(TrainerCallback):
    """End a run after a step, with a checkpoint, whatever its schedule was made for."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> TrainerControl:
        """Ask for the checkpoint and the end, unless the end is here anyway."""
        if self.step <= state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control


class MovementCallback(TrainerCallback):
    """Tell when adapter weights do not move: a learning rate too small for their dtype, mostly.

    Args:
        tell: takes the step, the kind of the note and its text.
    """

    SAMPLE = 65_536
    STEPS = 10

    def __init__(self, tell: Callable[[int, str, str], None]) -> None:
        self.tell = tell
        self.start: torch.Tensor | None = None
        self.begin = 0

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Keep a sample of the trained weights, unless a resumed run has been judged before."""
        if state.global_step < self.STEPS:
            self.start, self.begin = self._sample(kw["model"]), state.global_step

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Compare once, some steps later."""
        if self.start is None or state.global_step < self.begin + self.STEPS:
            return
        begun = self.start != 0  # lora_B starts at 0, from where the smallest step is a move
        moved = float((self._sample(kw["model"]) != self.start)[begun].double().mean())
        self.start = None
        if moved < 0.5:
            self.tell(
                state.global_step,
                "weights do not move",
                f"only {100 * moved:.0f} % of the adapter weights have moved in {self.STEPS} steps; "
                f"raise train.learning_rate (now {args.learning_rate:g}), which suits LoRA from about "
                "2e-5 on",
            )

    def _sample(self, model: torch.nn.Module) -> torch.Tensor:
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        each = max(self.SAMPLE // max(len(trained), 1), 1)
        return torch.cat([p[:: max(p.numel() // each, 1)][:each].clone() for p in trained])
