"""Padding is never mistaken for a token: masks come from lengths."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.data import Origin, collate_labelled, collate_pairs
from lora_dpo.errors import DataError

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
ROW = st.fixed_dictionaries({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS})


@settings(max_examples=50)
@given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from(["right", "left"]))
def test_every_token_is_found_again_and_padding_is_masked(rows: list[Any], side: Any) -> None:
    # The pad id 0 is also a token here: only the masks can tell them apart.
    batch = collate_pairs(rows, pad_id=0, padding_side=side)
    sides = [(r["prompt_ids"], r[name]) for name in ("chosen_ids", "rejected_ids") for r in rows]
    assert batch.pairs == len(rows) and len(batch.input_ids) == 2 * len(rows)
    for i, (prompt, answer) in enumerate(sides):
        mask = batch.attention_mask[i].bool()
        assert batch.input_ids[i][mask].tolist() == prompt + answer
        assert batch.input_ids[i][batch.completion_mask[i]].tolist() == answer
        assert not batch.input_ids[i][~mask].any()
        edge = 0 if side == "right" else -1
        assert mask[edge]
    assert batch.input_ids.shape[1] == max(len(p) + len(a) for p, a in sides)


def test_pairs_stand_chosen_first() -> None:
    rows = [
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "file": "f", "row": 7},
        {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [8], "file": "f", "row": 9},
    ]
    batch = collate_pairs(rows, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3], [5, 6, 0], [1, 4, 0], [5, 8, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert batch.completion_mask.tolist()[0] == [False, True, True]
    assert batch.attention_mask.dtype == torch.long and batch.completion_mask.dtype == torch.bool
    assert batch.origins == (Origin("f", 7), Origin("f", 9))
    assert batch.to("cpu").origins == batch.origins
    assert not hasattr(batch, "labels")


def test_labelled_rows_carry_their_label() -> None:
    rows = [
        {"prompt_ids": [1], "completion_ids": [2], "label": True},
        {"prompt_ids": [3, 4], "completion_ids": [5], "label": False},
    ]
    batch = collate_labelled(rows, pad_id=9, padding_side="left")
    assert batch.input_ids.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert batch.completion_mask.tolist() == [[False, False, True]] * 2
    assert batch.label.tolist() == [True, False] and batch.rows == 2
    assert batch.to("cpu").label.tolist() == [True, False]


def test_an_empty_batch_and_an_unknown_side_are_errors() -> None:
    with pytest.raises(DataError, match="without rows"):
        collate_pairs([], pad_id=0)
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(DataError, match="padding_side"):
        collate_pairs([row], pad_id=0, padding_side="middle")  # type: ignore[arg-type]


def test_importing_the_room_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow")
    code = f"import sys, lora_dpo.data; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
