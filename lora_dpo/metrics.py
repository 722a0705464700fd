"""Metrics of preference training, under the names that people's dashboards know.

Each is a value per row; a window adds them up until the next log line, so that what is logged is
the mean over every row since the last one and not over the last micro-batch.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_dpo.objectives import BoundObjective
from lora_dpo.stats import AnyStats, LabelledStats, PairStats


def row_metrics(objective: BoundObjective, stats: AnyStats, losses: Tensor) -> dict[str, Tensor]:
    """Return every metric per row, each ``[batch]``, detached; NaN where a row has none.

    ``rewards/*`` are the objective's own; ``logratios/*`` (policy minus reference, nats) exist only
    with a reference. ``rewards/accuracies`` is the share in the right order, ties counting half: of
    the given pairs, or of all couples of a wanted and an unwanted row. Of labelled rows the wanted
    ones are ``chosen`` and the others ``rejected``; ``kl`` is KTO's estimate of the KL to the
    reference, from mismatched completions.
    """
    with torch.no_grad():
        if isinstance(stats, PairStats):
            values = _pair_values(objective, stats)
        else:
            values = _labelled_values(objective, stats)
        return {name: value.detach() for name, value in {"loss": losses, **values}.items()}


def _pair_values(objective: BoundObjective, stats: PairStats) -> dict[str, Tensor]:
    chosen, rejected = objective.rewards(stats)
    margins = chosen - rejected
    values = {
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
    return values


def _labelled_values(objective: BoundObjective, stats: LabelledStats) -> dict[str, Tensor]:
    (rewards,) = objective.rewards(stats)
    columns = {"rewards": rewards, "logps": stats.policy_logps, "lengths": stats.lengths}
    if stats.has_reference:
        columns["logratios"] = stats.logratios
    values = {}
    for name, column in columns.items():
        column = column.to(rewards.dtype)
        values[f"{name}/chosen"] = column.where(stats.labels, torch.nan)
        values[f"{name}/rejected"] = column.where(~stats.labels, torch.nan)
    values |= class_contrasts(rewards, stats.labels)
    if "policy_mismatched_logps" in stats.present():
        values["kl"] = stats.mismatched_logratios
    return values


def class_contrasts(rewards: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return margin and order of wanted against unwanted rows, ``[batch]``.

    Each column's mean is the estimate (difference of the classes' means; share of couples in the
    right order), and its spread over rows is that of the estimate's influence function, so that an
    interval of the mean is one of the estimate. NaN where a class is absent.
    """
    wanted, unwanted = rewards[labels], rewards[~labels]
    if not len(wanted) or not len(unwanted):
        nothing = torch.full_like(rewards, torch.nan)
        return {"rewards/margins": nothing, "rewards/accuracies": nothing.clone()}
    wins = ((wanted[:, None] - unwanted[None]).sign() + 1) / 2  # [wanted, unwanted]
    estimates = {
        "rewards/margins": (wanted - wanted.mean(), unwanted.mean() - unwanted),
        "rewards/accuracies": (wins.mean(1) - wins.mean(), wins.mean(0) - wins.mean()),
    }
    centres = {
        "rewards/margins": wanted.mean() - unwanted.mean(),
        "rewards/accuracies": wins.mean(),
    }
    columns = {}
    for name, (of_wanted, of_unwanted) in estimates.items():
        column = torch.empty_like(rewards)
        column[labels] = of_wanted * (len(rewards) / len(wanted))
        column[~labels] = of_unwanted * (len(rewards) / len(unwanted))
        columns[name] = column + centres[name]
    return columns


@dataclass
class Window:
    """Sums of metrics since the last log line, kept on the device until they are read.

    Part of a checkpoint, so that a resumed run logs what an uninterrupted one does. NaN is no value:
    a metric's mean is over the rows that have one. ``loss`` is that of the whole run.
    """

    names: list[str] = field(default_factory=list)
    totals: Tensor | None = None  # [2, metric], float64: sums and counts
    loss: Tensor | None = None  # [2], the same of the loss alone, since the run began

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a batch of per-row values."""
        self.names = list(values)
        table = torch.stack([value.double() for value in values.values()], dim=1)  # [batch, metric]
        missing = table.isnan()
        # a loss that is not a number must not look like one that is not there
        missing[:, self.names.index("loss")] = False
        sums = table.masked_fill(missing, 0.0).sum(0)
        totals = torch.stack([sums, (~missing).double().sum(0)])
        self.totals = totals if self.totals is None else self.totals.to(totals.device) + totals
        loss = totals[:, self.names.index("loss")]
        self.loss = loss if self.loss is None else self.loss.to(loss.device) + loss

    @property
    def loss_of_the_run(self) -> float:
        """The mean over every row since the run began; NaN before the first."""
        total, count = self.sums_of_the_run()
        return total / count if count else math.nan

    def sums_of_the_run(self) -> list[float]:
        """Return sum and count of the loss since the run began."""
        return [0.0, 0.0] if self.loss is None else list(self.loss.tolist())

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over all rows added, and start again."""
        state = self.state()
        self.totals = None
        return {
            name: total / count
            for name, (total, count) in state.items()
            if count  # a class that did not occur has no mean
        }

    def state(self) -> dict[str, list[float]]:
        """Return sum and count of each metric, exactly: float64 survives JSON."""
        if self.totals is None:
            return {}
        return dict(zip(self.names, self.totals.T.tolist(), strict=True))

    @classmethod
    def of(cls, state: Mapping[str, Any], loss: Sequence[float] = (0.0, 0.0)) -> Window:
        """Return the window that ``state`` and ``sums_of_the_run`` describe."""
        values = list(state.values())
        totals = torch.tensor(values, dtype=torch.float64).T.contiguous() if values else None
        return cls(list(state), totals, torch.tensor(loss, dtype=torch.float64))


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of the process so far, GiB: allocated on a GPU, resident on a CPU."""
    if (allocated := peak_bytes(device)) is not None:
        return allocated / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that the device's own allocator has given out; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
