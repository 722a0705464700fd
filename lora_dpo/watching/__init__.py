"""What is seen of a run while it goes on: how far it is, notes beside the curves, samples."""

from lora_dpo.watching.attaching import add_samples, plan_and_measurement

__all__ = ["add_samples", "plan_and_measurement"]
