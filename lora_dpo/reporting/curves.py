"""Logged values by step: which metrics there are, in which order, and what smooths them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_dpo.reporting.reading import Recorded, finite, is_number

HELD_OUT = "eval_"
FEWEST_SMOOTHED = 16
NOT_SMOOTHED = {"learning_rate", "memory/peak_gib"}  # they have no noise

# What people look at, in the order in which they do, with units.
UNITS = {
    "loss": "loss",
    "rewards/margins": "reward",
    "rewards/accuracies": "share in the right order",
    "rewards/chosen": "reward",
    "rewards/rejected": "reward",
    "logratios/chosen": "nats an answer",
    "logratios/rejected": "nats an answer",
    "kl": "nats an answer",
    "grad_norm": "norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "pairs_per_second": "pairs/s",
    "memory/peak_gib": "GiB",
    "logps/chosen": "nats an answer",
    "logps/rejected": "nats an answer",
    "lengths/chosen": "tokens",
    "lengths/rejected": "tokens",
}
# Told elsewhere on the page, or about the evaluation and not about the policy.
NOT_DRAWN = {
    "epoch",
    "step",
    "total_flos",
    "train_loss",
    "eval_model_preparation_time",
    *(
        f"{part}_{name}"
        for part in ("train", "eval")
        for name in ("runtime", "samples_per_second", "steps_per_second")
    ),
}


@dataclass(frozen=True)
class Curve:
    """The values of one metric in one run, by step; None where a value is not finite."""

    run: str
    index: int
    metric: str
    held_out: bool
    steps: tuple[int | float, ...]
    values: tuple[float | None, ...]

    @property
    def name(self) -> str:
        """Run and part."""
        return f"{self.run} {'held-out' if self.held_out else 'training'}"


@dataclass(frozen=True)
class Smoothed:
    """Mean, least and greatest value of a window around each point."""

    window: int
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


def metrics_of(runs: Iterable[Recorded]) -> tuple[list[str], list[str]]:
    """Return the metrics that have a chart, in order, and the logged names that have none."""
    drawn: dict[str, None] = {}
    others: dict[str, None] = {}
    for run in runs:
        for line in run.history:
            for key, value in line.items():
                kept = is_number(value) and key not in NOT_DRAWN
                (drawn if kept else others)[key.removeprefix(HELD_OUT) if kept else key] = None
    known = [name for name in UNITS if name in drawn]
    return known + sorted(set(drawn) - set(known)), sorted(set(others) - {"step"})


def curves_of(runs: Sequence[Recorded], metric: str) -> list[Curve]:
    """Return a metric's curves: of each run the training one, then the held-out one, if logged."""
    found = []
    for index, run in enumerate(runs):
        for held_out, key in ((False, metric), (True, f"{HELD_OUT}{metric}")):
            # a line that was logged twice for one step is the newer one
            values = {x["step"]: x[key] for x in run.history if is_number(x.get(key))}
            if values:
                steps = tuple(sorted(values))
                points = tuple(finite(values[step]) for step in steps)
                found.append(Curve(run.name, index, metric, held_out, steps, points))
    return found


def smoothed(curve: Curve) -> Smoothed | None:
    """Smooth a training curve over a twentieth of its points, 5 at least; None for a short one."""
    count = len(curve.values)
    if curve.held_out or count < FEWEST_SMOOTHED or curve.metric in NOT_SMOOTHED:
        return None
    window = max(5, count // 20 | 1)
    around = [
        [v for v in curve.values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None]
        for i in range(count)
    ]
    return Smoothed(
        window,
        tuple(sum(values) / len(values) if values else None for values in around),
        tuple(min(values, default=None) for values in around),
        tuple(max(values, default=None) for values in around),
    )
