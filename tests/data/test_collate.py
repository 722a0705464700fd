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
from lora_dpo.data.collating import flat_pairs, flat_tokens
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


_TOKENS = st.integers(1, 3)  # few, so that answers begin alike and prompts repeat
_ANSWER = st.lists(_TOKENS, min_size=1, max_size=5)
_PAIR = st.fixed_dictionaries(
    {
        "prompt_ids": st.lists(_TOKENS, min_size=1, max_size=2),
        "chosen_ids": _ANSWER,
        "rejected_ids": _ANSWER,
        "file": st.just("f"),
        "row": st.just(1),
    }
)


@given(rows=st.lists(_PAIR, min_size=1, max_size=4))
def test_every_answer_is_found_again_in_a_flat_batch_behind_its_own_prompt(rows: list[Any]) -> None:
    """Each answer token is predicted where the token before it lies, at the place it has in its row."""
    batch = flat_pairs(rows)
    sides = [
        (row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows
    ]
    assert batch.lengths.tolist() == [len(answer) for _, answer in sides]
    assert batch.targets.tolist() == [token for _, answer in sides for token in answer]
    before = [token for prompt, answer in sides for token in [prompt[-1], *answer[:-1]]]
    assert batch.input_ids[0, batch.places].tolist() == before
    places = [len(prompt) - 1 + i for prompt, answer in sides for i in range(len(answer))]
    assert batch.position_ids[0, batch.places].tolist() == places
    assert sum(trunk + sum(rest) for trunk, rest in batch.segments) == batch.input_ids.shape[1]


@given(row=_PAIR)
def test_the_tokens_of_a_flat_row_are_counted_before_it_is_laid_out(row: dict[str, Any]) -> None:
    answers = list(dict.fromkeys(tuple(row[side]) for side in ("chosen_ids", "rejected_ids")))
    assert flat_pairs([row]).input_ids.shape[1] == flat_tokens(row["prompt_ids"], answers)
