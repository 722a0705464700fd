"""Metrics of preference training, under the names that people's dashboards know.

Each is a value per pair; a window adds them up until the next log line, so that what is logged is
the mean over every pair since the last one and not over the last micro-batch.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """Sums of metrics since the last log line, kept on the device until they are read.

    Part of a checkpoint, so that a resumed run logs what an uninterrupted one does.
    """

    names: list[str] = field(default_factory=list)
    totals: Tensor | None = None  # [metric], float64
    pairs: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a batch of per-pair values."""
        self.names = list(values)
        totals = torch.stack([value.double().sum() for value in values.values()])
        self.totals = totals if self.totals is None else self.totals.to(totals.device) + totals
        self.pairs += len(values[self.names[0]])

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over all pairs added, and start again."""
        state = self.state()
        self.totals, self.pairs = None, 0
        return {name: total / state["pairs"] for name, total in state["sums"].items()}

    def state(self) -> dict[str, Any]:
        """Return plain values, exactly: float64 survives JSON."""
        totals = [] if self.totals is None else self.totals.tolist()
        sums = dict(zip(self.names, totals, strict=True)) if totals else {}
        return {"sums": sums, "pairs": self.pairs}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Window:
        """Return the window that ``state`` describes."""
        sums = state["sums"]
        totals = torch.tensor(list(sums.values()), dtype=torch.float64) if sums else None
        return cls(list(sums), totals, state["pairs"])


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of the process so far, GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
