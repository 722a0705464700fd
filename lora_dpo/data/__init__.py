"""Preference data: recognised, checked, tokenised and padded. This room knows no model."""

from lora_dpo.data.collating import (
    FlatBatch,
    LabelledBatch,
    PairBatch,
    collate_labelled,
    collate_pairs,
    flat_labelled,
    flat_pairs,
    flat_tokens,
    sent,
)
from lora_dpo.data.lengths import Lengths, Summary
from lora_dpo.data.loading import load_preferences
from lora_dpo.data.mismatching import with_mismatched
from lora_dpo.data.preferences import Preferences
from lora_dpo.data.records import Labelled, Message, Origin, Pair
from lora_dpo.data.report import DataReport
from lora_dpo.data.sources import Source
from lora_dpo.data.tokenising import Tokenised, label_counts, require_scores, tokenise

__all__ = [
    "DataReport",
    "FlatBatch",
    "Labelled",
    "LabelledBatch",
    "Lengths",
    "Message",
    "Origin",
    "Pair",
    "PairBatch",
    "Preferences",
    "Source",
    "Summary",
    "Tokenised",
    "collate_labelled",
    "collate_pairs",
    "flat_labelled",
    "flat_pairs",
    "flat_tokens",
    "label_counts",
    "load_preferences",
    "require_scores",
    "sent",
    "tokenise",
    "with_mismatched",
]
