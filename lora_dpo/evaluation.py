"""Held-out pairs under policy and reference: means of every metric with intervals.

Pairs that share a prompt are not independent, so intervals are clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_dpo.data import Tokenised, collate_pairs
from lora_dpo.forward import pair_stats
from lora_dpo.logprobs import CHUNK_TOKENS
from lora_dpo.metrics import pair_metrics
from lora_dpo.objectives import BoundObjective

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model on held-out pairs.

    Args:
        estimates: mean and 95 % interval of each metric.
        rows: pairs; ``prompts``: distinct prompts among them, which the intervals are clustered by.
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

    def __str__(self) -> str:
        width = max(map(len, self.estimates))
        lines = [f"{self.rows} held-out pairs, {self.prompts} prompts; mean [95 % interval]"]
        lines += [f"  {name:<{width}}  {value}" for name, value in self.estimates.items()]
        return "\n".join(lines)


def evaluate_pairs(
    policy: nn.Module,
    data: Tokenised,
    objective: BoundObjective,
    *,
    pad_id: int,
    batch_size: int = 4,
    chunk: int = CHUNK_TOKENS,
) -> Evaluation:
    """Return the metrics of ``policy`` on held-out pairs.

    Args:
        policy: evaluated without dropout; its mode is restored.
        data: tokenised pairs.
        objective: whose losses and rewards are reported.
        pad_id: token id that fills up rows; any will do, padding is masked.
        batch_size: pairs of a forward pass.
    """
    device = next(policy.parameters()).device
    order = np.argsort([_length(row) for row in data.rows], kind="stable")
    columns: dict[str, list[Array]] = {}
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                rows = [data.rows[int(i)] for i in order[start : start + batch_size]]
                batch = collate_pairs(rows, pad_id=pad_id).to(device)
                stats = pair_stats(policy, batch, with_reference=objective.reference, chunk=chunk)
                for name, value in pair_metrics(objective, stats, objective(stats)).items():
                    columns.setdefault(name, []).append(value.double().cpu().numpy())
    finally:
        policy.train(was_training)
    prompts = [data.rows[int(i)]["prompt_key"] for i in order]
    return summarise({k: np.concatenate(v) for k, v in columns.items()}, prompts)


def summarise(columns: Mapping[str, Array], prompts: Sequence[Any]) -> Evaluation:
    """Return mean and 95 % interval of each column of per-pair values, clustered by prompt."""
    _, clusters = np.unique(np.asarray(prompts), return_inverse=True)
    estimates = {
        name: accuracy_interval(values, clusters)
        if name.endswith("accuracies")
        else mean_interval(values, clusters)
        for name, values in columns.items()
    }
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
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half))


def _variance(values: Array, clusters: NDArray[np.int64]) -> float:
    """Variance of the mean when only the sums of clusters are independent."""
    sums = np.bincount(clusters, weights=values - values.mean())
    count = len(sums)
    return float(count / (count - 1) * (sums**2).sum() / len(values) ** 2)


def _length(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
