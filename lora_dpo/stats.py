"""The records that stand between a model and an objective: statistics of one batch, as tensors.

All log-probabilities are natural logarithms (nats), summed over the completion tokens of a row
(end-of-turn token included, prompt and padding excluded). ``logratio`` is policy minus reference.
What only some objectives read is None unless the objective declares that it needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)

# A declared need -> the fields that it fills. "lengths" are always there, and declared only where a
# loss reads them.
PAIR_NEEDS: Mapping[str, tuple[str, ...]] = {
    "lengths": ("chosen_lengths", "rejected_lengths"),
    "scores": ("chosen_scores", "rejected_scores"),
    "first_logps": (
        "policy_chosen_first_logps",
        "policy_rejected_first_logps",
        "reference_chosen_first_logps",
        "reference_rejected_first_logps",
    ),
    "sampled_logps": (
        "policy_chosen_sampled_logps",
        "policy_rejected_sampled_logps",
        "reference_chosen_sampled_logps",
        "reference_rejected_sampled_logps",
    ),
    "confidences": ("chosen_confidences", "rejected_confidences"),
    "kls": ("policy_chosen_kls", "policy_rejected_kls"),
}
LABELLED_NEEDS: Mapping[str, tuple[str, ...]] = {
    "lengths": ("lengths",),
    "mismatched": ("policy_mismatched_logps", "reference_mismatched_logps"),
}
# Needs whose fields carry gradient into the policy.
WITH_GRADIENT = frozenset({"first_logps", "sampled_logps", "kls"})
# Needs for which the reference runs even where its summed log-probs are known.
UNKEPT = frozenset({"first_logps", "sampled_logps", "kls"})


@dataclass(frozen=True)
class _Stats:
    def __post_init__(self) -> None:
        _check_fields(self)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if value is None and name.startswith("reference_") and name.endswith("_logps"):
            raise ValueError(
                f"{type(self).__name__}.{name}: there is no reference in this record. An objective "
                "that reads it must declare reference=True, and the caller must supply it."
            )
        if value is None and not name.startswith("__"):
            raise ValueError(
                f"{type(self).__name__}.{name}: not in this record. An objective that reads it must "
                "declare what it needs (needs=...), and the caller must supply it."
            )
        return value

    @property
    def has_reference(self) -> bool:
        """Whether the log-probs of the reference are in the record."""
        return all(f"reference_{name}" in self.present() for name in self._sides)

    @property
    def _sides(self) -> tuple[str, ...]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(next(iter(self.present().values())))

    def present(self) -> dict[str, Tensor]:
        """Return the fields that are there, by name."""
        values = {f.name: object.__getattribute__(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """Return the record with ``change(name, tensor)`` in place of each field."""
        return type(self)(**{name: change(name, value) for name, value in self.present().items()})

    def detach(self) -> Self:
        """Return the record without gradient."""
        return self.map(lambda _, value: value.detach())

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of several records as one record."""
        names = parts[0].present()
        return cls(**{name: torch.cat([p.present()[name] for p in parts]) for name in names})


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
        chosen_scores, rejected_scores: what the data say of an answer's worth (need ``scores``).
        policy_chosen_first_logps (and three more): sums over the first ``min(lengths)`` tokens of
            each side (need ``first_logps``; LD-DPO).
        policy_chosen_sampled_logps (and three more): sums over as many random tokens of each side,
            the same ones for policy and reference (need ``sampled_logps``; SamPO).
        chosen_confidences, rejected_confidences: mean over tokens of ``log pi(y_t) - log sum_v
            pi(v)^2``, nats, without gradient (need ``confidences``; WPO).
        policy_chosen_kls, policy_rejected_kls: sum over tokens of ``KL(reference || policy)``, nats
            (need ``kls``; TDPO).

    Raises:
        TypeError: a log-prob that is not float32 or float64 (bf16 and fp16 lose the margin).
        ValueError: shapes that differ, lengths below 1, half a reference, a reference with gradient.
    """

    policy_chosen_logps: Tensor  # [batch], as every field
    policy_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen_logps: Tensor = None  # type: ignore[assignment]  # guarded on reading, as all below
    reference_rejected_logps: Tensor = None  # type: ignore[assignment]
    chosen_scores: Tensor = None  # type: ignore[assignment]
    rejected_scores: Tensor = None  # type: ignore[assignment]
    policy_chosen_first_logps: Tensor = None  # type: ignore[assignment]
    policy_rejected_first_logps: Tensor = None  # type: ignore[assignment]
    reference_chosen_first_logps: Tensor = None  # type: ignore[assignment]
    reference_rejected_first_logps: Tensor = None  # type: ignore[assignment]
    policy_chosen_sampled_logps: Tensor = None  # type: ignore[assignment]
    policy_rejected_sampled_logps: Tensor = None  # type: ignore[assignment]
    reference_chosen_sampled_logps: Tensor = None  # type: ignore[assignment]
    reference_rejected_sampled_logps: Tensor = None  # type: ignore[assignment]
    chosen_confidences: Tensor = None  # type: ignore[assignment]
    rejected_confidences: Tensor = None  # type: ignore[assignment]
    policy_chosen_kls: Tensor = None  # type: ignore[assignment]
    policy_rejected_kls: Tensor = None  # type: ignore[assignment]

    @property
    def _sides(self) -> tuple[str, ...]:
        return ("chosen_logps", "rejected_logps")

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
    def mean_chosen_logratios(self) -> Tensor:
        """Log-ratio of a chosen completion per token, ``[batch]``, nats a token."""
        return self.chosen_logratios / self.chosen_lengths

    @property
    def mean_rejected_logratios(self) -> Tensor:
        """Log-ratio of a rejected completion per token, ``[batch]``, nats a token."""
        return self.rejected_logratios / self.rejected_lengths

    @property
    def policy_mean_chosen_logps(self) -> Tensor:
        """Log-prob of a chosen completion per token, ``[batch]``, nats a token."""
        return self.policy_chosen_logps / self.chosen_lengths

    @property
    def policy_mean_rejected_logps(self) -> Tensor:
        """Log-prob of a rejected completion per token, ``[batch]``, nats a token."""
        return self.policy_rejected_logps / self.rejected_lengths

    @property
    def score_gaps(self) -> Tensor:
        """Score of chosen minus score of rejected, ``[batch]``."""
        return self.chosen_scores - self.rejected_scores

    def at_reference(self) -> PairStats:
        """Return the record as it is before the first update, where the policy is the reference."""
        return _at_reference(self)


@dataclass(frozen=True)
class LabelledStats(_Stats):
    """Statistics of a batch of single answers, wanted or not; every field is ``[batch]``.

    Args:
        policy_logps: summed log-probs of the completions under the policy, nats.
        lengths: completion tokens that the sums run over, at least 1.
        labels: True where the answer is wanted.
        reference_logps: sums under the reference; None for objectives without one.
        policy_mismatched_logps: sums of another row's completion after this row's prompt, without
            gradient (need ``mismatched``; KTO's estimate of the KL to the reference).
        reference_mismatched_logps: the same under the reference.

    Raises:
        TypeError, ValueError: as ``PairStats``; labels that are not bool.
    """

    policy_logps: Tensor  # [batch], as every field
    lengths: Tensor
    labels: Tensor
    reference_logps: Tensor = None  # type: ignore[assignment]
    policy_mismatched_logps: Tensor = None  # type: ignore[assignment]
    reference_mismatched_logps: Tensor = None  # type: ignore[assignment]

    @property
    def _sides(self) -> tuple[str, ...]:
        return ("logps",)

    @property
    def logratios(self) -> Tensor:
        """Policy minus reference, ``[batch]``, nats."""
        return self.policy_logps - self.reference_logps

    @property
    def mismatched_logratios(self) -> Tensor:
        """Policy minus reference of the mismatched completions, ``[batch]``, nats."""
        return self.policy_mismatched_logps - self.reference_mismatched_logps

    @property
    def policy_mean_logps(self) -> Tensor:
        """Log-prob of a completion per token, ``[batch]``, nats a token."""
        return self.policy_logps / self.lengths

    def at_reference(self) -> LabelledStats:
        """Return the record as it is before the first update, where the policy is the reference."""
        return _at_reference(self)


AnyStats = PairStats | LabelledStats
S = TypeVar("S", PairStats, LabelledStats)


def stats_of(values: Mapping[str, Tensor]) -> AnyStats:
    """Return the record that holds these fields, whatever floats they were sent as."""
    exact = {
        name: value.bool() if name == "labels" else value.long() if "lengths" in name else value
        for name, value in values.items()
    }
    return PairStats(**exact) if "chosen_lengths" in exact else LabelledStats(**exact)


def reference_logps(stats: AnyStats) -> Tensor:
    """Return the log-probs of all rows under the reference: chosen first, then rejected."""
    return torch.cat([getattr(stats, f"reference_{side}") for side in stats._sides])


def largest_logratio(stats: AnyStats) -> Tensor:
    """Return the largest distance of a log-prob from the reference's, nats."""
    ours = torch.cat([getattr(stats, f"policy_{side}") for side in stats._sides])
    return (ours - reference_logps(stats)).abs().max()


def _at_reference(stats: S) -> S:
    present = stats.present()
    values = dict(present)
    for name in present:
        if name.startswith("reference_"):
            values["policy_" + name.removeprefix("reference_")] = present[name]
        elif name.endswith("_kls"):
            values[name] = torch.zeros_like(present[name])
    return type(stats)(**values)


def _check_fields(stats: _Stats) -> None:
    name = type(stats).__name__
    given = stats.present()
    required = [f.name for f in fields(stats) if f.default is MISSING]
    if absent := [key for key in required if key not in given]:
        raise ValueError(f"{name}: {', '.join(absent)} missing.")
    halves = [f"reference_{side}" for side in stats._sides]
    absent = [key for key in halves if key not in given]
    if absent and len(absent) < len(halves):
        raise ValueError(f"{name}: {', '.join(absent)} missing; a reference is whole or absent.")
    shapes = {key: tuple(value.shape) for key, value in given.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{name}: all fields must be [batch], got {shapes}.")
    for key, value in given.items():
        _check_tensor(f"{name}.{key}", key, value)


def _check_tensor(where: str, key: str, value: Tensor) -> None:
    if key.endswith(("_logps", "_kls", "_confidences", "_scores")):
        if value.dtype not in FLOATS:
            raise TypeError(f"{where}: is {value.dtype}; it must be float32 or float64.")
        if key.startswith("reference_") and value.requires_grad:
            raise ValueError(f"{where}: carries gradient; the reference never does. Detach it.")
    if key == "labels" and value.dtype != torch.bool:
        raise TypeError(f"{where}: is {value.dtype}; labels are bool.")
    if key.endswith("lengths") and value.device.type == "cpu" and bool((value < 1).any()):
        raise ValueError(f"{where}: holds {int(value.min())}; a completion has at least one token.")
