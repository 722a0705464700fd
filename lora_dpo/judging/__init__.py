"""Judges of answers: a local model or an endpoint, always asked in both orders."""

from lora_dpo.judging.opening import open_judge
from lora_dpo.judging.verdicts import (
    Choice,
    Judge,
    Judgement,
    PositionBias,
    Verdict,
    ask_both_orders,
    judge_answers,
)

__all__ = [
    "Choice",
    "Judge",
    "Judgement",
    "PositionBias",
    "Verdict",
    "ask_both_orders",
    "judge_answers",
    "open_judge",
]
