"""Bad rows are errors with file and row; rows that teach nothing are dropped and counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.data import DataReport, Origin, load_preferences
from lora_dpo.data.loading import DEEPEST
from lora_dpo.data.messages import NOT_ONE_TURN
from lora_dpo.data.preferences import Preferences
from lora_dpo.data.problems import MOST_NAMES, few
from lora_dpo.data.records import Pair, text_key
from lora_dpo.data.shapes import KNOWN_COLUMNS
from lora_dpo.errors import DataError

GOOD = {"prompt": "Hi", "chosen": "A", "rejected": "B"}
USER = [{"role": "user", "content": "Hi"}]


def chat(**changes: Any) -> dict[str, Any]:
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    return {"prompt": USER, **answers, **changes}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "chosen": 5}, r"<memory>:2: chosen is int \(5\); expected text"),
        ({**GOOD, "chosen": None}, r"<memory>:2: chosen is missing \(null\)"),
        ({"prompt": "Hi", "chosen": "A"}, r"<memory>:2: rejected is missing"),
        ({**GOOD, "prompt": " "}, "<memory>:2: prompt is empty"),
        ({**GOOD, "rejected": ""}, "<memory>:2: rejected is empty"),
        ({**GOOD, "chosen": "\ud83d"}, "<memory>:2: chosen holds half of a character"),
        ({**GOOD, "score_chosen": "high"}, r"<memory>:2: score_chosen is str \('high'\)"),
    ],
)
def test_a_bad_text_row_is_one_error_with_its_place(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences([GOOD, row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [{"role": "narrator", "content": "x"}]}, "has the role 'narrator'"),
        ({"prompt": [{"role": "user", "content": 3}]}, r"prompt\[0\] has content int \(3\)"),
        ({"prompt": [*USER, {"role": "assistant", "content": "x"}]}, "prompt ends with a message"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "chosen is a message of role 'user'"),
        ({"prompt": []}, "prompt is empty"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of type 'image'; only text",
        ),
    ],
)
def test_a_bad_message_is_one_error_with_its_place(changes: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"<memory>:2: .*{message}"):
        load_preferences([chat(), chat(**changes)])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (["A"], r"<memory>:2: output is list \(\['A'\]\); expected a list \[better, worse\]"),
        (["A", "B", "C"], r"<memory>:2: output is list .*expected a list \[better, worse\]"),
        (None, r"<memory>:2: output is missing \(null\)"),
    ],
)
def test_an_output_that_is_no_pair_of_answers_is_an_error(output: Any, message: str) -> None:
    rows = [{"instruction": "Hi", "output": value} for value in (["A", "B"], output)]
    with pytest.raises(DataError, match=message):
        load_preferences(rows)


def test_a_pair_of_transcripts_with_one_empty_side_names_that_side() -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Yes"
    with pytest.raises(DataError, match="<memory>:1: rejected is empty"):
        load_preferences(
            [{"chosen": talk, "rejected": " "}, {"chosen": talk, "rejected": talk[:-3] + "No"}]
        )


def test_content_in_parts_of_text_is_one_text_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    (row,) = load_preferences([chat(prompt=[{"role": "user", "content": parts}])]).rows
    assert row.prompt == ({"role": "user", "content": "Hello"},)
    picture = [*parts, {"type": "image_url"}]
    with pytest.raises(DataError, match="holds a part of type 'image_url'; only text"):
        load_preferences([chat(prompt=[{"role": "user", "content": picture}])])


@pytest.mark.parametrize(("count", "told"), [(MOST_NAMES, ""), (MOST_NAMES + 5, " and 5 more")])
def test_names_beyond_the_first_are_counted(count: int, told: str) -> None:
    found = few(f"name{i}" for i in range(count))
    assert found == ", ".join(f"name{i}" for i in range(MOST_NAMES)) + told


@pytest.mark.parametrize(("deep", "refused"), [(DEEPEST - 1, False), (DEEPEST, True)])
def test_tools_within_each_other_have_an_end(deep: int, refused: bool) -> None:
    """A list of tools is one level, each list in it another."""
    nested: Any = {}
    for _ in range(deep):
        nested = [nested]
    row = chat(tools=[nested])
    if refused:
        with pytest.raises(DataError, match=f"tools holds lists .* more than {DEEPEST} deep"):
            load_preferences([row])
    else:
        assert len(load_preferences([row]).rows) == 1


def test_whole_conversations_that_part_at_a_users_turn_are_dropped_and_counted() -> None:
    """What is cut out of them is no answer; a column that is one by itself would be an error."""
    talk = [*USER, {"role": "assistant", "content": "A"}]
    both = {"chosen": [*talk, *USER], "rejected": [*talk, {"role": "user", "content": "Oh"}]}
    good = {"chosen": talk, "rejected": [*USER, {"role": "assistant", "content": "B"}]}
    found = load_preferences([both, good])
    assert len(found.rows) == 1
    assert found.report.entries["loading", NOT_ONE_TURN].count == 1


def test_an_answer_behind_another_prompt_than_its_own_is_dropped_and_counted() -> None:
    """Cut off like a repeated prompt, it would be trained on as an answer to what nobody asked."""
    other = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "C"}]
    found = load_preferences([chat(), chat(chosen=other)])
    assert len(found.rows) == 1
    assert found.report.entries["loading", NOT_ONE_TURN].count == 1


def test_a_label_that_is_no_truth_value_is_an_error() -> None:
    with pytest.raises(DataError, match="<memory>:1: label is int"):
        load_preferences([{"prompt": "a", "completion": "b", "label": 3}])


def test_all_bad_rows_are_told_at_once() -> None:
    rows = [{**GOOD, "chosen": 5}, GOOD, {**GOOD, "prompt": ""}]
    with pytest.raises(DataError) as caught:
        load_preferences(rows)
    assert "2 rows cannot be used" in str(caught.value)
    assert "<memory>:1:" in str(caught.value) and "<memory>:3:" in str(caught.value)


def test_roles_of_other_tools_are_mapped_and_counted() -> None:
    row = chat(prompt=[{"role": "human", "content": "Hi"}])
    loaded = load_preferences([row])
    assert loaded.rows[0].prompt == tuple(USER)
    assert loaded.report.repaired == 1


def test_empty_and_identical_rows_obey_their_settings() -> None:
    rows = [GOOD, {**GOOD, "chosen": " "}, {**GOOD, "chosen": "B"}]
    report = load_preferences(rows, empty="drop").report
    assert [reason for _, reason in report.entries] == [
        "dropped: empty chosen",
        "dropped: chosen and rejected are identical",
    ]
    with pytest.raises(DataError, match="<memory>:3: chosen and rejected are identical"):
        load_preferences(rows, empty="drop", identical="error")


def test_duplicates_obey_their_setting_and_swapped_pairs_are_noted() -> None:
    swapped = {"prompt": "Hi", "chosen": "B", "rejected": "A"}
    rows = [GOOD, GOOD, swapped]
    assert [len(load_preferences(rows, duplicates=d)) for d in ("drop", "keep")] == [2, 3]
    assert load_preferences(rows).report.noted == 1
    with pytest.raises(DataError, match="<memory>:2: the same row as <memory>:1"):
        load_preferences(rows, duplicates="error")


def test_an_inverted_score_is_noted() -> None:
    loaded = load_preferences([{**GOOD, "score_chosen": 1, "score_rejected": 2}])
    assert (loaded.rows[0].score_chosen, loaded.report.noted) == (1.0, 1)


def test_no_rows_left_is_an_error_with_the_counts() -> None:
    with pytest.raises(DataError, match=r"no rows are left(.|\n)*1  dropped: chosen and rejected"):
        load_preferences([{**GOOD, "chosen": "B"}])


def test_space_around_a_prompt_does_not_make_it_another_prompt() -> None:
    assert text_key(" Hi\n") == text_key("Hi") != text_key("hi")
    assert text_key(tuple(USER)) == text_key(({"content": "Hi ", "role": "user"},))


def preferences(prompts: list[int]) -> Preferences:
    rows = [Pair(f"Q{p}", "A", "B", Origin("f", i + 1)) for i, p in enumerate(prompts)]
    return Preferences("paired", tuple(rows), "", "")


PROMPTS = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@settings(max_examples=60)
@given(PROMPTS, st.floats(0.01, 0.99), st.none() | st.integers(1, 20), st.integers(0, 5))
def test_a_split_is_a_partition_by_prompt(
    prompts: list[int], fraction: float, maximum: int | None, seed: int
) -> None:
    data = preferences(prompts)
    train, held = data.split(fraction, maximum, seed)
    assert sorted(r.origin.row for r in (*train.rows, *held.rows)) == list(
        range(1, len(prompts) + 1)
    )
    assert not {r.prompt for r in train.rows} & {r.prompt for r in held.rows}
    assert len(train) >= 1
    assert (len(held) >= 1) == (len(set(prompts)) >= 2)
    smallest = min(prompts.count(p) for p in prompts)
    assert maximum is None or len(held) <= max(maximum, smallest)
    backwards = preferences(prompts[::-1]).split(fraction, maximum, seed)[1]
    if len({prompts.count(p) for p in prompts}) == 1:
        assert {r.prompt for r in backwards.rows} == {r.prompt for r in held.rows}


def test_a_split_depends_on_the_seed_and_on_the_share() -> None:
    data = preferences(list(range(200)))
    held = [{r.prompt for r in data.split(0.1, None, seed)[1].rows} for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 20  # a tenth of 200 prompts of one row each
    assert len(data.split(0.5, 7)[1]) == 7
    assert [len(part) for part in data.split(0)] == [200, 0]
    with pytest.raises(DataError, match="fraction"):
        data.split(1.0)


def test_a_report_survives_its_dictionary_and_adds_up() -> None:
    report = DataReport(read=9)
    for row in range(7):
        report.add("dropped: too long", Origin("f", row), "x" * 200)
    report.add("noted: odd", None)
    other = DataReport.from_dict(report.to_dict())
    assert other == report
    entry = other.entries["loading", "dropped: too long"]
    assert (entry.count, len(entry.examples), len(entry.examples[0].detail)) == (7, 5, 80)
    report.merge(other)
    assert (report.dropped, report.noted, report.read) == (14, 2, 18)
    assert other.lines()[0] == "loading: 9 rows read, 2 kept"
    with pytest.raises(ValueError, match="must begin with"):
        report.add("lost", None)


TEXT = st.sampled_from(["", " ", "Hi", "\n\nHuman: a\n\nAssistant: b", "a b c", "a b d", "\ud800"])
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "x", None, 3])
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLE, "from": ROLE, "content": TEXT})
JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just({}), st.just([]))
VALUE = st.one_of(TEXT, TEXT, JUNK, MESSAGE, st.lists(MESSAGE | JUNK | TEXT, max_size=3))
COLUMN = st.sampled_from(KNOWN_COLUMNS)
ANY_ROW = st.dictionaries(COLUMN, VALUE, max_size=6) | st.fixed_dictionaries(
    {"chosen": VALUE, "rejected": VALUE}, optional={"prompt": VALUE, "tools": VALUE}
)


@settings(max_examples=300)
@given(st.lists(ANY_ROW | JUNK, max_size=3))
def test_whatever_a_row_holds_the_outcome_is_preferences_or_a_data_error(rows: list[Any]) -> None:
    try:
        loaded = load_preferences(rows)
    except DataError as error:
        assert str(error)
    else:
        report = loaded.report
        assert len(loaded) == report.read - report.dropped + report.added
