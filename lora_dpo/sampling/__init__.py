"""Completions drawn from a policy, scored, and turned into preferences."""

from lora_dpo.sampling.making import sample
from lora_dpo.sampling.result import Samples

__all__ = ["Samples", "sample"]
