"""``init``: a commented config for a model, data and a card, fitted by the planner."""

from lora_dpo.drafting.proposing import init_config
from lora_dpo.drafting.writing import Draft, commented

__all__ = ["Draft", "commented", "init_config"]
