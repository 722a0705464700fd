"""Judges: a real local model and a real HTTP server on loopback, asked in both orders."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_dpo.errors import JudgeError, LoraDpoError, UnreadableAnswerError
from lora_dpo.judging import PositionBias, Verdict, ask_both_orders, judge_answers, open_judge
from lora_dpo.judging.local import LocalJudge
from lora_dpo.judging.questions import question, read_letter
from tests.judge_server import Reply, completion, serving

KEY = "sk-a-secret-0123456789"


class LikesLonger:
    """A judge without a leaning to a place."""

    def choose(self, prompt: str, first: str, second: str) -> Any:
        if len(first) == len(second):
            return "tie"
        return "first" if len(first) > len(second) else "second"


class LikesFirst:
    """A judge that looks at the place alone."""

    def choose(self, prompt: str, first: str, second: str) -> Any:
        return "first"


def test_only_the_same_answer_in_both_orders_wins_and_all_else_is_a_tie() -> None:
    choices = ("first", "second", "tie")
    winners = {pair: Verdict(*pair).winner for pair in product(choices, choices)}
    assert winners.pop(("first", "second")) == "a"
    assert winners.pop(("second", "first")) == "b"
    assert set(winners.values()) == {"tie"} and len(winners) == 7


def test_swapping_the_answers_mirrors_the_verdict() -> None:
    for a, b in (("short", "a longer one"), ("a longer one", "short"), ("same", "also")):
        one = ask_both_orders(LikesLonger(), "?", a, b)
        other = ask_both_orders(LikesLonger(), "?", b, a)
        assert one.share + other.share == 1.0


def test_a_judge_that_always_prefers_the_first_gives_ties_alone_and_is_named_as_biased() -> None:
    found = judge_answers(LikesFirst(), [(f"p{i}", f"a{i}", f"b{i}") for i in range(20)])
    assert [verdict.share for verdict in found.verdicts if verdict] == [0.5] * 20
    assert (found.bias.first, found.bias.second) == (20, 0)
    # 20 of 20: twice one half to the 20th
    assert math.isclose(found.bias.p_value, 2 * 0.5**20) and found.bias.biased
    assert "biased to the first place" in str(found.bias)


def test_the_pairs_of_one_prompt_are_one_piece_of_evidence_on_the_judges_leaning() -> None:
    found = judge_answers(LikesFirst(), [(f"p{i % 3}", f"a{i}", f"b{i}") for i in range(30)])
    assert (found.bias.first, found.bias.second) == (30, 0)
    # 3 of 3 prompts: twice one half to the third
    assert math.isclose(found.bias.p_value, 2 * 0.5**3) and not found.bias.biased


def test_a_prompt_that_no_judge_can_read_does_not_stop_the_others() -> None:
    class Short(LikesLonger):
        def choose(self, prompt: str, first: str, second: str) -> Any:
            if len(prompt) > 9:
                raise UnreadableAnswerError("too long")
            return super().choose(prompt, first, second)

    long = [("a long prompt", "a" * i, "b") for i in range(2, 9)]
    found = judge_answers(Short(), [*long, ("p", "aa", "b"), ("q", "a", "bb")])
    assert found.unreadable == 7 and [v and v.winner for v in found.verdicts[7:]] == ["a", "b"]
    with pytest.raises(JudgeError, match="none of the first 5 pairs"):
        judge_answers(Short(), long)
    assert judge_answers(Short(), long, answered=True).unreadable == 7


def test_a_judge_without_a_leaning_is_not_called_biased() -> None:
    pairs = [("p", "x" * (i + 1), "x" * (7 - i)) for i in range(7)]
    found = judge_answers(LikesLonger(), pairs)
    assert [v.winner for v in found.verdicts if v] == ["b"] * 3 + ["tie"] + ["a"] * 3
    assert found.bias == PositionBias(7, 0, 0, 1.0) and not found.bias.biased


def test_an_answer_that_is_no_choice_of_the_three_is_refused() -> None:
    class Odd:
        def choose(self, prompt: str, first: str, second: str) -> Any:
            return "A"

    with pytest.raises(JudgeError, match="returned 'A'"):
        ask_both_orders(Odd(), "p", "a", "b")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"), ("B.", "B"), (" c\n", "C"), ("**B**", "B"), ("(A)", "A"), ("Answer: B", "B"),
        ("The better answer is A.", "A"), ("Tie", "C"), ("B\n\nIt is clearer.", "B"),
        ("A is better", "A"), ("B is clearly better than A.", "B"), ("**A** is the best", "A"),
        ("A is not as good as B", None), ("(A) is worse", None), ("A is wrong, so B", None),
        ("A: it is clearer than B", "A"),
        ("", None), ("A good answer would", None), ("Because", None), ("A or B", None),
        ("A/B", None), ("A, B", None), ("I cannot say", None), ("<think>A</think>", None),
    ],
)  # fmt: skip
def test_a_reply_is_read_only_where_it_begins_with_one_choice(
    said: str, letter: str | None
) -> None:
    assert read_letter(said) == letter


def longer_wins(_: int, body: dict[str, Any]) -> Reply:
    text = body["messages"][-1]["content"]
    first = text.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
    second = text.split("[Answer B]\n")[1].split("\n\n[Question]")[0]
    return completion("A" if len(first) > len(second) else "B")


def test_an_endpoint_is_asked_in_both_orders_with_the_key_in_the_header_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Another: sk-of-another-host")
    caplog.set_level(logging.DEBUG)
    with serving(longer_wins) as server:
        judge = open_judge(server.address, model="m", key_variable="MY_KEY", instructions="Be x.")
        verdict = ask_both_orders(judge, "Why?", "Because it is.", "No.")
    assert verdict.winner == "a"
    assert [request["path"] for request in server.requests] == ["/v1/chat/completions"] * 2
    for request in server.requests:
        assert request["headers"]["authorization"] == f"Bearer {KEY}"
        assert KEY not in json.dumps(request["body"]) + request["path"]
        sent = " ".join(request["headers"].values())
        assert "org-mine" not in sent and "x-another" not in request["headers"], sent
        assert request["body"]["model"] == "m" and request["body"]["temperature"] == 0
        assert request["body"]["messages"][0]["content"] == "Be x."
    assert KEY not in repr(judge) + caplog.text


def test_a_429_is_asked_again_and_then_read() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        if number == 0:
            return Reply(429, b'{"error": {"message": "slow"}}', {"Retry-After-Ms": "10"})
        return longer_wins(number, body)

    with serving(answer) as server:
        judge = open_judge(server.address, model="m", retries=1)
        assert judge.choose("p", "longer", "not") == "first"
    assert len(server.requests) == 2


def test_retries_are_bounded() -> None:
    def refusal(*_: Any) -> Reply:
        return Reply(503, b"{}", {"Retry-After-Ms": "1"})

    with serving(refusal) as server:
        judge = open_judge(server.address, model="m", retries=2)
        with pytest.raises(JudgeError, match="status 503"):
            judge.choose("p", "a", "b")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(401, f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode()), "status 401"),
        (Reply(404, b'{"error": {"message": "no model m"}}'), "no model m"),
        (Reply(400, KEY.encode()), "status 400"),
        (Reply(200, b"<html>hello</html>", {"Content-Type": "text/html"}), "no chat completion"),
        (Reply(200, b"{}"), "no chat completion"),
        (Reply(200, f"not json {KEY}".encode()), "OpenAI-compatible"),
        (Reply(200, b'{"choices": []}'), "no chat completion"),
        (Reply(200, b"{}", wait=3.0), "did not answer in time"),
    ],
)
def test_whatever_an_endpoint_does_is_one_sentence_without_the_key(
    reply: Reply, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda *_: reply) as server:
        judge = open_judge(server.address, model="m", retries=0, timeout=0.5)
        with pytest.raises(JudgeError, match=said) as caught:
            judge.choose("p", "a", "b")
    assert KEY not in str(caught.value)
    assert caught.value.__context__ is None or KEY not in str(caught.value.__context__)


def test_a_redirect_to_another_host_is_not_followed() -> None:
    with serving(longer_wins) as other:
        elsewhere = other.address.replace("127.0.0.1", "localhost") + "/chat/completions"
        with serving(lambda *_: Reply(307, b"", {"Location": elsewhere})) as server:
            judge = open_judge(server.address, model="m", retries=0)
            with pytest.raises(JudgeError, match="307"):
                judge.choose("p", "a", "b")
        assert not other.requests


def test_a_proxy_of_the_environment_gets_nothing_that_stays_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(longer_wins) as proxy, serving(longer_wins) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.address.removesuffix("/v1"))
        judge = open_judge(server.address, model="m", retries=0)
        assert judge.choose("p", "longer", "not") == "first"
    assert len(server.requests) == 1 and not proxy.requests


def test_a_host_that_refuses_is_named() -> None:
    with serving(longer_wins) as server:
        address = server.address
    judge = open_judge(address, model="m", retries=0)
    with pytest.raises(JudgeError, match="could not be asked") as caught:
        judge.choose("p", "a", "b")
    assert address in str(caught.value)


def test_unreadable_replies_are_counted_and_left_out_and_nothing_but_rubbish_is_an_error() -> None:
    def answer(number: int, body: dict[str, Any]) -> Reply:
        odd = "odd" in body["messages"][-1]["content"]
        return completion("\x1b[31mhm") if odd else longer_wins(number, body)

    pairs = [(f"p{i}{'odd' if i == 3 else ''}", "x", "xx") for i in range(8)]
    with serving(answer) as server:
        found = judge_answers(open_judge(server.address, model="m"), pairs)
        with pytest.raises(JudgeError, match="none of the first 5 pairs"):
            judge_answers(open_judge(server.address, model="m"), [("odd", "a", "b")] * 9)
    assert found.verdicts[3] is None and found.unreadable == 1
    assert [v.winner for v in found.verdicts if v] == ["b"] * 7
    assert "⟨ESC⟩" in found.example and "\x1b" not in found.example


def test_no_key_goes_unencrypted_to_another_machine_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_KEY", "sk-mine")
    given = {
        ("http://192.0.2.1/v1", None): "none",
        ("http://192.0.2.1/v1", "MY_KEY"): "sk-mine",
        ("https://192.0.2.1/v1", None): KEY,
        ("http://localhost:1/v1", None): KEY,
    }
    for (where, variable), key in given.items():
        judge: Any = open_judge(where, model="m", key_variable=variable)
        assert judge.client.api_key == key


@pytest.mark.parametrize(
    ("where", "options", "said"),
    [
        ("nowhere", {}, "neither a folder here nor"),
        ("https://host/v1", {}, "--judge-model"),
        ("https://user:secret@host/v1", {"model": "m"}, "user, a password"),
        ("https://host/v1?key=secret", {"model": "m"}, "a query"),
        ("https://host:port/v1", {"model": "m"}, "not a URL"),
        ("https:///v1", {"model": "m"}, "no host"),
        ("https://host/v1", {"model": "m", "key_variable": "NOT_SET_HERE"}, "'NOT_SET_HERE'"),
        ("https://host/v1", {"model": "m", "key_variable": "ODD"}, "characters that no key has"),
        ("https://host/v1", {"model": "m", "timeout": 0.0}, "timeout 0"),
        (".", {"model": "m"}, "for endpoints"),
    ],
)
def test_what_cannot_be_a_judge_is_told_before_anything_is_sent(
    where: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "two\nsecret lines")
    with pytest.raises(LoraDpoError, match=said) as caught:
        open_judge(where, **options)
    assert "secret" not in str(caught.value)


def test_without_the_extra_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from lora_dpo.errors import JudgeError\n"
        "from lora_dpo.judging import open_judge\n"
        "try:\n    open_judge('https://host/v1', model='m')\n"
        "except JudgeError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install lora-dpo[judge]" in out.stdout


def test_a_local_judge_in_4_bits_takes_the_letter_that_plain_transformers_finds_likelier(
    quickstart_model: Path,
) -> None:
    judge: Any = open_judge(quickstart_model, instructions="Which is better?")
    kinds = {type(module).__name__ for module in judge.model.modules()}
    assert "Linear4bit" in kinds and isinstance(judge, LocalJudge)
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    for first, second in (("One day.", "The end."), ("A fox.", "No."), ("No.", "A fox.")):
        what, pair = question("A story", first, second, "Which is better?", ties=False)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{what}\n\n{pair}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        likely = {}
        for letter in "AB":
            forms = {tuple(tokenizer(f, add_special_tokens=False)["input_ids"])
                     for f in (letter, f" {letter}")}  # fmt: skip
            likely[letter] = sum(_probability(judge.model, asked, list(form)) for form in forms)
        expected = "first" if likely["A"] > likely["B"] else "second"
        assert judge.choose("A story", first, second) == expected


def _probability(model: Any, asked: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([asked + answer])).logits[0].double()
    logps = logits.log_softmax(-1)[len(asked) - 1 : -1]
    return float(logps.gather(1, torch.tensor(answer)[:, None]).sum().exp())


def test_a_question_longer_than_the_local_judges_context_is_told_and_not_cut(
    tiny_model: Path,
) -> None:
    judge = open_judge(tiny_model)  # a token a byte, a context of 128, no chat template
    with pytest.raises(UnreadableAnswerError, match="context 128"):
        judge.choose("p", "a" * 200, "b")


def test_a_local_judge_without_a_chat_template_is_asked_in_plain_text(tiny_model: Path) -> None:
    opened: Any = open_judge(tiny_model)
    opened.model.config.max_position_embeddings = 4096  # rotary: nothing else depends on it
    assert not opened.tokenizer.chat_template
    assert opened.choose("p", "a", "b") in ("first", "second")
