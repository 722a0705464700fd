"""What is measured of answers, with intervals by prompt, and whether a change could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_dpo.comparing.answering import Sampled
from lora_dpo.evaluation import Estimate, accuracy_interval, mean_interval

Array = NDArray[np.float64]
GRAM = 3

# name -> what it is for people, and its unit
LABELS = {
    "tokens": ("length", "tokens"),
    "words": ("length", "words"),
    "stopped": ("stop rate", "share"),
    "distinct": (f"distinct {GRAM}-grams", "share"),
    "empty": ("empty answers", "share"),
    "kl": ("KL to reference", "nats/answer"),
    "reward_wins": ("reward win rate", "share"),
    "judge_wins": ("judge win rate", "share"),
}
SHARES = frozenset({"stopped", "empty"})
WINS = frozenset({"reward_wins", "judge_wins"})
WITHIN_ONE = WINS | {"distinct"}
TESTS = {
    "wilcoxon": "Wilcoxon signed-rank test on the mean change of each prompt",
    "sign": "exact sign test on the prompts that changed",
    "wins": "exact binomial test of prompts won against prompts lost",
}


@dataclass(frozen=True)
class Measured:
    """One figure of one model.

    Args:
        value: its mean, with the 95 % interval by prompt.
        change: against the reference on the same prompts; None for the reference itself, and for
            what compares the two already.
        p_value: of no difference, two-sided, not corrected for how many figures there are.
        test: which, in words; empty without one.
    """

    value: Estimate
    change: Estimate | None = None
    p_value: float | None = None
    test: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an endless interval, of one prompt alone, is null."""
        return {
            "mean_low_high": plain(self.value),
            "change": plain(self.change) if self.change else None,
            "p_value": self.p_value,
            "test": self.test,
        }


def plain(estimate: Estimate) -> list[float | None]:
    """Return mean, low and high, None for what is not finite."""
    values = (estimate.mean, estimate.low, estimate.high)
    return [float(value) if np.isfinite(value) else None for value in values]


def columns_of(answers: Sampled) -> dict[str, Array]:
    """Return what each answer shows by itself, ``[answers]``; NaN where it has no value."""
    return {
        "tokens": np.array([len(ids) for ids in answers.ids], dtype=np.float64),
        "words": np.array([len(text.split()) for text in answers.texts], dtype=np.float64),
        "stopped": np.array(answers.ended, dtype=np.float64),
        "distinct": np.array([distinct(ids) for ids in answers.ids]),
        "empty": np.array([not text.strip() for text in answers.texts], dtype=np.float64),
    }


def distinct(ids: Sequence[int], n: int = GRAM) -> float:
    """Return the share of an answer's n-grams of tokens that are different; NaN without any."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def measure(name: str, values: Array, clusters: NDArray[np.int64]) -> Estimate:
    """Return the mean of a column with its interval; rows without value are left out."""
    there = ~np.isnan(values)
    if not there.any():
        return Estimate(float("nan"), float("nan"), float("nan"))
    _, own = np.unique(clusters[there], return_inverse=True)
    kept = values[there]
    # of win rates most rows may be ties, which vary less than wins and losses do
    if name in SHARES or (name in WINS and not kept.std()):
        return accuracy_interval(kept, own)
    found = mean_interval(kept, own)
    if name not in WITHIN_ONE:
        return found
    return Estimate(found.mean, max(found.low, 0.0), min(found.high, 1.0))


def against(name: str, ours: Array, theirs: Array, clusters: NDArray[np.int64]) -> Measured:
    """Return a figure with its change on the same prompts, and the paired test of it."""
    change = ours - theirs
    there = ~np.isnan(change)
    value = measure(name, ours, clusters)
    if not there.any():
        return Measured(value)
    kept, own = change[there], np.unique(clusters[there], return_inverse=True)[1]
    means = by_prompt(kept, own)
    test = "sign" if name in SHARES else "wilcoxon"
    p_value = sign_test(means) if test == "sign" else wilcoxon_test(means)
    return Measured(value, mean_interval(kept, own), p_value, TESTS[test])


def wins(name: str, shares: Array, clusters: NDArray[np.int64]) -> Measured:
    """Return a win rate against the reference, where 0.5 is none the better."""
    there = ~np.isnan(shares)
    if not there.any():
        return Measured(measure(name, shares, clusters))
    means = by_prompt(shares[there], np.unique(clusters[there], return_inverse=True)[1])
    value = measure(name, shares, clusters)
    return Measured(value, None, sign_test(means - 0.5), TESTS["wins"])


def by_prompt(values: Array, clusters: NDArray[np.int64]) -> Array:
    """Return the mean of each prompt: several samples of one prompt are not independent."""
    return np.bincount(clusters, weights=values) / np.bincount(clusters)


def sign_test(changes: Array) -> float:
    """Return the p-value of as unequal signs by chance; changes of 0 tell nothing."""
    from scipy.stats import binomtest

    up, down = int((changes > 0).sum()), int((changes < 0).sum())
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def wilcoxon_test(changes: Array) -> float:
    """Return the p-value of the signed-rank test; 1 where nothing changed."""
    from scipy.stats import wilcoxon

    moved = changes[changes != 0]  # Wilcoxon's own treatment of zeros
    return float(wilcoxon(moved).pvalue) if len(moved) else 1.0
