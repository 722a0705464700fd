"""Held-out rows under policy and reference: means of every metric with intervals.

Rows that share a prompt are not independent, so intervals are clustered by prompt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_dpo.data import Tokenised
from lora_dpo.engine import collate
from lora_dpo.forward import labelled_stats, pair_stats
from lora_dpo.heads import home_device
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.metrics import row_metrics
from lora_dpo.objectives import BoundObjective
from lora_dpo.objectives.bound import States
from lora_dpo.reference_cache import known_reference, row_places
from lora_dpo.shortage import Width, narrowing
from lora_dpo.showing import Told, bar
from lora_dpo.stats import WITH_GRADIENT, AnyStats
from lora_dpo.stepping import row_length

logger = logging.getLogger("lora_dpo")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, repr=False)
class Evaluation(Told):
    """Metrics of one model on held-out rows.

    Args:
        estimates: mean and 95 % interval of each metric.
        rows: how many; ``prompts``: distinct prompts among them, which the intervals are clustered by.
    """

    estimates: Mapping[str, Estimate]
    rows: int
    prompts: int

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {name: [e.mean, e.low, e.high] for name, e in self.estimates.items()}
        return {"rows": self.rows, "prompts": self.prompts, "mean_low_high": values}

    @property
    def title(self) -> str:
        """How many rows, and how many of them are in the right order."""
        accuracy = self.estimates.get("rewards/accuracies")
        told = f", rewards/accuracies {accuracy}" if accuracy else ""
        return f"{self.rows} held-out rows, {self.prompts} prompts{told}"

    def lines(self) -> list[str]:
        """Return a line a metric."""
        width = max(map(len, self.estimates))
        lines = [f"{self.rows} held-out rows, {self.prompts} prompts; mean [95 % interval]"]
        return lines + [f"  {name:<{width}}  {value}" for name, value in self.estimates.items()]


def evaluate_policy(
    policy: nn.Module,
    data: Tokenised,
    objective: BoundObjective,
    *,
    states: States | None = None,
    pad_id: int = 0,
    batch_size: int = 4,
    chunk: int = CHUNK_TOKENS,
) -> Evaluation:
    """Return the metrics of ``policy`` on held-out rows, whatever the batch size.

    Args:
        policy: evaluated without dropout; its mode is restored.
        data: tokenised rows of the kind that the objective takes.
        objective: whose losses and rewards are reported.
        states: what the objective remembers of training, if it does.
        pad_id: token id that fills up rows; any will do, padding is masked.
        batch_size: rows of a forward pass, fewer where memory runs out.
    """
    stats = collect_stats(
        policy, data, objective, pad_id=pad_id, batch_size=batch_size, chunk=chunk
    )
    tell_of_gaps(stats, data.rows)
    return evaluate_stats(stats, objective, data.rows["prompt_key"], states)


def collect_stats(
    policy: nn.Module,
    data: Tokenised,
    objective: BoundObjective,
    *,
    pad_id: int = 0,
    batch_size: int = 4,
    chunk: int = CHUNK_TOKENS,
) -> AnyStats:
    """Return the statistics that ``objective`` reads, of all rows in their order, on the CPU."""
    device = home_device(policy)
    order = sorted(range(len(data)), key=lambda i: row_length(data.rows[i]))
    parts: list[AnyStats] = []
    was_training = policy.training
    policy.eval()
    try:
        # draws of an objective (SamPO's) are the same in every evaluation
        shown = bar("evaluating", len(order), "rows")
        with torch.no_grad(), torch.random.fork_rng(devices=[]), shown as advance:
            torch.manual_seed(0)

            width = Width(batch_size)

            def run(rows: list[Mapping[str, Any]]) -> AnyStats:
                stats = rows_stats(policy, rows, objective, device, pad_id=pad_id, chunk=chunk)
                return stats.map(lambda _, value: value.cpu())

            for part, stats in narrowing(policy, data.rows, order, width, run, "evaluation"):
                parts.append(stats)
                advance(len(part))
    finally:
        policy.train(was_training)
    back = torch.tensor(order).argsort()
    return joined(parts).map(lambda _, value: value[back])


def rows_stats(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    objective: BoundObjective,
    device: Any,
    *,
    pad_id: int = 0,
    chunk: int = CHUNK_TOKENS,
    gradient_only: bool = False,
) -> AnyStats:
    """Return the statistics that ``objective`` reads of a few tokenised rows, as one batch.

    With ``gradient_only`` what carries no gradient is left out, the reference's log-probs above all.
    """
    reads = objective.reference and not gradient_only
    options: dict[str, Any] = {
        "with_reference": reads,
        "needs": objective.needs & WITH_GRADIENT if gradient_only else objective.needs,
        "fixed": known_reference(rows, device) if reads else None,
        "chunk": chunk,
    }
    batch = collate(model, rows, pad_id=pad_id).to(device)
    if objective.data == "paired":
        return pair_stats(model, batch, **options)
    return labelled_stats(model, batch, **options)


def evaluate_stats(
    stats: AnyStats,
    objective: BoundObjective,
    prompts: Sequence[Any],
    states: States | None = None,
) -> Evaluation:
    """Return the metrics of rows whose statistics are known; losses that couple rows see all."""
    exact = stats.map(lambda _, v: v.double() if v.is_floating_point() else v)
    with torch.random.fork_rng(devices=[]):  # beta-DPO draws rows: the same in every evaluation
        torch.manual_seed(0)
        losses = objective(exact, states)
    values = row_metrics(objective, exact, losses)
    return summarise({name: value.double().numpy() for name, value in values.items()}, prompts)


def tell_of_gaps(stats: AnyStats, rows: Any) -> None:
    """Warn of rows with a log-prob that is no finite number, by name: figures leave NaN out.

    Args:
        stats: of all rows.
        rows: with file and row, in the same order.
    """
    logps = [value for name, value in stats.present().items() if name.endswith("logps")]
    bad = (~torch.isfinite(torch.stack(logps))).any(0).nonzero().flatten().tolist()
    if bad:
        logger.warning(
            "held out: %d of %d rows have a log-prob that is not a finite number, which figures leave out "
            "or become: %s",
            len(bad), len(stats), row_places([rows[place] for place in bad]),
        )  # fmt: skip


def summarise(columns: Mapping[str, Array], prompts: Sequence[Any]) -> Evaluation:
    """Return mean and 95 % interval of each column of per-row values, clustered by prompt.

    NaN is no value; a column without any is left out.
    """
    _, clusters = np.unique(np.asarray(prompts), return_inverse=True)
    estimates = {}
    for name, values in columns.items():
        there = ~np.isnan(values)
        if not there.any():
            continue
        _, own = np.unique(clusters[there], return_inverse=True)
        interval = accuracy_interval if name.endswith("accuracies") else mean_interval
        estimates[name] = interval(values[there], own)
    return Evaluation(estimates, len(clusters), int(clusters.max()) + 1)


def mean_interval(values: Array, clusters: NDArray[np.int64], level: float = 0.95) -> Estimate:
    """Return the mean with a cluster-robust t interval (infinite with one cluster)."""
    from scipy import stats

    mean = float(values.mean())
    count = int(clusters.max()) + 1
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * math.sqrt(_variance(values, clusters))
    return Estimate(mean, mean - half, mean + half)


def accuracy_interval(values: Array, clusters: NDArray[np.int64], level: float = 0.95) -> Estimate:
    """Return a share with a Wilson interval on the effective number of independent rows.

    That number is what the cluster-robust variance leaves of the rows, at most one per cluster
    where the values do not vary, so that 100 % right is not reported as certain.
    """
    from scipy import stats

    mean, count = float(values.mean()), int(clusters.max()) + 1
    variance = _variance(values, clusters) if count > 1 else 0.0
    effective = mean * (1 - mean) / variance if variance > 0 else float(count)
    effective = min(max(effective, 1.0), float(len(values)))
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z * math.sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    half /= 1 + z * z / effective
    # at the ends of the scale the formula gives the end, but for rounding
    low = centre - half if mean > 0 else 0.0
    return Estimate(mean, max(0.0, low), min(1.0, centre + half) if mean < 1 else 1.0)


def _variance(values: Array, clusters: NDArray[np.int64]) -> float:
    """Variance of the mean when only the sums of clusters are independent."""
    sums = np.bincount(clusters, weights=values - values.mean())
    count = len(sums)
    return float(count / (count - 1) * (sums**2).sum() / len(values) ** 2)


def joined(parts: Sequence[AnyStats]) -> AnyStats:
    """Return the statistics of several batches as those of one."""
    return type(parts[0]).cat(parts)  # type: ignore[arg-type]  # all of one kind
