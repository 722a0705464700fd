"""Every objective of the package, as pure functions and as a table (``OBJECTIVES``, ``get``)."""

from lora_dpo.objectives._table import (
    OBJECTIVES,
    BoundObjective,
    Hyperparameter,
    Interval,
    Objective,
    Positive,
    Smoothing,
    get,
    objective,
)
from lora_dpo.objectives.paired import dpo
from lora_dpo.objectives.reference_free import dpo_reference_free

__all__ = [
    "OBJECTIVES",
    "BoundObjective",
    "Hyperparameter",
    "Interval",
    "Objective",
    "Positive",
    "Smoothing",
    "dpo",
    "dpo_reference_free",
    "get",
    "objective",
]
