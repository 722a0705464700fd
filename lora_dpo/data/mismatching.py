"""Completions of other rows, by which KTO estimates the KL to the reference."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from lora_dpo.data.tokenising import Tokenised
from lora_dpo.errors import DataError

MISMATCHED = "mismatched_ids"


def with_mismatched(data: Tokenised) -> Tokenised:
    """Return unpaired rows with a column ``mismatched_ids``: a completion of another prompt.

    The rows are put in a fixed random order, and each takes the completion of the next row that has
    another prompt (arXiv:2402.01306, section 4.1, where it is the next row of the micro-batch; so
    chosen, the estimate exists at micro-batch 1 too). It is cut where prompt and completion would
    be longer than the longest row, so no forward pass needs more memory.

    Raises:
        DataError: the data are pairs, or hold one prompt alone.
    """
    if data.kind != "unpaired":
        raise DataError(f"mismatched completions are for unpaired rows; these are {data.kind}.")
    if MISMATCHED in data.rows.column_names:
        return data
    keys, prompts = data.rows["prompt_key"][:], data.rows["prompt_ids"][:]
    completions = data.rows["completion_ids"][:]
    order = list(range(len(keys)))
    random.Random(0).shuffle(order)
    partners = _partners([keys[i] for i in order])
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    found: list[Any] = [None] * len(keys)
    for place, partner in enumerate(partners):
        row = order[place]
        found[row] = completions[order[partner]][: longest - len(prompts[row])]
    feature = data.rows.features["completion_ids"]
    return replace(data, rows=data.rows.add_column(MISMATCHED, found, feature=feature))


def _partners(keys: list[str]) -> list[int]:
    """Return for each place the next place, cyclically, that has another key."""
    count = len(keys)
    if len(set(keys)) < 2:
        raise DataError(
            "all rows have one prompt, and this objective compares a prompt with the completion of "
            "another; give rows of at least two prompts, or use kto_running."
        )
    partners, following = [0] * count, 0
    # Twice backwards round the circle: the second round knows what the first place follows.
    for place in reversed(range(2 * count)):
        here, after = place % count, (place + 1) % count
        following = after if keys[after] != keys[here] else following
        partners[here] = following
    return partners
