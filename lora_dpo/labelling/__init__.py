"""Preferences of one's own: a local page that asks, saves and resumes."""

from lora_dpo.labelling.asking import label
from lora_dpo.labelling.result import Labels

__all__ = ["Labels", "label"]
