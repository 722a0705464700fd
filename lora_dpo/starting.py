"""What is proven before the first step of a run, in words."""

from __future__ import annotations

from torch import nn

from lora_dpo.errors import TrainingError
from lora_dpo.objectives import BoundObjective
from lora_dpo.objectives.bound import States
from lora_dpo.policy import describe_policy, equals_reference
from lora_dpo.stats import AnyStats, largest_logratio


def start_lines(
    policy: nn.Module,
    objective: BoundObjective,
    states: States,
    stats: AnyStats,
    scale: float,
) -> list[str]:
    """Return sentences on what the reference is, after proving that the policy begins there.

    Args:
        policy: as it stands before the first step.
        objective, states: what is trained with.
        stats: of the first rows.
        scale: the largest log-prob of these rows, nats; rounding is measured by it.

    Raises:
        TrainingError: the policy's weights equal the reference's and their log-probs do not.
    """
    lines = describe_policy(policy).lines()
    if not stats.has_reference:
        return [*lines[:-1], f"{objective.name} reads no reference; none will run"]
    ratio = float(largest_logratio(stats))
    loss, start = (float(objective(s, states).mean()) for s in (stats, stats.at_reference()))
    if not equals_reference(policy):
        return [
            *lines,
            f"policy has moved from it: log-ratios up to {ratio:.3g} nats, loss {loss:.4f}",
        ]
    if ratio > 1e-4 * max(scale, 1.0):
        raise TrainingError(
            f"self-check: policy and reference have the same weights, yet their log-probs differ "
            f"by {ratio:.3g} nats (loss {loss:.4f}, expected {start:.4f}). The reference is wrong."
        )
    return [
        *lines,
        f"self-check: policy = reference on {len(stats)} rows "
        f"(log-ratio {ratio:.2g}), loss {loss:.4f} = its start value {start:.4f}",
    ]
