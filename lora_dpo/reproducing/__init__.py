"""A run, run again from its own folder, and held against it number by number."""

from lora_dpo.reproducing.main import reproduce
from lora_dpo.reproducing.result import Difference, Reproduction, Twin

__all__ = ["Difference", "Reproduction", "Twin", "reproduce"]
