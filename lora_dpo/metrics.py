"""Metrics of preference training, under the names that people's dashboards know.

Each is a value per pair; a window adds them up until the next log line, so that what is logged is
the mean over every pair since the last one and not over the last micro-batch.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_dpo.objectives import BoundObjective
from lora_dpo.stats import PairStats


def pair_metrics(objective: BoundObjective, stats: PairStats, losses: Tensor) -> dict[str, Tensor]:
    """Return every metric per pair, each ``[batch]``, detached.

    ``rewards/*`` are the objective's own; ``logratios/*`` (policy minus reference, nats) exist only
    with a reference; ``rewards/accuracies`` is 1, 0, or 0.5 for a tie.
    """
    with torch.no_grad():
        chosen, rejected = objective.rewards(stats)
        margins = chosen - rejected
        values = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins.sign() + 1) / 2,
            "logps/chosen": stats.policy_chosen_logps,
            "logps/rejected": stats.policy_rejected_logps,
            "lengths/chosen": stats.chosen_lengths,
            "lengths/rejected": stats.rejected_lengths,
        }
        if stats.has_reference:
            values["logratios/chosen"] = stats.chosen_logratios
            values["logratios/rejected"] = stats.rejected_logratios
        return {name: value.detach() for name, value in values.items()}


@dataclass
class Window:
    """Sums of metrics since the last log line; part of a checkpoint, so that resuming loses none."""

    sums: dict[str, float] = field(default_factory=dict)
    pairs: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a batch of per-pair values."""
        names = list(values)
        totals = torch.stack([values[name].double().sum() for name in names]).tolist()
        for name, total in zip(names, totals, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.pairs += len(values[names[0]])

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over all pairs added, and start again."""
        found = (
            {name: total / self.pairs for name, total in self.sums.items()} if self.pairs else {}
        )
        self.sums, self.pairs = {}, 0
        return found


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of the process so far, GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
