"""Answers that are all wanted: which files hold them, and what is left out of the others, counted."""

from __future__ import annotations

from typing import Any

import pytest

from lora_dpo.data import load_preferences
from lora_dpo.data.singles import EARLIER, UNWANTED
from lora_dpo.errors import DataError


def _turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def _told(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[t["role"]], "value": t["content"]} for t in turns]


Q, A = _turns("Q"), [{"role": "assistant", "content": "A"}]
WRITTEN: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, "Q", "A"),
    "the same as messages": ({"prompt": Q, "completion": A}, tuple(Q), tuple(A)),
    "messages alone": ({"messages": _turns("Q", "A")}, tuple(Q), tuple(A)),
    "messages beside a prompt": ({"prompt": "Q", "messages": _turns("Q", "A")}, tuple(Q), tuple(A)),
    "ShareGPT": ({"conversations": _told(_turns("Q", "A"))}, tuple(Q), tuple(A)),
    "Alpaca": ({"instruction": "Q", "input": "", "output": "A"}, tuple(Q), tuple(A)),
    "Alpaca with an input": (
        {"instruction": "Add", "input": "1 1", "output": "A"},
        tuple(_turns("Add\n1 1")),
        tuple(A),
    ),
    "question and response": ({"question": "Q", "response": "A"}, tuple(Q), tuple(A)),
    "a pair": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q", "A"),
    "a wanted answer": ({"prompt": "Q", "completion": "A", "label": True}, "Q", "A"),
    "ranked answers": (
        {"prompt": "Q", "responses": ["B", "A"], "scores": [1, 5]},
        "Q",
        "A",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_of_writing_an_answer_gives_one_wanted_row(name: str) -> None:
    row, prompt, completion = WRITTEN[name]
    loaded = load_preferences([row], kind="demonstrations")
    assert loaded.kind == "demonstrations" and len(loaded) == 1
    (found,) = loaded.rows
    assert (found.prompt, found.completion, found.label) == (prompt, completion, True)  # type: ignore[union-attr]


def test_unwanted_answers_are_left_out_and_counted_and_a_shared_one_is_kept_once() -> None:
    labelled = [{"prompt": "Q", "completion": text, "label": text == "A"} for text in "AB"]
    loaded = load_preferences(labelled, kind="demonstrations")
    assert [row.completion for row in loaded.rows] == ["A"]  # type: ignore[union-attr]
    assert {reason: e.count for (_, reason), e in loaded.report.entries.items()} == {UNWANTED: 1}
    assert len(loaded) == loaded.report.read - loaded.report.dropped
    pairs = [{"prompt": "Q", "chosen": "A", "rejected": text} for text in "BC"]
    twice = load_preferences(pairs, kind="demonstrations")
    assert len(twice) == 1 and twice.report.dropped == 1  # both pairs demonstrate the same answer
    with pytest.raises(DataError, match="no rows are left"):
        load_preferences([labelled[1]], kind="demonstrations")


def test_the_last_assistant_turn_alone_is_trained_and_a_conversation_without_one_is_dropped() -> (
    None
):
    rows = [{"messages": _turns("a", "b", "c", "d")}, {"messages": _turns("a", "b", "c")}]
    loaded = load_preferences(rows, kind="demonstrations")
    (row,) = loaded.rows
    assert [turn["content"] for turn in row.prompt] == ["a", "b", "c"]  # type: ignore[index]
    assert row.completion == ({"role": "assistant", "content": "d"},)  # type: ignore[union-attr]
    counts = {reason: e.count for (_, reason), e in loaded.report.entries.items()}
    assert counts == {"dropped: completion is not one assistant turn": 1, EARLIER: 1}


def test_data_as_they_are_are_demonstrations_only_where_they_are_nothing_else() -> None:
    assert load_preferences([{"prompt": "Q", "completion": "A"}]).kind == "demonstrations"
    assert load_preferences([WRITTEN["a pair"][0]]).kind == "paired"
    assert load_preferences([WRITTEN["a wanted answer"][0]]).kind == "unpaired"


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_answers_without_a_label_do_not_serve_preferences_and_the_error_names_sft(
    kind: Any,
) -> None:
    with pytest.raises(DataError, match="'prompt' and 'completion' can be fine-tuned on: lora-dpo"):
        load_preferences([{"prompt": "Q", "completion": "A"}], kind=kind)


def test_texts_without_a_prompt_are_refused_and_the_shapes_of_demonstrations_listed() -> None:
    with pytest.raises(DataError, match=r"(?s)Found: text.*instruction, output"):
        load_preferences([{"text": "all of it"}], kind="demonstrations")


def test_kinds_of_files_may_be_mixed_where_all_become_demonstrations(tmp_path: Any) -> None:
    names = ("a pair", "prompt and completion", "a wanted answer")
    sources = []
    for i, name in enumerate(names):
        path = tmp_path / f"{i}.jsonl"
        text = (
            str({**WRITTEN[name][0], "prompt": f"Q{i}"}).replace("'", '"').replace("True", "true")
        )
        path.write_text(text + "\n")
        sources.append(str(path))
    assert len(load_preferences(sources, kind="demonstrations")) == 3
    with pytest.raises(DataError, match="mix"):
        load_preferences(sources[::2])
    with pytest.raises(DataError, match="min_margin"):
        load_preferences(sources[1:2], kind="demonstrations", min_margin=1.0)
