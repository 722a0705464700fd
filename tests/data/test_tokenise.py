"""Laws of the token ids: exact boundaries, one BOS, one end on each side, nothing lost unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_dpo.data import Tokenised, load_preferences, tokenise, tokenising
from lora_dpo.data.vocabulary import read_vocabulary
from lora_dpo.errors import DataError
from lora_dpo.prompt_tokens import encode_prompt
from tests.data.helpers import ZQ, pairs

SHARED = Path(__file__).parents[3] / "shared"
PAIRS = [
    ("Once upon a time there was ", "a cat", "two dogs and a cat"),
    ("What is better than ugly?", " Beautiful.", " Nothing at all."),
    ("What is better than ugly?\n", "Beautiful.", "Complex."),
    ("She loved to mak", "e music", "ing things"),
    ("Café ", "olé naïve 日本 🙂", "x"),
    ("two  spaces  ", "  more\n\n", "\tless"),
]
USER = {"role": "user", "content": "Hi there"}


def chat(text: str = "Hi there", chosen: str = "Yes", rejected: str = "No") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": text}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def reasons(tokenised: Tokenised) -> list[str]:
    return [reason for _, reason in tokenised.report.entries]


def test_prompt_and_answer_ids_decode_to_the_joint_text(any_tokenizer: Any) -> None:
    tokenised = tokenise(pairs(PAIRS), any_tokenizer, max_length=512)
    assert len(tokenised) + tokenised.report.dropped == len(PAIRS)
    assert len(tokenised) >= len(PAIRS) - 1
    for row in tokenised.rows:
        prompt, *answers = PAIRS[row["row"] - 1]
        for text, name in zip(answers, ("chosen_ids", "rejected_ids"), strict=True):
            joint = any_tokenizer(prompt + text).input_ids
            ids = row["prompt_ids"] + row[name]
            assert ids[-1] == any_tokenizer.eos_token_id
            assert decode(any_tokenizer, ids[:-1]) == decode(any_tokenizer, joint)


def test_the_prompt_is_tokenised_as_generation_would(any_tokenizer: Any) -> None:
    tokenised = tokenise(pairs(PAIRS), any_tokenizer, max_length=512)
    for row in tokenised.rows:
        assert row["prompt_ids"] == any_tokenizer(PAIRS[row["row"] - 1][0]).input_ids


def test_the_boundary_law_holds_on_real_stories(any_tokenizer: Any) -> None:
    path = SHARED / "data" / "stories656k_positive.standard.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    data = load_preferences(path)
    tokenised = tokenise(data, any_tokenizer, max_length=4096)
    assert len(tokenised) == len(data)
    for row, pair in list(zip(tokenised.rows, data.rows, strict=True))[::10]:
        joint = any_tokenizer(pair.prompt + pair.chosen).input_ids
        ids = row["prompt_ids"] + row["chosen_ids"][:-1]
        assert decode(any_tokenizer, ids) == decode(any_tokenizer, joint)


def test_a_token_across_the_boundary_is_split_and_counted(merging: Any) -> None:
    # The vocabulary has learnt "the▁" from the corpus, so "the" + " cat" share a token.
    joint = merging("sat on the cat").input_ids
    prompt = merging("sat on the").input_ids
    assert joint[: len(prompt)] != prompt
    tokenised = tokenise(pairs([("sat on the", " cat", " mat")]), merging, max_length=99)
    assert tokenised.rows[0]["prompt_ids"] == prompt
    assert reasons(tokenised) == ["repaired: boundary merge: prompt and answer tokenised apart"]


@pytest.mark.parametrize("prompt", ["Hi there", "<s>Hi there", "<s><s>Hi there"])
def test_there_is_one_bos_and_generation_asks_with_the_same_tokens(
    dummy_prefix: Any, prompt: str
) -> None:
    tokenised = tokenise(pairs([(prompt, " a", " b")]), dummy_prefix, max_length=99)
    row = tokenised.rows[0]
    body = dummy_prefix("Hi there", add_special_tokens=False).input_ids
    assert row["prompt_ids"] == [dummy_prefix.bos_token_id, *body]
    assert (tokenised.report.repaired == 1) == prompt.startswith("<s>")
    assert encode_prompt(dummy_prefix, prompt) == row["prompt_ids"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_chat_is_asked_with_the_bos_that_it_was_trained_with(
    dummy_prefix: Any, count: int
) -> None:
    """A template may open with BOS twice."""
    dummy_prefix.chat_template = (
        "{{ bos_token }}" * count + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    row = chat()
    tokenised = tokenise(load_preferences([row]), dummy_prefix, max_length=99)
    ids = tokenised.rows[0]["prompt_ids"]
    assert ids.count(dummy_prefix.bos_token_id) == 1
    assert encode_prompt(dummy_prefix, row["prompt"]) == ids
    reported = any("BOS" in reason for reason in reasons(tokenised))
    assert reported == (count > 1)


def test_an_eos_that_the_tokenizer_appends_is_no_part_of_the_prompt(dummy_prefix: Any) -> None:
    from tokenizers import processors

    dummy_prefix.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    row = tokenise(pairs([("Hi there", " a", " b")]), dummy_prefix, max_length=99).rows[0]
    assert row["prompt_ids"] == dummy_prefix("Hi there").input_ids[:-1]
    assert [row[name].count(2) for name in ("chosen_ids", "rejected_ids")] == [1, 1]


def test_each_answer_ends_with_one_eos_whether_or_not_it_is_written(dummy_prefix: Any) -> None:
    data = pairs([("Hi", " yes</s>", " no")])
    tokenised = tokenise(data, dummy_prefix, max_length=99)
    row = tokenised.rows[0]
    for name in ("chosen_ids", "rejected_ids"):
        assert row[name][-1] == 2 and row[name].count(2) == 1
    assert reasons(tokenised) == ["repaired: EOS text at the end of an answer not doubled"]


def test_text_that_imitates_control_tokens_stays_text_and_is_noted(dummy_prefix: Any) -> None:
    tokenised = tokenise(pairs([("Say </s> now", " a </s> b", " c")]), dummy_prefix, max_length=99)
    row = tokenised.rows[0]
    assert 2 not in row["prompt_ids"] and row["chosen_ids"].count(2) == 1
    assert reasons(tokenised) == ["noted: special-token text in content was read as plain text"]


def test_a_prompt_that_is_rendered_already_is_noted(chatml: Any) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenised = tokenise(pairs([(text, "a", "b")]), chatml, max_length=999)
    assert "looks rendered already" in reasons(tokenised)[0]


def test_a_tokenizer_without_eos_is_an_error(chatml: Any) -> None:
    chatml.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenise(pairs([("a", " b", " c")]), chatml, max_length=9)


def test_a_conversation_ends_with_the_end_of_turn_token(chatml: Any) -> None:
    row = tokenise(load_preferences([chat()]), chatml, max_length=99).rows[0]
    prompt = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert decode(chatml, row["prompt_ids"]) == prompt
    assert decode(chatml, row["chosen_ids"]) == "Yes<|im_end|>"
    assert row["prompt_ids"] == chatml(prompt, add_special_tokens=False).input_ids


def test_an_end_of_turn_token_that_the_model_does_not_stop_at_is_noted(chatml: Any) -> None:
    turn = chatml.eos_token_id
    chatml.eos_token = "<|endoftext|>"
    data = load_preferences([chat()])
    tokenised = tokenise(data, chatml, max_length=99)
    assert decode(chatml, tokenised.rows[0]["chosen_ids"]) == "Yes<|im_end|>"
    assert reasons(tokenised) == [
        "noted: end-of-turn token <|im_end|> is not a stop token of the model"
    ]
    assert not tokenise(data, chatml, max_length=99, stop_ids=[turn]).report.entries


def test_a_template_without_an_end_of_turn_gets_eos(chatml: Any) -> None:
    chatml.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenised = tokenise(load_preferences([chat()]), chatml, max_length=99)
    assert decode(chatml, tokenised.rows[0]["rejected_ids"]) == "No\n<|im_end|>"
    assert "ends an answer with no token" in reasons(tokenised)[0]


def test_a_double_bos_of_a_template_is_collapsed(dummy_prefix: Any) -> None:
    dummy_prefix.chat_template = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenised = tokenise(load_preferences([chat("<s>Hi")]), dummy_prefix, max_length=99)
    assert tokenised.rows[0]["prompt_ids"].count(1) == 1
    assert "repaired: double BOS collapsed" in reasons(tokenised)
    assert "noted: special-token text in content was read as plain text" in reasons(tokenised)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_a_generation_prompt_that_answers_lack_moves_to_the_answer(chatml: Any) -> None:
    chatml.chat_template = THINKING
    tokenised = tokenise(load_preferences([chat()]), chatml, max_length=99)
    row = tokenised.rows[0]
    assert decode(chatml, row["prompt_ids"]) == "<|im_start|>user\nHi there<|im_end|>\n"
    assert decode(chatml, row["chosen_ids"]) == "<|im_start|>assistant\nYes<|im_end|>"
    assert tokenised.report.repaired == 1


def test_a_template_that_changes_earlier_turns_is_an_error_with_the_row(chatml: Any) -> None:
    chatml.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="<memory>:1: the chat template renders the prompt diff"):
        tokenise(load_preferences([chat()]), chatml, max_length=99)


def test_a_template_that_refuses_a_row_is_an_error_with_the_row(chatml: Any) -> None:
    chatml.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"<memory>:1: .*no system role"):
        tokenise(load_preferences([chat()]), chatml, max_length=99)


def test_messages_need_a_template_and_template_arguments_need_messages(
    chatml: Any, dummy_prefix: Any
) -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template"):
        tokenise(load_preferences([chat()]), dummy_prefix, max_length=99)
    with pytest.raises(DataError, match="the rows are texts"):
        tokenise(pairs(PAIRS), chatml, max_length=99, template_arguments={"a": 1})
    with pytest.raises(DataError, match="'tokenize' is set by this library"):
        arguments = {"tokenize": True}
        tokenise(load_preferences([chat()]), chatml, max_length=9, template_arguments=arguments)


def test_tools_and_arguments_reach_the_template(chatml: Any) -> None:
    chatml.chat_template = "{{ tools[0]['name'] }}{{ style }}" + chatml.chat_template
    data = load_preferences([{**chat(), "tools": [{"name": "add"}]}])
    row = tokenise(data, chatml, max_length=99, template_arguments={"style": "!"}).rows[0]
    assert decode(chatml, row["prompt_ids"]).startswith("add!<|im_start|>user")


def test_sides_that_differ_only_in_what_the_template_trims_are_dropped(chatml: Any) -> None:
    chatml.chat_template = chatml.chat_template.replace("m['content']", "m['content'] | trim")
    data = load_preferences([chat(), chat(chosen="No ")])
    tokenised = tokenise(data, chatml, max_length=99)
    assert len(tokenised) == 1
    assert reasons(tokenised) == ["dropped: chosen and rejected are identical after tokenising"]


def test_a_row_longer_than_max_length_is_dropped_and_counted(chatml: Any) -> None:
    assert len(tokenise(pairs(ZQ), chatml, max_length=14)) == 2
    tokenised = tokenise(pairs(ZQ), chatml, max_length=13)
    assert (len(tokenised), tokenised.report.dropped) == (1, 1)
    assert (
        tokenised.report.entries["tokenising", "dropped: longer than max_length"].examples[0].detail
        == "14 tokens"
    )
    assert tokenised.summary.before.max == 14 and tokenised.summary.total.max == 3


def test_a_row_longer_than_max_length_can_be_an_error(chatml: Any) -> None:
    with pytest.raises(DataError, match="<memory>:1: 14 tokens, and max_length is 13"):
        tokenise(pairs(ZQ), chatml, max_length=13, overflow="error")


def test_a_prompt_is_cut_at_its_left_and_answers_stay_whole(chatml: Any) -> None:
    whole = tokenise(pairs(ZQ), chatml, max_length=14).rows[0]
    tokenised = tokenise(pairs(ZQ), chatml, max_length=10, overflow="truncate-prompt")
    cut = tokenised.rows[0]
    assert cut["prompt_ids"] == whole["prompt_ids"][-2:]  # 10 - 8
    assert cut["chosen_ids"] == whole["chosen_ids"]
    assert tokenised.report.truncated == 1
    dropped = tokenise(pairs(ZQ), chatml, max_length=8, overflow="truncate-prompt")
    assert (len(dropped), dropped.report.dropped) == (1, 1)


def test_a_cut_prompt_keeps_its_bos(dummy_prefix: Any) -> None:
    data = pairs([("Hi there my friend", " yes", " no")])
    whole = tokenise(data, dummy_prefix, max_length=99).rows[0]
    longer = max(len(whole["chosen_ids"]), len(whole["rejected_ids"]))
    cut = tokenise(data, dummy_prefix, max_length=longer + 3, overflow="truncate-prompt").rows[0]
    assert cut["prompt_ids"] == [1, *whole["prompt_ids"][-2:]]


def test_where_one_answer_loses_its_end_the_other_does_too(chatml: Any) -> None:
    whole = tokenise(pairs(ZQ), chatml, max_length=14).rows[0]
    tokenised = tokenise(pairs(ZQ), chatml, max_length=12, overflow="truncate-completion")
    cut = tokenised.rows[0]
    assert cut["rejected_ids"] == whole["rejected_ids"][:6]  # 12 - 6
    assert cut["chosen_ids"] == whole["chosen_ids"][:-1]
    assert chatml.eos_token_id not in cut["chosen_ids"] + cut["rejected_ids"]
    assert tokenised.report.truncated == 1
    dropped = tokenise(pairs(ZQ), chatml, max_length=6, overflow="truncate-completion")
    assert (len(dropped), dropped.report.dropped) == (1, 1)


def test_answers_that_a_cut_makes_identical_are_an_error(chatml: Any) -> None:
    data = pairs([("ZZ", "QQQQJ", "QQQQZ")])
    with pytest.raises(
        DataError, match=r"<memory>:1: cut to 5 tokens.*identical.*Raise max_length"
    ):
        tokenise(data, chatml, max_length=5, overflow="truncate-completion")


def test_no_row_left_is_an_error_with_the_counts(chatml: Any) -> None:
    with pytest.raises(DataError, match=r"1  dropped: longer(.|\n)*shortest row has 14 tokens"):
        tokenise(pairs(ZQ[:1]), chatml, max_length=9)


@pytest.mark.parametrize("overflow", ["drop", "truncate-prompt", "truncate-completion"])
@pytest.mark.parametrize("max_length", [8, 16, 40])
def test_kept_and_dropped_add_up_and_all_kept_rows_fit(
    any_tokenizer: Any, overflow: Any, max_length: int
) -> None:
    rows = [*PAIRS, ("Hi", " a b c d e f g h i", " j k l m n o p q r")]
    try:
        tokenised = tokenise(pairs(rows), any_tokenizer, max_length=max_length, overflow=overflow)
    except DataError as error:
        assert "no rows are left" in str(error)
        return
    assert len(tokenised) + tokenised.report.dropped == len(rows) == tokenised.report.read
    eos = any_tokenizer.eos_token_id
    for row in tokenised.rows:
        sides = row["chosen_ids"], row["rejected_ids"]
        assert len(row["prompt_ids"]) + max(map(len, sides)) <= max_length
        assert row["prompt_ids"] and all(sides)
        assert (sides[0][-1] == eos) == (sides[1][-1] == eos)


def test_rows_are_the_same_however_many_are_tokenised_at_a_time(
    dummy_prefix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokenise(pairs(PAIRS), dummy_prefix, max_length=256)
    monkeypatch.setattr(tokenising, "CHUNK", 2)
    found = tokenise(pairs(PAIRS), dummy_prefix, max_length=256)
    assert len(found) == len(PAIRS) and list(found.rows) == list(expected.rows)
    assert found.summary == expected.summary


def test_unpaired_rows_keep_their_label_and_place(dummy_prefix: Any) -> None:
    rows = [{"prompt": "Hi", "completion": f" {w}", "label": w == "yes"} for w in ("yes", "no")]
    tokenised = tokenise(load_preferences(rows), dummy_prefix, max_length=20)
    assert tokenised.kind == "unpaired"
    assert tokenised.rows["label"][:] == [True, False]
    assert tokenised.rows["row"][:] == [1, 2]
    assert len(set(tokenised.rows["prompt_key"])) == 1
    assert tokenised.summary.chosen_longer is None and tokenised.summary.completion.max > 1


def test_the_summary_gives_nearest_rank_quantiles(chatml: Any) -> None:
    # Answers of 1..10 letters and EOS against 3 letters and EOS: chosen is longer 7 times of 9.
    rows = [("Z" * n, "QJ" * (n // 2) + "Q" * (n % 2), "JJJ") for n in range(1, 11)]
    summary = tokenise(pairs(rows), chatml, max_length=99).summary
    assert (summary.prompt.p50, summary.prompt.p90, summary.prompt.max) == (5, 9, 10)
    assert (summary.chosen.p50, summary.chosen.p90, summary.chosen.max) == (6, 10, 11)
    assert summary.rejected.p99 == 4
    assert summary.chosen_longer == pytest.approx(0.7)
    assert "70%" in summary.lines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_length": 1}, "max_length"), ({"overflow": "cut"}, "overflow")],
)
def test_an_illegal_option_is_an_error(chatml: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenise(pairs(ZQ), chatml, **{"max_length": 9, **options})


def test_two_tokens_are_the_least_that_a_row_may_be_asked_to_fit_in(chatml: Any) -> None:
    with pytest.raises(DataError, match="longer than max_length"):
        tokenise(pairs([("a", " b", " c")]), chatml, max_length=2)


def test_control_text_is_found_for_every_special_token(chatml: Any) -> None:
    vocabulary = read_vocabulary(chatml, ())
    assert vocabulary.control_text("a <|im_start|> b")
    assert not vocabulary.control_text("a <| b |>")


def test_a_long_conversation_is_tokenised_as_its_whole_text(chatml: Any) -> None:
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"turn {i} the quick fox " * 20}
        for i in range(5)
    ]
    data = load_preferences([{**chat(chosen="\nYes  ", rejected="the lazy dog"), "prompt": turns}])
    row = tokenise(data, chatml, max_length=9999).rows[0]
    for name, answer in (("chosen_ids", "\nYes  "), ("rejected_ids", "the lazy dog")):
        whole = [*turns, {"role": "assistant", "content": answer}]
        text = chatml.apply_chat_template(whole, tokenize=False).removesuffix("\n")
        joint = chatml(text, add_special_tokens=False).input_ids
        assert decode(chatml, row["prompt_ids"] + row[name]) == text
        if name == "rejected_ids":  # the other begins with a line break that merges backwards
            assert row["prompt_ids"] + row[name] == joint
