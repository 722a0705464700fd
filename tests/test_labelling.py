"""``label``: blind, saved after every answer, resumed, closed to others; in a real browser too."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_dpo import label, load_preferences
from lora_dpo.cli import app
from lora_dpo.errors import ConfigError, DataError, OutputError
from lora_dpo.journal import open_journal
from lora_dpo.labelling.asking import journal_of
from lora_dpo.labelling.items import read_items
from lora_dpo.labelling.serving import MOST_BYTES, LabelServer
from lora_dpo.labelling.session import Session
from tests import browsing

HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>\u202egpj'


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}", "policy": f"mine {i}", "reference": f"theirs {i}"}
        for i in range(count)
    ]


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def _session(rows: Any, to: Path, *, seed: int = 0, **options: Any) -> Iterator[Session]:
    settings = {"mode": None, "all_pairs": False, **options}
    items = read_items(rows, seed=seed, **settings)
    with open_journal(journal_of(to), {"seed": seed}) as journal:
        yield Session(items, journal, to, seed)


@contextmanager
def _served(session: Session) -> Iterator[LabelServer]:
    with LabelServer(session) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def _answer(session: Session, choice: str) -> None:
    assert session.choose(session.state()["turn"], choice)


def _ask(
    server: LabelServer, method: str, name: str, body: Any = None, **headers: str
) -> tuple[int, bytes, Any]:
    """Ask the server as its own page would, but for what ``headers`` say; None leaves one out."""
    own = f"127.0.0.1:{server.server_port}"
    sent: dict[str, Any] = {"Host": own, "Origin": f"http://{own}"}
    sent |= {"Content_Type": "application/json"} | headers
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    content = body if isinstance(body, bytes) else json.dumps(body).encode() if body else None
    connection.putrequest(method, name, skip_host=True)
    for key, value in sent.items():
        if value is not None:
            connection.putheader(key.replace("_", "-"), value)
    if content is not None:
        connection.putheader("Content-Length", str(len(content)))
    connection.endheaders(content)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_an_answer_becomes_the_pair_that_was_shown(tmp_path: Path) -> None:
    to = tmp_path / "labels.jsonl"
    with _session(_rows(4), to) as session:
        shown = []
        for choice in ("left", "right", "tie", "skip"):
            shown.append(session.state()["texts"])
            _answer(session, choice)
        found = session.result()
    rows = _lines(to)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (shown[0][0], shown[0][1]),
        (shown[1][1], shown[1][0]),
    ]
    assert found.choices == {"left": 1, "right": 1, "tie": 1, "skip": 1} and found.written == 2
    # a tie counts half for both, a skipped one for none
    won = sum(row["chosen"].startswith("mine") for row in rows)
    assert found.wins == {"policy": (won + 0.5, 3), "reference": (2 - won + 0.5, 3)}
    assert "1 ties are kept with the answers" in str(found) and "4 of 4" in repr(found)
    read = load_preferences(to)
    assert read.kind == "paired" and len(read) == 2
    assert "policy preferred" in found.to_html() and found.to_dict()["written"] == 2


def test_a_file_that_is_not_as_the_answers_say_is_written_again(tmp_path: Path) -> None:
    to = tmp_path / "labels.jsonl"
    with _session(_rows(3), to) as session:
        _answer(session, "left")
        session.write()
        old = to.read_bytes()
        _answer(session, "left")
        session.write()
        new = to.read_bytes()
        to.write_bytes(old)  # as a write that failed, behind its checksum in the journal, leaves it
        session.write()
        assert to.read_bytes() == new != old


def test_a_thumb_counts_for_all_whose_text_it_is(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "policy": "x", "reference": "x"},
            {"prompt": "q", "policy": "y", "reference": "z"}]  # fmt: skip
    with _session(rows, tmp_path / "t.jsonl", mode="thumbs") as session:
        while session.state()["texts"]:
            _answer(session, "down" if session.state()["texts"] == ["z"] else "up")
        assert session.result().wins == {"policy": (2.0, 2), "reference": (1.0, 2)}


def test_thumbs_become_unpaired_rows_with_the_prompts_own_form(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": chat, "completion": text} for text in ("yes", "no", "hm", "yes")]
    to = tmp_path / "thumbs.jsonl"
    with _session(rows, to) as session:
        assert session.items.left_out == {"left out: the same as an earlier one": 1}
        assert session.state()["prompt"] == [{"role": "user", "text": "Hi"}]
        for choice in ("up", "down", "skip"):
            _answer(session, choice)
    assert _lines(to) == [
        {"prompt": chat, "completion": "yes", "label": True},
        {"prompt": chat, "completion": "no", "label": False},
    ]
    assert load_preferences(to).kind == "unpaired"


def test_sides_are_drawn_by_the_seed_from_the_texts_alone_half_of_them_each_way() -> None:
    def policies_left(rows: list[Any], seed: int) -> list[bool]:
        items = read_items(rows, None, all_pairs=False, seed=seed)
        session = Session.__new__(Session)
        session.seed = seed
        return [session._in_order(item)[0].startswith("mine") for item in items.items]

    rows = _rows(400)
    swapped = [{**r, "policy": r["reference"], "reference": r["policy"]} for r in rows]
    first = policies_left(rows, 0)
    assert first == policies_left(swapped, 0)  # columns, and so sources, decide nothing
    assert first[100:] == policies_left(rows[100:], 0)  # nor does the place in the file
    assert abs(sum(first) - 200) < 40  # 4 standard deviations of a fair coin
    agree = sum(a == b for a, b in zip(first, policies_left(rows, 1), strict=True))
    assert abs(agree - 200) < 40


def test_several_completions_are_shown_once_each_or_each_with_each() -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c", "d", "e"]},
        {"prompt": "q", "completions": [{"response": "x", "score": 1}, {"response": "x"}]},
        {"prompt": "r", "completions": ["alone"]},
    ]
    once = read_items(rows, None, all_pairs=False, seed=0)
    seen = [text for item in once.items for text in item.completions]
    assert len(once.items) == 3 and set(seen) == set("abcde")
    assert sorted(once.left_out.values()) == [1, 1]  # two equal ones, and one alone
    every = read_items(rows, "pairs", all_pairs=True, seed=0)
    assert len({frozenset(item.completions) for item in every.items}) == 10
    assert len(read_items(rows, "thumbs", all_pairs=False, seed=0).items) == 7


def test_answers_survive_a_torn_line_and_undo_survives_a_restart(tmp_path: Path) -> None:
    to = tmp_path / "labels.jsonl"
    with _session(_rows(3), to) as session:
        _answer(session, "left")
        _answer(session, "tie")
    journal = journal_of(to)
    whole = journal.read_bytes()
    for torn in (b'{"item": "ab', b'{"item": "\xf0\x9f', b"\n"[:0]):
        journal.write_bytes(whole + torn)
        with _session(_rows(3), to) as session:
            assert journal.read_bytes() == whole
            assert session.state()["done"] == 2
    with _session(_rows(3), to) as session:
        assert session.undo(session.state()["turn"])
    with _session([*_rows(3), *_rows(5)[3:]], to) as session:  # rows may be added
        state = session.state()
        assert state["done"] == 1 and state["all"] == 5
        assert state["prompt"][0]["text"] == "Question 1"
        assert not session.undo(state["turn"] - 1)  # of a page that has not seen the last change
        assert session.undo(state["turn"]) and not session.undo(state["turn"] + 1)
    journal.write_bytes(b"nonsense\n" + whole)
    with (
        pytest.raises(OutputError, match=r"answers\.jsonl:1: not readable"),
        _session(_rows(3), to),
    ):
        pass


def test_nothing_that_another_session_or_hand_made_is_written_over(tmp_path: Path) -> None:
    to = tmp_path / "labels.jsonl"
    with _session(_rows(2), to) as session:
        _answer(session, "left")
        session.write()
        with pytest.raises(OutputError, match="another process is writing"), _session(_rows(2), to):
            pass
    with (
        pytest.raises(OutputError, match=r"was begun with seed 0, and this is 1"),
        _session(_rows(2), to, seed=1),
    ):
        pass
    with (
        pytest.raises(OutputError, match="1 answers are to rows that are not in the data"),
        _session(_rows(2)[1:], to),
    ):
        pass
    with _session(_rows(2), to) as session:  # its own file is written anew
        _answer(session, "right")
    assert len(_lines(to)) == 2
    to.write_text("mine\n")
    with (
        pytest.raises(OutputError, match="exists already, and is not as an earlier session left"),
        _session(_rows(2), to),
    ):
        pass
    assert to.read_text() == "mine\n"


def test_only_the_page_itself_on_this_machine_may_ask(tmp_path: Path) -> None:
    with _session(_rows(2), tmp_path / "labels.jsonl") as session, _served(session) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        own, state = f"/{server.token}/", f"/{server.token}/state"
        assert len(server.token) >= 43  # 256 bits
        good = {"turn": session.state()["turn"], "choice": "left"}
        status, content, headers = _ask(server, "GET", own, Content_Type=None)  # type: ignore[arg-type]
        assert status == 200 and headers["Cache-Control"] == "no-store"
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        for name in re.findall(rb'(?:src|href)="([^"]*)"', content):
            assert name in (b"page.css", b"page.js", b"data:,")
        port = server.server_port
        refused = {
            403: [
                ("GET", state, None, {"Host": f"evil.example:{port}"}),  # DNS rebinding
                ("GET", state, None, {"Host": "127.0.0.1"}),
                ("POST", own + "choose", good, {"Origin": "http://evil.example"}),
                ("POST", own + "choose", good, {"Origin": f"http://evil.example:{port}"}),
                ("POST", own + "choose", good, {"Origin": "null"}),
                ("POST", own + "choose", good, {"Origin": None}),
            ],
            404: [
                ("GET", "/", None, {}),
                ("GET", f"/{'x' * 43}/state", None, {}),
                ("POST", f"/{server.token[:-1]}/choose", good, {}),
                ("GET", own + "../../pyproject.toml", None, {}),
                ("POST", own + "other", good, {}),
            ],
            415: [("POST", own + "choose", good, {"Content_Type": "text/plain"})],
            413: [("POST", own + "choose", b" " * (MOST_BYTES + 1), {})],
            400: [("POST", own + "choose", b"[1]", {}), ("POST", own + "choose", b"{", {})],
            501: [("PUT", own + "choose", good, {})],
            409: [
                ("POST", own + "choose", {**good, "turn": 7}, {}),
                ("POST", own + "choose", {**good, "choice": "up"}, {}),
                ("POST", own + "choose", {**good, "choice": ["left"]}, {}),
                ("POST", own + "undo", {"turn": 0}, {}),
            ],
        }
        for status, cases in refused.items():
            for method, name, body, headers in cases:
                found = _ask(server, method, name, body, **headers)
                assert found[0] == status, (method, name, body, headers, found[:2])
        assert session.state()["done"] == 0
        assert _ask(server, "POST", own + "choose", good)[0] == 200
        assert _ask(server, "POST", own + "choose", good)[0] == 409  # a second click is no answer
        assert session.state()["done"] == 1


@pytest.mark.parametrize("mode", ["pairs", "thumbs"])
def test_what_the_page_gets_does_not_tell_where_a_text_is_from(tmp_path: Path, mode: str) -> None:
    """Two files that differ in which column holds which text look the same to who is asked."""
    seen = []
    for mine, theirs in (("policy", "reference"), ("reference", "policy")):
        rows = [{"prompt": f"p{i}", mine: f"x{i}", theirs: f"y{i}"} for i in range(6)]
        to = tmp_path / f"{mine}.jsonl"
        with _session(rows, to, mode=mode) as session, _served(session) as server:
            own, got = f"/{server.token}/", []
            for _ in session.items.items:
                content = _ask(server, "GET", own + "state")[1]
                got.append(content)
                _answer(session, "left" if mode == "pairs" else "up")
            assert not any(b"policy" in x or b"reference" in x for x in got)
            got += [_ask(server, "GET", own + name)[1] for name in ("", "page.js", "page.css")]
        seen.append(got)
    assert seen[0] == seen[1]


def test_mistakes_are_told_before_the_page_opens(tmp_path: Path) -> None:
    data = _write(tmp_path / "d.jsonl", _rows(1))
    single = [{"prompt": "p", "completion": "c"}]
    with pytest.raises(DataError, match=r"one completion.*--mode thumbs"):
        label(single, tmp_path / "l.jsonl", mode="pairs")
    with pytest.raises(DataError, match="nothing to ask about"):
        label([{"prompt": "p", "policy": "c", "reference": "c"}], tmp_path / "l.jsonl")
    with pytest.raises(DataError, match=r"<memory>:1: policy is int"):
        label([{"prompt": "p", "policy": 3, "reference": "c"}], tmp_path / "l.jsonl")
    with pytest.raises(DataError, match="half of a character"):
        label([{"prompt": "p", "policy": "\ud800", "reference": "c"}], tmp_path / "l.jsonl")
    with pytest.raises(ConfigError, match="mode is 'stars'"):
        label(data, tmp_path / "l.jsonl", mode="stars")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="is the data themselves"):
        label(data, data)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OutputError, match=r"port \d+ of 127.0.0.1: cannot be listened on"):
            label(data, tmp_path / "l.jsonl", port=taken.getsockname()[1], browser=False)
    assert not (tmp_path / "l.jsonl").exists()
    wrong = CliRunner().invoke(app, ["label", str(tmp_path / "no.jsonl"), "--no-browser"])
    assert wrong.exit_code == 1 and "no such file" in wrong.output


def test_asking_imports_no_torch_and_so_begins_at_once() -> None:
    code = "import sys, lora_dpo.labelling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browsing.chromium() as browser:
        yield browser


@contextmanager
def _started(data: Path, to: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command as a user does; give it and the address that it prints."""
    command = [sys.executable, "-m", "lora_dpo", "label", str(data), "--to", str(to)]
    with subprocess.Popen(
        [*command, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            lines = (re.search(r"http://127\.0\.0\.1:\d+/\S+/", x) for x in process.stdout)
            yield process, next(found[0] for found in lines if found)
        finally:
            process.kill()


def _expect(thing: Any) -> Any:
    """Wait for what is expected, without code in the page, which its policy would refuse."""
    from playwright.sync_api import expect

    return expect(thing)


def _press(page: Any, key: str, done: int) -> None:
    page.keyboard.press(key)
    _expect(page).to_have_title(re.compile(rf"{done} of \d"))


def test_a_person_chooses_by_keyboard_is_killed_and_goes_on(chromium: Any, tmp_path: Path) -> None:
    data = _write(tmp_path / "samples.jsonl", _rows(5))
    to = tmp_path / "labels.jsonl"
    with _started(data, to) as (process, url):
        page = chromium.new_page()
        page.goto(url)
        page.wait_for_selector("#do-left")
        first = page.locator(".completion .text").all_inner_texts()
        _press(page, "ArrowLeft", 1)
        _press(page, "t", 2)
        _press(page, "u", 1)
        _press(page, "u", 0)
        assert page.locator(".completion .text").all_inner_texts() == first
        _press(page, "ArrowRight", 1)
        third = page.locator("#prompt .text").inner_text()
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.keyboard.press("ArrowLeft")
        _expect(page.locator("#said")).to_contain_text("stopped")
    assert not to.exists()
    with _started(data, to) as (process, url):
        page.goto(url)
        page.wait_for_selector("#do-left")
        assert page.locator("#prompt .text").inner_text() == third
        for done, key in enumerate(("ArrowLeft", "t", "s"), start=2):
            _press(page, key, done)
        page.keyboard.press("Tab")  # and by the buttons alone
        assert page.evaluate("document.activeElement.id") == "do-left"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        _press(page, "Enter", 5)
        page.click("#do-finish")
        _expect(page.locator("#question")).to_have_text("Done")
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(20) == 0
    assert "5 of 5 answered: 2 left, 1 right, 1 tie, 1 skip" in said
    rows = _lines(to)
    assert len(rows) == 3 and (rows[0]["chosen"], rows[0]["rejected"]) == (first[1], first[0])


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_hostile_texts_stay_texts(
    chromium: Any, width: int, tmp_path: Path
) -> None:
    rows = [{"prompt": HOSTILE, "policy": HOSTILE + "w" * 300, "reference": "a\n\nb\u200dc"}]
    with _session(rows, tmp_path / "l.jsonl") as session, _served(session) as server:
        said: list[str] = []
        for scheme in ("light", "dark"):
            page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url))
            page.goto(server.url)
            page.wait_for_selector("#do-left")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            texts = page.locator(".completion .text").all_inner_texts()
            assert sorted(texts)[1] == "a\n\nb\u200dc"
            assert sorted(texts)[0] == HOSTILE.replace("\u202e", "⟨U+202E⟩") + "w" * 300
            assert page.locator("#prompt .text").inner_text().startswith("<img src=x")
            assert page.evaluate("window.hacked") is None
            assert (
                page.evaluate("[...document.querySelectorAll('main img, main script')].length") == 0
            )
            names = page.locator("button:visible").all_inner_texts()
            assert len(names) == 6 and page.get_by_role("progressbar").get_attribute("aria-label")
            page.close()
    assert [x for x in said if not x.startswith((server.url, "data:"))] == []


def test_thumbs_are_given_by_keyboard_and_held_keys_give_no_more(
    chromium: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)]
    to = tmp_path / "thumbs.jsonl"
    with _session(rows, to) as session, _served(session) as server:
        page = chromium.new_page()
        page.goto(server.url)
        page.wait_for_selector("#do-up")
        page.keyboard.down("y")
        page.keyboard.down("y")  # held: the browser repeats it
        _expect(page).to_have_title(re.compile("1 of 4"))  # a key during the save is no answer
        _press(page, "n", 2)
        page.keyboard.press("Control+y")
        page.keyboard.press("ArrowLeft")
        _press(page, "u", 1)
        _press(page, "s", 2)
        page.click("#do-down")
        _expect(page).to_have_title(re.compile("3 of 4"))
        page.click("#do-finish")  # before the end
        _expect(page.locator("#question")).to_have_text("Done")
        page.close()
    assert [(row["completion"], row["label"]) for row in _lines(to)] == [
        ("c0", True),
        ("c2", False),
    ]
