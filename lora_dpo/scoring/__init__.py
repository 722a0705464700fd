"""The implicit reward of a policy as a product: of completions, of a run's file, of n samples."""

from lora_dpo.scoring.best import BestOf, Ranked, Rankings, best_of
from lora_dpo.scoring.files import FileScores, score_run
from lora_dpo.scoring.rewards import (
    Scores,
    context_of,
    encode_rows,
    reward_in_words,
    score,
    score_ids,
)

__all__ = [
    "BestOf",
    "FileScores",
    "Ranked",
    "Rankings",
    "Scores",
    "best_of",
    "context_of",
    "encode_rows",
    "reward_in_words",
    "score",
    "score_ids",
    "score_run",
]
