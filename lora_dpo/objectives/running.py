"""Means over everything seen so far: what BCO remembers between steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, float]


def running_mean(state: State, values: Tensor) -> Tensor:
    """Return the mean of all earlier values and these, ``[]``."""
    count = state["count"]
    return (count * state["mean"] + values.sum()) / (count + len(values))


def with_rows(state: State, values: Tensor) -> State:
    """Return the state with these values added."""
    count = state["count"] + len(values)
    return {"count": count, "mean": float(running_mean(state, values.double()))}
