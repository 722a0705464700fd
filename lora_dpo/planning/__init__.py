"""Whether a run fits a card, before any weight is loaded: bytes by part, time, and what to change."""

from lora_dpo.planning.asking import (
    Question,
    optimiser_bytes,
    plan,
    plan_policy,
    question_of,
    setting_of,
)
from lora_dpo.planning.cards import CARDS, Card, card_of, this_card
from lora_dpo.planning.lengths import (
    Lengths,
    compact_rows,
    largest_micro_batch,
    largest_places,
)
from lora_dpo.planning.measuring import Bytes, Setting, measure
from lora_dpo.planning.moving import moved_instead
from lora_dpo.planning.operations import Shape, Tokens, has_several, operations
from lora_dpo.planning.plans import Plan, Remedy, make_plan
from lora_dpo.stepping import Batches

__all__ = [
    "CARDS",
    "Batches",
    "Bytes",
    "Card",
    "Lengths",
    "Plan",
    "Question",
    "Remedy",
    "Setting",
    "Shape",
    "Tokens",
    "card_of",
    "compact_rows",
    "has_several",
    "largest_micro_batch",
    "largest_places",
    "make_plan",
    "measure",
    "moved_instead",
    "operations",
    "optimiser_bytes",
    "plan",
    "plan_policy",
    "question_of",
    "setting_of",
    "this_card",
]
