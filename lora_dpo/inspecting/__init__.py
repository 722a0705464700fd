"""Preferences looked at before any training: recognised, counted, shown token by token, and judged."""

from lora_dpo.inspecting.collecting import inspect_preferences
from lora_dpo.inspecting.inspection import Inspection
from lora_dpo.inspecting.measures import data_card

__all__ = ["Inspection", "data_card", "inspect_preferences"]
