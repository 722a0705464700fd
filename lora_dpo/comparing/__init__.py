"""Policies beside their reference: the same prompts, the same random numbers, one base in memory."""

from lora_dpo.comparing.answering import Sampled, sample_answers
from lora_dpo.comparing.comparison import AnswerRow, Comparison, ModelFigures
from lora_dpo.comparing.main import compare
from lora_dpo.comparing.measures import Measured

__all__ = [
    "AnswerRow",
    "Comparison",
    "Measured",
    "ModelFigures",
    "Sampled",
    "compare",
    "sample_answers",
]
