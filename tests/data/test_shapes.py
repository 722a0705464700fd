"""Every shape in use is recognised by its columns; expected values are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_dpo.data import load_preferences
from lora_dpo.data.problems import DroppedRow
from lora_dpo.data.transcripts import ASSISTANT, HUMAN, cut_common, is_transcript
from lora_dpo.errors import DataError

SHARED = Path(__file__).parents[3] / "shared"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


CHAT = ((user("Hi"),), (bot("A"),), (bot("B"),))
ANSWERS = {"chosen": "A", "rejected": "B"}
PAIRED: list[tuple[str, dict[str, Any], tuple[Any, Any, Any]]] = [
    ("text", {"prompt": "Hi", **ANSWERS}, ("Hi", "A", "B")),
    ("lists", {"prompt": [user("Hi")], "chosen": [bot("A")], "rejected": [bot("B")]}, CHAT),
    ("dicts", {"prompt": [user("Hi")], "chosen": bot("A"), "rejected": bot("B")}, CHAT),
    ("prompt text", {"prompt": "Hi", "chosen": [bot("A")], "rejected": [bot("B")]}, CHAT),
    (
        "UltraFeedback",
        {
            "prompt": "Hi",
            "prompt_id": "1",
            "messages": [user("Hi"), bot("A")],
            "chosen": [user("Hi"), bot("A")],
            "rejected": [user("Hi"), bot("B")],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        CHAT,
    ),
    (
        "prompt repeated",
        {
            "prompt": [user("Hi")],
            "chosen": [user("Hi"), bot("A")],
            "rejected": [user("Hi"), bot("B")],
        },
        CHAT,
    ),
    ("whole", {"chosen": [user("Hi"), bot("A")], "rejected": [user("Hi"), bot("B")]}, CHAT),
    ("ShareGPT", {"conversations": [human("Hi")], "chosen": gpt("A"), "rejected": gpt("B")}, CHAT),
    ("ShareGPT text", {"conversations": [human("Hi")], **ANSWERS}, CHAT),
    ("messages", {"messages": [user("Hi")], "chosen": bot("A"), "rejected": bot("B")}, CHAT),
    ("Alpaca", {"instruction": "Hi", "input": "", **ANSWERS}, CHAT),
    ("Alpaca list", {"instruction": "Hi", "input": None, "output": ["A", "B"]}, CHAT),
    ("Argilla", {"instruction": "Hi", "chosen_response": "A", "rejected_response": "B"}, CHAT),
    ("Orca", {"system": "", "question": "Hi", **ANSWERS}, CHAT),
    ("Orca input", {"system": "", "input": "Hi", **ANSWERS}, CHAT),
    (
        "Orca system",
        {"system": "Be kind", "question": "Hi", **ANSWERS},
        ((system("Be kind"), user("Hi")), *CHAT[1:]),
    ),
    (
        "Alpaca all",
        {
            "instruction": "Add",
            "input": "1 2",
            "system": "Be kind",
            "history": [["Hi", "Hello"]],
            **ANSWERS,
        },
        ((system("Be kind"), user("Hi"), bot("Hello"), user("Add\n1 2")), *CHAT[1:]),
    ),
    (
        "HH",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Go\n\nAssistant: A",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Go\n\nAssistant: B",
        },
        ("\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Go\n\nAssistant:", " A", " B"),
    ),
    (
        "implicit",
        {"chosen": "Flat is better than nested.", "rejected": "Flat is better than neon."},
        ("Flat is better than", " nested.", " neon."),
    ),
]


@pytest.mark.parametrize(("row", "expected"), [c[1:] for c in PAIRED], ids=[c[0] for c in PAIRED])
def test_every_paired_shape_gives_the_same_kind_of_row(row: Any, expected: Any) -> None:
    loaded = load_preferences([row])
    assert loaded.kind == "paired"
    pair = loaded.rows[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == expected
    assert pair.is_chat == (not isinstance(expected[0], str))


UNPAIRED: list[tuple[dict[str, Any], tuple[Any, Any, bool]]] = [
    ({"prompt": "Hi", "completion": "A", "label": True}, ("Hi", "A", True)),
    ({"prompt": "Hi", "completion": "A", "label": 0}, ("Hi", "A", False)),
    ({"prompt": "Hi", "completion": "A", "label": "False"}, ("Hi", "A", False)),
    ({"prompt": "Hi", "completion": "A", "thumbs": "👍"}, ("Hi", "A", True)),
    (
        {"prompt": [user("Hi")], "completion": [bot("A")], "label": True},
        ((user("Hi"),), (bot("A"),), True),
    ),
    (
        {"messages": [user("Hi"), bot("A")], "label": False},
        ((user("Hi"),), (bot("A"),), False),
    ),
    (
        {"conversations": [human("Hi"), gpt("A")], "kto_tag": True},
        ((user("Hi"),), (bot("A"),), True),
    ),
    (
        {"instruction": "Hi", "input": "", "output": "A", "kto_tag": True},
        ((user("Hi"),), (bot("A"),), True),
    ),
]


@pytest.mark.parametrize(("row", "expected"), UNPAIRED)
def test_every_unpaired_shape_gives_the_same_kind_of_row(row: Any, expected: Any) -> None:
    loaded = load_preferences([row])
    assert loaded.kind == "unpaired"
    found = loaded.rows[0]
    assert (found.prompt, found.completion, found.label) == expected


REAL = {
    "hh_harmless.conversational.jsonl": ("paired", 97),
    "hh_harmless.implicit.jsonl": ("paired", 341),
    "hhh_alignment.standard.jsonl": ("paired", 85),
    "llamafactory_dpo_demo.conversational.jsonl": ("paired", 126),
    "llamafactory_kto_demo.unpaired_conversational.jsonl": ("unpaired", 114),
    "llmbar_adversarial.standard.jsonl": ("paired", 167),
    "llmbar_natural.standard.jsonl": ("paired", 46),
    "llmbar_processed_human.standard.jsonl": ("paired", 208),
    "pandalm_human.standard.jsonl": ("paired", 341),
    "pandalm_human.unpaired.jsonl": ("unpaired", 251),
    "stories656k_positive.standard.jsonl": ("paired", 1000),
    "stories656k_positive.unpaired.jsonl": ("unpaired", 1000),
    "zen_formats/conversational_implicit_prompt_preference.jsonl": ("paired", 19),
    "zen_formats/conversational_preference.jsonl": ("paired", 19),
    "zen_formats/conversational_unpaired_preference.jsonl": ("unpaired", 19),
    "zen_formats/standard_implicit_prompt_preference.jsonl": ("paired", 19),
    "zen_formats/standard_preference.jsonl": ("paired", 19),
    "zen_formats/standard_unpaired_preference.jsonl": ("unpaired", 19),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_recognised_and_no_row_goes_missing(name: str) -> None:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    loaded = load_preferences(path)
    assert loaded.kind == REAL[name][0]
    # The row counts are those of the data's README.
    assert len(loaded) + loaded.report.dropped == loaded.report.read == REAL[name][1]


def test_a_transcript_has_a_human_turn_and_an_assistants_behind_it() -> None:
    assert is_transcript(f"{HUMAN} Hi{ASSISTANT} Ho") and is_transcript(f"x{HUMAN}{ASSISTANT}")
    for text in ("", "Hi", f"{HUMAN} Hi", f"{ASSISTANT} Ho", f"{ASSISTANT} Ho{HUMAN} Hi"):
        assert not is_transcript(text)


def test_transcripts_read_as_messages_agree_with_the_text() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Go on\n\nAssistant:"
    row = {"chosen": text + " A", "rejected": text + " B"}
    pair = load_preferences([row], transcripts="messages").rows[0]
    assert pair.prompt == (user("Hi"), bot("Yo"), user("Go on"))
    assert (pair.chosen, pair.rejected) == ((bot("A"),), (bot("B"),))


def test_transcripts_as_messages_are_refused_for_other_data() -> None:
    with pytest.raises(DataError, match="no Human/Assistant transcripts"):
        load_preferences([PAIRED[0][1]], transcripts="messages")


HH = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{HH} A\n\nHuman: x\n\nAssistant: B", f"{HH} C\n\nHuman: x\n\nAssistant: B", "diverge"),
        (f"{HH} A\n\nHuman: more", f"{HH} B", "a Human turn follows"),
        ("plain text a", "plain text b", "not a transcript"),
    ],
)
def test_a_transcript_that_cannot_be_cut_is_dropped_and_counted(
    chosen: str, rejected: str, reason: str
) -> None:
    good = [{"chosen": f"{HH} {i}", "rejected": f"{HH} no"} for i in range(3)]
    loaded = load_preferences([*good, {"chosen": chosen, "rejected": rejected}])
    assert len(loaded) == 3
    [(key, entry)] = loaded.report.entries.items()
    assert reason in key[1] and entry.count == 1 and entry.examples[0].origin == "<memory>:4"


def test_whole_conversations_that_differ_in_more_than_one_turn_are_dropped() -> None:
    good = {"chosen": [user("Hi"), bot("A")], "rejected": [user("Hi"), bot("B")]}
    bad = {
        "chosen": [user("Hi"), bot("A"), user("x"), bot("C")],
        "rejected": [user("Hi"), bot("B")],
    }
    report = load_preferences([good, bad]).report
    assert [reason for _, reason in report.entries] == [
        "dropped: completion is not one assistant turn"
    ]


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_an_implicit_prompt_loses_nothing_and_cuts_no_word(prefix: str, a: str, b: str) -> None:
    try:
        prompt, chosen, rejected = cut_common(prefix + a, prefix + b)
    except DroppedRow:
        assume(False)
        return
    assert prompt + chosen == prefix + a and prompt + rejected == prefix + b
    assert chosen.strip() and rejected.strip() and prompt.strip()
    assert not prompt[-1].isspace() and chosen[0].isspace() and rejected[0].isspace()


def test_a_shared_beginning_inside_a_word_is_no_prompt() -> None:
    with pytest.raises(DroppedRow):
        cut_common("Readable", "Reading")
    # The last common word's end leaves nothing of the shorter text: the cut moves back a word.
    assert cut_common("one two", "one two three") == ("one", " two", " two three")


def test_columns_maps_our_names_to_theirs() -> None:
    row = {"q": "Hi", "good": "A", "bad": "B"}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    pair = load_preferences([row], columns=names).rows[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hi", "A", "B")
    with pytest.raises(DataError, match=r"maps prompt to 'qq'.*columns found: q, good, bad"):
        load_preferences([row], columns={**names, "prompt": "qq"})
    with pytest.raises(DataError, match="'promt' is not a column that we read"):
        load_preferences([row], columns={"promt": "q"})


def test_an_unknown_shape_lists_the_columns_found_and_the_nearest_shape(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    path = write([{"prompt": "Hi", "chosen": "A", "rejekted": "B"}])
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    message = str(caught.value)
    assert "prefs.jsonl" in message and "Found: prompt, chosen, rejekted" in message
    assert "Nearest is prompt, chosen, rejected: 'rejected' missing" in message
    assert "Did you mean 'rejekted'?" in message


def test_two_shapes_in_one_file_are_an_error_that_names_two_rows() -> None:
    with pytest.raises(DataError, match=r"<memory>:2: mixed shapes.*<memory>:1"):
        load_preferences([PAIRED[0][1], PAIRED[1][1]])
    with pytest.raises(DataError, match="mixed shapes"):
        load_preferences([PAIRED[0][1], UNPAIRED[0][0]])


def test_unpaired_rows_do_not_serve_a_paired_objective() -> None:
    with pytest.raises(DataError, match=r"prompt/completion/label \(unpaired\).*such as dpo"):
        load_preferences([UNPAIRED[0][0]], kind="paired")


def test_pairs_serve_an_unpaired_objective_as_two_rows_each() -> None:
    loaded = load_preferences([PAIRED[0][1]], kind="unpaired")
    assert [(r.completion, r.label) for r in loaded.rows] == [("A", True), ("B", False)]
    assert loaded.report.added == 1


def test_ignored_columns_are_listed() -> None:
    loaded = load_preferences([{**PAIRED[0][1], "source": "web"}])
    assert "ignored: source" in loaded.why
    assert ("loading", "noted: columns ignored: source") in loaded.report.entries


def test_tools_are_kept_as_a_list_or_as_json_text() -> None:
    row = PAIRED[1][1]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        assert load_preferences([{**row, "tools": tools}]).rows[0].tools == ({"name": "add"},)
    assert load_preferences([{**row, "tools": ""}]).rows[0].tools is None
    with pytest.raises(DataError, match="<memory>:1: tools is text that is not JSON"):
        load_preferences([{**row, "tools": "add"}])


def test_a_column_that_is_missing_is_looked_for_among_those_that_have_no_part() -> None:
    with pytest.raises(DataError, match=r"map it, as in columns: \{rejected: worse\}"):
        load_preferences([{"prompt": "p", "chosen": "a", "worse": "b"}])
    with pytest.raises(DataError, match=r"'rejected' missing.* No column is left"):
        load_preferences([{"prompt": "p", "chosen": "a"}])


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": "Hi", **ANSWERS}, "prompt / chosen / rejected, text"),
        (
            {"prompt": [user("Hi")], "chosen": bot("A"), "rejected": bot("B")},
            "prompt / chosen / rejected, messages",
        ),
        ({"chosen": "Hi A", "rejected": "Hi B"}, "chosen / rejected, whole texts"),
        (
            {"chosen": [user("Hi"), bot("A")], "rejected": [user("Hi"), bot("B")]},
            "chosen / rejected, whole conversations",
        ),
    ],
)
def test_the_shape_is_told_by_its_columns_and_what_they_hold(row: Any, shape: str) -> None:
    assert load_preferences([row]).shape == shape
