"""The records that stand between a model and an objective: statistics of one batch, as tensors.

All log-probabilities are natural logarithms (nats), summed over the completion tokens of a row
(end-of-turn token included, prompt and padding excluded). ``logratio`` is policy minus reference.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Stats:
    def __post_init__(self) -> None:
        _check_fields(self)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if value is None and name.startswith("reference_"):
            raise ValueError(
                f"{type(self).__name__}.{name}: there is no reference in this record. An objective "
                "that reads it must declare reference=True, and the caller must supply it."
            )
        return value

    @property
    def has_reference(self) -> bool:
        """Whether the log-probs of the reference are in the record."""
        values = (
            object.__getattribute__(self, f.name)
            for f in fields(self)
            if f.name.startswith("reference_")
        )
        return all(value is not None for value in values)


@dataclass(frozen=True)
class PairStats(_Stats):
    """Statistics of a batch of preference pairs; every field is ``[batch]``.

    Args:
        policy_chosen_logps: summed log-probs of the chosen completions under the policy, nats.
        policy_rejected_logps: the same for the rejected completions.
        chosen_lengths: completion tokens that the sums run over, at least 1.
        rejected_lengths: the same for the rejected completions.
        reference_chosen_logps: sums under the reference; None for objectives without one.
        reference_rejected_logps: the same for the rejected completions.

    Raises:
        TypeError: a log-prob that is not float32 or float64 (bf16 and fp16 lose the margin).
        ValueError: shapes that differ, lengths below 1, half a reference, a reference with gradient.
    """

    policy_chosen_logps: Tensor  # [batch]
    policy_rejected_logps: Tensor  # [batch]
    chosen_lengths: Tensor  # [batch]
    rejected_lengths: Tensor  # [batch]
    reference_chosen_logps: Tensor = None  # type: ignore[assignment]  # [batch], guarded on reading
    reference_rejected_logps: Tensor = None  # type: ignore[assignment]  # [batch]

    @property
    def chosen_logratios(self) -> Tensor:
        """Policy minus reference on the chosen side, ``[batch]``, nats."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Policy minus reference on the rejected side, ``[batch]``, nats."""
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected log-ratio, ``[batch]``, nats: what DPO pushes up."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def policy_mean_chosen_logps(self) -> Tensor:
        """Log-prob of a chosen completion per token, ``[batch]``, nats a token."""
        return self.policy_chosen_logps / self.chosen_lengths

    @property
    def policy_mean_rejected_logps(self) -> Tensor:
        """Log-prob of a rejected completion per token, ``[batch]``, nats a token."""
        return self.policy_rejected_logps / self.rejected_lengths

    def at_reference(self) -> PairStats:
        """Return the record as it is before the first update, where the policy is the reference."""
        return PairStats(
            self.reference_chosen_logps,
            self.reference_rejected_logps,
            self.chosen_lengths,
            self.rejected_lengths,
            self.reference_chosen_logps,
            self.reference_rejected_logps,
        )


def _check_fields(stats: _Stats) -> None:
    name = type(stats).__name__
    given = {f.name: object.__getattribute__(stats, f.name) for f in fields(stats)}
    absent = [key for key, value in given.items() if value is None]
    tensors = {key: value for key, value in given.items() if value is not None}
    references = [key for key in given if key.startswith("reference_")]
    if absent and absent != references:
        raise ValueError(f"{name}: {', '.join(absent)} missing; a reference is whole or absent.")
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{name}: all fields must be [batch], got {shapes}.")
    for key, value in tensors.items():
        _check_tensor(f"{name}.{key}", key, value)


def _check_tensor(where: str, key: str, value: Tensor) -> None:
    if key.endswith("_logps"):
        if value.dtype not in FLOATS:
            raise TypeError(f"{where}: is {value.dtype}; log-probs must be float32 or float64.")
        if key.startswith("reference_") and value.requires_grad:
            raise ValueError(f"{where}: carries gradient; the reference never does. Detach it.")
    if key.endswith("_lengths") and value.device.type == "cpu" and bool((value < 1).any()):
        raise ValueError(f"{where}: holds {int(value.min())}; a completion has at least one token.")
