"""Notes beside the curves: what the diagnostics make of the log lines so far, each kind told once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_dpo.diagnostics import detectors, running
from lora_dpo.diagnostics.detectors import Answers
from lora_dpo.diagnostics.diagnosing import HELD_OUT, TRAINING
from lora_dpo.diagnostics.findings import Finding
from lora_dpo.diagnostics.measuring import curves, rewards_by_side
from lora_dpo.lines import add_lines, lines_until
from lora_dpo.objectives import BoundObjective
from lora_dpo.objectives.bound import States
from lora_dpo.passes import Step
from lora_dpo.randomness import random_state, restore_random
from lora_dpo.stats import AnyStats, PairStats

logger = logging.getLogger("lora_dpo")

LINES = 256  # of training, and of evaluations, by which the present is judged
NORMAL = "chosen falls a little"


@dataclass(frozen=True)
class Note:
    """One line of advice: the step, what it is about, and what is said."""

    step: int
    kind: str
    text: str


class Advisor:
    """Reads the log lines of a run as they come.

    Args:
        told: kinds that have been told before, in a run that is resumed.
    """

    def __init__(self, told: Iterable[str] = ()) -> None:
        self._told = set(told)
        self._training: deque[Mapping[str, Any]] = deque(maxlen=LINES)
        self._held_out: deque[Mapping[str, Any]] = deque(maxlen=LINES)

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take in lines that have been judged before."""
        for line in lines:
            if "eval_loss" in line:
                self._held_out.append(line)
            elif "loss" in line:
                self._training.append(line)

    def first_step(self, loss: float, start: float) -> list[Note]:
        """Judge the loss of the first step by that of a policy at its reference."""
        return self._new(1, [running.away_from_reference(loss, start)])

    def hear(
        self, line: Mapping[str, Any], *, rows: int = 0, answers: Answers | None = None
    ) -> list[Note]:
        """Judge the run with one more line; return what is told now.

        Args:
            line: as in ``metrics.jsonl``.
            rows: behind a held-out line.
            answers: lengths and rewards of these rows.
        """
        self.recall([line])
        prefix = "eval_" if "eval_loss" in line else ""
        if f"{prefix}loss" not in line:
            return []
        step, found = int(line["step"]), []
        names = [f"{prefix}logratios/chosen", f"{prefix}lengths/chosen"]
        normal = ""
        if all(name in line for name in names):
            fall, tokens = (float(line[name]) for name in names)
            found.append(running.falling(fall, tokens))
            normal = running.normal_fall(fall, tokens)
        notes = self._new(step, [*found, *self._judged(line, rows, answers)])
        return notes + (self.say(step, NORMAL, normal) if normal else [])

    def _judged(self, line: Mapping[str, Any], rows: int, answers: Answers | None) -> list[Finding]:
        training = curves(self._training, {**TRAINING, "chosen": "logratios/chosen"})
        found = []
        if "margin" in training and "chosen" in training:
            found.append(running.runaway(training["margin"], training["chosen"]))
        if "eval_loss" not in line:
            return found
        held_out = curves(self._held_out, HELD_OUT)
        before = self._held_out[-2]["step"] if len(self._held_out) > 1 else 0
        recent = [v for s, v in _points(training.get("accuracy")) if s > before]
        if recent and "accuracy" in held_out:
            found.append(running.memorising(float(np.mean(recent)), held_out["accuracy"], rows))
        found.append(detectors.over_optimisation(None, np.zeros(0), held_out, training, rows))
        if answers is not None:
            found.append(detectors.length_bias(answers))
        return found

    def _new(self, step: int, findings: Iterable[Finding]) -> list[Note]:
        notes = []
        for finding in findings:
            if finding.found:
                notes += self.say(step, finding.name, f"{finding.what}; try: {finding.remedies[0]}")
        return notes

    def say(self, step: int, kind: str, text: str) -> list[Note]:
        """Tell what was found elsewhere, unless it has been told."""
        if kind in self._told:
            return []
        self._told.add(kind)
        return [Note(step, kind, text)]


class AdviceCallback(TrainerCallback):
    """Writes notes to the log and, where there is a file, to ``notes.jsonl``.

    Args:
        trainer: whose lines and held-out statistics are read.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.path: Path | None = None
        self.advisor = Advisor()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Know what had been told when the checkpoint was saved; the rest never happened."""
        before = lines_until(self.path, state.global_step) if self.path is not None else []
        self.advisor = Advisor(note["kind"] for note in before)
        self.advisor.recall(state.log_history)
        warmup = args.get_warmup_steps(state.max_steps)
        if warmup >= state.max_steps:
            self.tell(
                state.global_step,
                "warm-up without end",
                f"all {state.max_steps} steps of the run are warm-up, which begins at a learning rate "
                f"of 0, so train.learning_rate ({args.learning_rate:g}) is never reached; try: "
                "train.warmup_steps: 0, or more steps",
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Look at the newest line."""
        line, answers, rows = state.log_history[-1], None, 0
        if "eval_loss" in line:
            stats = self.trainer.held_out_stats
            rows, answers = len(stats), answers_in(self.trainer.objective, stats)
        self._write(self.advisor.hear(line, rows=rows, answers=answers))

    def first_step(self, step: Step, states: States, tokens_a_row: float) -> None:
        """Look at the losses of the first step, which no later line shows alone.

        Args:
            step: its statistics and losses, before its update.
            states: that the objective had.
            tokens_a_row: as the objective had it.
        """
        if not step.stats.has_reference:
            return
        before = random_state()  # an objective may draw
        start = self.trainer.objective(step.stats.at_reference(), states, tokens_a_row=tokens_a_row)
        restore_random(before)
        self._write(self.advisor.first_step(float(step.losses.mean()), float(start.mean())))

    def tell(self, step: int, kind: str, text: str) -> None:
        """Tell what another callback found."""
        self._write(self.advisor.say(step, kind, text))

    def _write(self, notes: list[Note]) -> None:
        if not self.trainer.is_world_process_zero():
            return
        for note in notes:
            level = logging.INFO if note.kind == NORMAL else logging.WARNING
            logger.log(level, "note at step %d, %s: %s", note.step, note.kind, note.text)
        if notes and self.path is not None:
            add_lines(self.path, map(asdict, notes))


def answers_in(objective: BoundObjective, stats: AnyStats) -> Answers | None:
    """Return lengths and rewards of wanted and unwanted rows; None where one side is missing."""
    rewards = rewards_by_side(objective, stats)
    if isinstance(stats, PairStats):
        sides, paired = (stats.chosen_lengths, stats.rejected_lengths), True
    else:
        sides, paired = (stats.lengths[stats.labels], stats.lengths[~stats.labels]), False
    if not all(len(side) for side in sides):
        return None
    wanted, unwanted = (side.double().numpy() for side in sides)
    return Answers((wanted, unwanted), rewards, paired)


def _points(curve: Any) -> list[tuple[float, float]]:
    return [] if curve is None else list(zip(curve.steps, curve.values, strict=True))
