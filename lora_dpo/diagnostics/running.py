"""Detectors on the log lines of a run that is not over, beside those of ``detectors``."""

from __future__ import annotations

import math

import numpy as np

from lora_dpo.diagnostics.detectors import (
    DISPLACEMENT,
    FELL_NATS,
    OVER_OPTIMISATION,
    SATURATED,
    Curve,
)
from lora_dpo.diagnostics.findings import Failure, Finding

START_AWAY = 0.02  # of the start value; 16-bit rounding moves the mean loss of a step by less
FALL_A_TOKEN = 0.1  # nats
MEMORISED = 0.95  # accuracy on training rows
GAP = 0.1  # between training and held-out accuracy
LINEAR = 0.8  # slope of the later half over that of the earlier one
FEWEST_LINES = 8  # log lines that a slope is told from

AWAY = Failure(
    "not at the reference",
    "log-ratios and rewards are told from a model that the policy never was",
    (
        "look at the line 'reference:' above; without model.adapter the two must agree",
        "lora.dropout 0, or model.compute_dtype float32, to see whether noise or rounding does it",
    ),
)
MEMORISING = Failure(
    "memorising",
    "the policy knows its training pairs by heart, and what it learns now does not carry over",
    (
        "fewer steps (train.num_train_epochs), or export --checkpoint best",
        "more data, objective.beta larger, or objective.label_smoothing 0.1",
    ),
)
RUNAWAY = Failure(
    "runaway margins",
    "the loss is as good as 0, and what still widens the margins pushes probability to answers that "
    "nobody asked for",
    (
        "objective.beta larger",
        "fewer steps (train.num_train_epochs)",
        *OVER_OPTIMISATION.remedies[2:],
    ),
)


def away_from_reference(loss: float, start: float) -> Finding:
    """Whether the loss of the first step is another than that of a policy at its reference.

    Found if it is off by more than 0.02 of that.

    Args:
        loss: mean over the rows of the first step, before its update.
        start: of a policy at its reference, ln 2 for dpo.
    """
    what = f"the loss of the first step is {loss:.4f}; a policy at its reference has {start:.4f}"
    found = abs(loss - start) > START_AWAY * max(abs(start), 0.5)
    return AWAY(found, what, {"first_loss": loss, "start_loss": start})


def falling(logratio: float, tokens: float) -> Finding:
    """Whether wanted answers have lost more than a run that goes well takes from them.

    Found if they fell by more than 1 nat an answer and 0.1 nats a token, in the mean.

    Args:
        logratio: policy minus reference of wanted answers, nats, in the mean.
        tokens: of such an answer, in the mean.
    """
    each = logratio / max(tokens, 1.0)
    what = (
        f"wanted answers moved by {logratio:+.2f} nats, {each:+.3f} a token; down to "
        f"{-FALL_A_TOKEN:g} a token rewards/chosen below 0 is normal, this is not"
    )
    measured = {"wanted_logratio_nats": logratio, "wanted_logratio_a_token": each}
    return DISPLACEMENT(logratio < -FELL_NATS and each < -FALL_A_TOKEN, what, measured)


def normal_fall(logratio: float, tokens: float) -> str:
    """Return in words that wanted answers fell, and that this is normal; nothing where it is not so."""
    if logratio >= -FELL_NATS or falling(logratio, tokens).found:
        return ""
    each = logratio / max(tokens, 1.0)
    return (
        f"rewards/chosen is negative: wanted answers moved by {logratio:+.2f} nats, {each:+.3f} a "
        f"token. That is normal down to {-FALL_A_TOKEN:g} a token, while margins and accuracy rise"
    )


def memorising(training: float, held_out: Curve, rows: int) -> Finding:
    """Whether training pairs are nearly all told while held-out ones are told no better than before.

    Found if training accuracy is above 0.95, held-out accuracy is below it by 0.1 and two standard
    errors, and has not risen by 0.01 since the evaluation before.

    Args:
        training: accuracy on the rows since that evaluation.
        held_out: accuracy by step.
        rows: held-out rows behind each value.
    """
    if len(held_out.values) < 2:
        return MEMORISING.not_measured("there was one evaluation alone")
    before, last = map(float, held_out.values[-2:])
    error = math.sqrt(last * (1 - last) / max(rows, 1))
    what = (
        f"training pairs are told to {training:.0%}, held-out ones to {last:.0%} ({before:.0%} at the "
        "evaluation before)"
    )
    found = training > MEMORISED and training - last > max(GAP, 2 * error) and last - before < 0.01
    measured = {"training_accuracy": training, "held_out_accuracy": last, "before": before}
    return MEMORISING(found, what, measured)


def runaway(margins: Curve, chosen: Curve) -> Finding:
    """Whether margins grow on and on while wanted answers fall.

    Found if the mean margin is beyond 5, its slope in the later half of the lines is at least 0.8 of
    that in the earlier one, and wanted answers are below the reference by a nat and still fall.

    Args:
        margins: by step.
        chosen: log-ratio of wanted answers by step, nats.
    """
    if len(margins.values) < FEWEST_LINES or len(chosen.values) < FEWEST_LINES:
        return RUNAWAY.not_measured("too few log lines")
    half = len(margins.values) // 2
    earlier, later = _slope(margins, slice(half)), _slope(margins, slice(half, None))
    last, fallen = float(margins.values[-1]), float(chosen.values[-1])
    what = f"the mean margin is {last:.1f} and grows as fast as before, wanted answers are at {fallen:+.1f} nats"
    grows = last > SATURATED and later > 0 and later >= LINEAR * earlier
    falls = fallen < -FELL_NATS and _slope(chosen, slice(len(chosen.values) // 2, None)) < 0
    measured = {"margin": last, "slope_earlier": earlier, "slope_later": later, "chosen": fallen}
    return RUNAWAY(grows and falls, what, measured)


def _slope(curve: Curve, part: slice) -> float:
    """Return the slope of a straight line through a part of a curve, a step."""
    return float(np.polyfit(curve.steps[part], curve.values[part], 1)[0])
