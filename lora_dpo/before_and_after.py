"""What held-out metrics were before training: what holds where policy and reference are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# A tie in every pair, and no reward at all: what a policy that is its reference has by definition.
_BY_DEFINITION = {
    "rewards/accuracies": 0.5,
    **dict.fromkeys(("rewards/chosen", "rewards/rejected", "rewards/margins"), 0.0),
    **dict.fromkeys(("logratios/chosen", "logratios/rejected"), 0.0),
}
# Objectives whose rewards are not 0 at the reference: scores of the data are part of them.
_WITH_SCORES = {"modpo", "mixture"}


def at_the_reference(
    name: str, found: Mapping[str, Sequence[float]], *, objective: str, moves: bool
) -> float | None:
    """Return a metric's value where policy and reference are one; None where nothing tells it.

    Args:
        name: of the metric, as ``rewards/margins``.
        found: all metrics of the trained policy, the mean first; without ``logratios`` among them
            the objective has no reference, and nothing is told.
        objective: its name.
        moves: whether the reference followed the policy, so that ratios are to another model.
    """
    if "logratios/chosen" not in found:
        return None
    kind, _, side = name.partition("/")
    if kind == "logratios" or (kind == "rewards" and objective not in _WITH_SCORES):
        return _BY_DEFINITION.get(name)
    if kind == "logps" and f"logratios/{side}" in found and not moves:
        return float(found[name][0] - found[f"logratios/{side}"][0])
    return float(found[name][0]) if kind == "lengths" else None
