"""Every objective of the package, as pure functions and as a table (``OBJECTIVES``, ``get``)."""

from lora_dpo.objectives._table import (
    OBJECTIVES,
    Hyperparameter,
    Interval,
    NonNegative,
    Number,
    Objective,
    Positive,
    Share,
    Smoothing,
    build,
    get,
    mixture,
    objective,
)
from lora_dpo.objectives.bound import BoundObjective, State, Term
from lora_dpo.objectives.paired import dpo
from lora_dpo.objectives.reference_free import dpo_reference_free, sft

__all__ = [
    "OBJECTIVES",
    "BoundObjective",
    "Hyperparameter",
    "Interval",
    "NonNegative",
    "Number",
    "Objective",
    "Positive",
    "Share",
    "Smoothing",
    "State",
    "Term",
    "build",
    "dpo",
    "dpo_reference_free",
    "get",
    "mixture",
    "objective",
    "sft",
]
