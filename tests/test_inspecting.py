"""Data as the model sees it: the same tokens, the counts of the file, and every string as text."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from lora_dpo import inspect_preferences, load_preferences, tokenise
from lora_dpo.diagnostics import Effort
from lora_dpo.errors import ConfigError, DataError, ModelError
from lora_dpo.inspecting.printing import BETWEEN, SHADES, TokenLine, token_line
from lora_dpo.inspecting.tokens import Token
from lora_dpo.showing import console_for, visible
from tests import browsing

HOSTILE = "<script>alert(1)</script> [red]x[/red] \x1b[31m \u202e :smile: {{ 7*7 }} <b>&amp;"


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _chat(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": _turns("user", prompt),
        "chosen": _turns("assistant", chosen),
        "rejected": _turns("assistant", rejected),
    }


FORMATS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {"prompt": "Why?", "chosen": " Because é😀 it is.", "rejected": " No."},
        {"prompt": "Tell me:\n", "chosen": "one\ttwo", "rejected": "three\r\n"},
    ],
    "chat": [_chat("A story, please.", "Once upon a time.", "No."), _chat("Hm?", "Yes 😀.", "Ñ")],
    "transcripts": [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello there",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Go",
        }
    ],
    "unpaired": [
        {"prompt": "Why?", "completion": " So.", "label": True},
        {"prompt": "How?", "completion": " Not.", "label": False},
    ],
}


class _Parts(HTMLParser):
    """The token boxes of a page: part, ids and texts, without the marks and ids beside them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.boxes: list[tuple[str, list[int], list[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.inside = self.aside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.attributes += given
        words = (given.get("class") or "").split()
        if "tokens" in words:
            self.boxes.append((words[1], [], []))
        if "t" in words:
            self.inside = True
            self.boxes[-1][1].append(int(given["title"] or -1))
            self.boxes[-1][2].append("")
        self.aside = tag in ("sup", "sub")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "span"
        self.aside = False

    def handle_data(self, data: str) -> None:
        if self.inside and not self.aside:
            self.boxes[-1][2][-1] += data


@pytest.mark.parametrize("name", FORMATS)
def test_the_coloured_boundary_is_that_of_the_tokens_that_are_trained(
    name: str, quickstart_model: Path, tmp_path: Path
) -> None:
    data = _write(tmp_path / "rows.jsonl", FORMATS[name])
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    trained = tokenise(load_preferences(data), tokenizer, max_length=256)
    found = inspect_preferences(
        data, quickstart_model, readiness=False, rows=9, max_length=256, ids=True
    )
    answers = ["chosen", "rejected"] if trained.kind == "paired" else ["completion"]
    expected = [(part, row[f"{part}_ids"]) for row in trained.rows for part in ("prompt", *answers)]
    shown = [
        (part, tokens)
        for row in found.rows
        for part, tokens in (("prompt", row.prompt), *row.answers.items())
    ]
    boxes = _Parts(found.to_html()).boxes
    assert [(part, [token.id for token in tokens]) for part, tokens in shown] == expected
    assert [ids for _, ids, _ in boxes] == [ids for _, ids in expected]
    for (part, tokens), (colour, _, texts), (_, ids) in zip(shown, boxes, expected, strict=True):
        text = tokenizer.decode(ids)
        assert "".join(token.text for token in tokens) == text
        assert colour == {"completion": "chosen"}.get(part, part)
        assert "".join(texts) == visible(text, keep_lines=True)
        line = token_line(tokens, part, ids=True, bars=False)
        spans = [
            line.plain[s.start : s.end] for s in line.spans if str(s.style).startswith(SHADES[part])
        ]
        assert "".join(spans) == visible(text)


def test_a_space_before_an_answer_is_shown_where_the_tokenizer_alone_would_drop_it(
    tmp_path: Path,
) -> None:
    """As Llama's: the decoder strips the first space, of a whole text or of an answer by itself."""
    alphabet = sorted(set("▁Why?yesnoté"))
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    data = _write(tmp_path / "r.jsonl", [{"prompt": "Why?", "chosen": " yes", "rejected": " no"}])
    row = inspect_preferences(data, tmp_path / "model", readiness=False).rows[0]
    answer = row.answers["chosen"]
    assert tokenizer.decode([token.id for token in answer]) == "yes</s>"
    assert [token.text for token in answer] == [" ", "y", "e", "s", "</s>"]


def test_begin_end_and_end_of_turn_are_marked(quickstart_model: Path, tmp_path: Path) -> None:
    chat = _write(tmp_path / "chat.jsonl", [_chat("Hi.", "Yes.", "No.")])
    row = inspect_preferences(chat, quickstart_model, readiness=False, max_length=256).rows[0]
    assert [t.marks for t in row.prompt if t.marks] == [
        ("BOS",), ("special",), ("EOS", "end of turn"), ("special",),
    ]  # fmt: skip
    for tokens in row.answers.values():
        assert [t.marks for t in tokens if t.marks] == [("EOS", "end of turn")]
        assert tokens[-1].marks
    plain = _write(tmp_path / "plain.jsonl", [{"prompt": "a", "chosen": "b" * 20, "rejected": "c"}])
    settings: dict[str, Any] = {"max_length": 8, "overflow": "truncate-completion"}
    cut = inspect_preferences(plain, quickstart_model, readiness=False, **settings)
    assert cut.totals["truncated"] == 1
    assert not any(t.marks for tokens in cut.rows[0].answers.values() for t in tokens)


def test_without_colours_a_bar_stands_between_tokens_and_ids_stand_on_demand() -> None:
    tokens = [Token(5, "a b"), Token(6, "c"), Token(2, "</s>", ("EOS",))]
    assert token_line(tokens, "chosen", ids=False, bars=True).plain == "a b|c|</s>[EOS]"
    assert token_line(tokens, "chosen", ids=True, bars=True).plain == "a b(5)|c(6)|</s>[EOS](2)"
    stream = io.StringIO()
    console_for(stream, color_system="standard", force_terminal=True).print(
        TokenLine(tokens, "chosen", ids=False)
    )
    green, bright = "\x1b[32m", "\x1b[92m"
    assert f"{green}a b\x1b[0m{bright}c\x1b[0m" in stream.getvalue()
    long = token_line([Token(i, "x") for i in range(1000)], "prompt", ids=False, bars=True).plain
    assert " ... 850 tokens ... " in long and long.count("x") == 150 and BETWEEN == "|"


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file with one row of each defect at a known line, and held-out rows that leak."""
    folder = tmp_path_factory.mktemp("defects")
    good = {"prompt": "one", "chosen": "yes", "rejected": "no"}
    rows = [
        good,
        {"prompt": "two", "chosen": "same", "rejected": "same"},
        {"prompt": "", "chosen": "yes", "rejected": "no"},
        good,
        {"prompt": "five", "chosen": "y" * 60, "rejected": "no"},
        {"prompt": "six", "chosen": " ", "rejected": "no"},
        {"prompt": "seven", "chosen": "yes", "rejected": "no", "extra": 1},
        good,
    ]
    held = [{"prompt": "zero", "chosen": "a", "rejected": "b"}, {**good, "prompt": " seven "}]
    return _write(folder / "rows.jsonl", rows), _write(folder / "held.jsonl", held)


def test_counts_are_those_of_the_file_with_file_and_line(
    defects: tuple[Path, Path], tiny_model: Path
) -> None:
    data, held = defects
    found = inspect_preferences(data, tiny_model, held_out=held, readiness=False, max_length=40)
    assert (found.read, found.kept, found.kind) == (8, 2, "paired")
    assert found.totals == {
        "dropped": 6, "truncated": 0, "duplicate": 2, "empty": 2, "identical": 1, "leaking": 1,
    }  # fmt: skip
    places = {count.name: [where for where, _ in count.examples] for count in found.counts}
    assert places == {
        "noted: columns ignored: extra": [f"{data}:1"],
        "dropped: chosen and rejected are identical": [f"{data}:2"],
        "dropped: empty prompt": [f"{data}:3"],
        "dropped: empty chosen": [f"{data}:6"],
        "dropped: duplicate of an earlier row": [f"{data}:4", f"{data}:8"],
        "dropped: longer than max_length": [f"{data}:5"],
        "leaking": [f"{data}:7"],
    }
    assert found["leaking rows"].found and f"{held}:2" in str(found)
    assert found["empty rows"].rows == (f"{data}:3", f"{data}:6")
    assert found.shape == "prompt / chosen / rejected, text" and "ignored: extra" in found.why
    assert "Inspection(2 of 8 paired rows kept" in repr(found)
    cut = inspect_preferences(
        data, tiny_model, readiness=False, max_length=40, overflow="truncate-completion"
    )
    assert (cut.totals["truncated"], cut.totals["leaking"], cut.kept) == (1, None, 3)


def test_lengths_and_saved_work_are_those_worked_out_by_hand(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One token a byte and one that ends. Flat: the last token predicts nothing and is left out."""
    data = _write(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "ab", "chosen": "cdef", "rejected": "cx"},  # 2, 5, 3; "c" is shared
            {"prompt": "abcdef", "chosen": "x", "rejected": "yz"},  # 6, 2, 3
            {"prompt": "abc", "chosen": "p" * 22, "rejected": "q"},  # 3, 23, 2
        ],
    )
    found = inspect_preferences(data, tiny_model, readiness=False)
    lengths = {name: (x.p50, x.max) for name, x in found.length_rows()}
    assert lengths == {
        "prompt": (3, 6), "chosen": (5, 23), "rejected": (3, 3), "total": (9, 26),
        "before max_length": (9, 26),
    }  # fmt: skip
    assert found.histogram.edges == tuple(range(0, 26, 2))
    assert found.histogram.counts == {
        "prompt": (0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        "chosen": (0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1),
        "rejected": (0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    assert found.work.padded == 2 * (2 + 5) + 2 * (6 + 3) + 2 * (3 + 23)
    assert found.work.apart == (2 + 4 + 2 + 2) + (6 + 1 + 6 + 2) + (3 + 22 + 3 + 1)
    assert found.work.flat == (2 + 1 + 3 + 1) + (6 + 1 + 2) + (3 + 22 + 1)
    assert found.work.saved == 1 - 42 / 84 and "50.0% saved" in str(found)
    assert found.work.saved_by_sharing == 1 - 42 / 54
    assert found["length bias"].measured["wanted_is_longer_share"] == pytest.approx(2 / 3)
    assert found["length bias"].measured["wanted_minus_unwanted_tokens"] == pytest.approx(22 / 3)


def test_readiness_is_what_transformers_computes_on_the_same_rows(quickstart_model: Path) -> None:
    data = quickstart_model.parent / "data" / "heldout.jsonl"
    effort = Effort(rows=6, batch_size=4)
    found = inspect_preferences(data, quickstart_model, max_length=256, effort=effort).readiness
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    rows = tokenise(load_preferences(data), tokenizer, max_length=256).rows
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        quickstart_model, quantization_config=quantised, dtype=torch.float32, device_map="cpu"
    ).eval()
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    values: dict[str, list[np.ndarray[Any, Any]]] = {"chosen_ids": [], "rejected_ids": []}
    for row in (rows[40 * i] for i in range(6)):
        for side, kept in values.items():
            ids, start = torch.tensor([row["prompt_ids"] + row[side]]), len(row["prompt_ids"])
            with torch.no_grad():
                logps = base(ids).logits[0].log_softmax(-1)
            kept.append(logps[range(start - 1, ids.shape[1] - 1), ids[0, start:]].numpy())
    assert found is not None and found.rows == 6 and found.end_token == "<|end|>"
    wanted, unwanted = (np.concatenate(kept).mean() for kept in values.values())
    assert found.wanted_nats_a_token == pytest.approx(wanted, rel=1e-5)
    assert found.unwanted_nats_a_token == pytest.approx(unwanted, rel=1e-5)
    ends = [math.exp(kept[-1]) for kept in values["chosen_ids"]]
    assert found.end_probability == pytest.approx(np.median(ends), rel=1e-5)


def test_a_base_that_knows_neither_text_nor_end_is_sent_to_sft_orpo_or_another_template(
    tiny_model: Path, quickstart_model: Path, tmp_path: Path
) -> None:
    readiness = ("unlikely answers", "answers without an end")
    data = _write(tmp_path / "rows.jsonl", FORMATS["plain"])
    found = inspect_preferences(data, tiny_model, max_length=128)
    assert found.ready is False and "not ready" in str(found)
    for name in readiness:
        assert found[name].found
        assert [[w in r for r in found[name].remedies] for w in ("sft", "orpo")] == [
            [True, False], [False, True],
        ]  # fmt: skip
    texts = inspect_preferences(data, quickstart_model, max_length=128)
    assert texts.ready is False and "give messages" in texts["unlikely answers"].remedies[0]
    odd = _write(tmp_path / "odd.jsonl", [_chat("zq", "xk zv qj wx", "vv")])
    chat = inspect_preferences(odd, quickstart_model, max_length=256)
    assert chat.ready is False
    assert "data.chat_template" in chat["unlikely answers"].remedies[-1]
    known = inspect_preferences(
        quickstart_model.parent / "data" / "heldout.jsonl", quickstart_model, max_length=256
    )
    assert known.ready is True and "ready, preference tuning can start" in str(known)


def test_without_readiness_a_tokenizer_is_enough(quickstart_model: Path, tmp_path: Path) -> None:
    for path in quickstart_model.iterdir():
        if path.name.startswith(("token", "chat")):
            shutil.copy(path, tmp_path)
    data = quickstart_model.parent / "data" / "heldout.jsonl"
    found = inspect_preferences(data, tmp_path, readiness=False)
    assert found.kept == 240 and found.ready is None and found.readiness is None
    with pytest.raises(ModelError):
        inspect_preferences(data, tmp_path)


def test_pairs_read_as_single_answers_show_label_and_class_balance(quickstart_model: Path) -> None:
    data = quickstart_model.parent / "data" / "heldout.jsonl"
    found = inspect_preferences(
        data, quickstart_model, kind="unpaired", readiness=False, max_length=256, rows=2
    )
    assert found.kept == 480 and [row.label for row in found.rows] == [True, False]
    assert found["length bias"].state != "not measured"
    assert f"{data}:1, unwanted" in str(found)


def test_hostile_strings_stay_text_on_the_terminal_and_in_html(
    quickstart_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "<img src=x> [red]"
    folder.mkdir()
    rows = [
        _chat(f"Say {HOSTILE}", f"Yes {HOSTILE}", "No."),
        _chat("x", HOSTILE, HOSTILE),
    ]
    rows[0][f"column <i> {HOSTILE}"] = 1
    found = inspect_preferences(
        _write(folder / "rows.jsonl", rows), quickstart_model, readiness=False, max_length=256
    )
    found.print()
    for text in (str(found), capsys.readouterr().out):
        assert "\x1b" not in text and "\u202e" not in text and "🙂" not in text and "😄" not in text
        joined = text.replace("\n", "").replace(BETWEEN, "")
        assert "<script>" in joined and "[red]x[/red]" in joined and "⟨ESC⟩[31m ⟨U+202E⟩" in joined
    for html in (found.to_html(), found._repr_html_()):
        page = _Parts(html)
        assert not {"script", "img", "i"} & set(page.tags)
        assert set(page.tags) - {"html", "head", "meta", "link", "title", "body"} == {
            "div", "style", "h1", "h2", "h3", "p", "b", "ul", "li", "table", "tr", "th", "td",
            "code", "input", "span", "sup", "sub",
        }  # fmt: skip
        assert not [name for name in page.attributes if name.startswith("on")]
        assert "\x1b" not in html and "\u202e" not in html and "49" not in "".join(page.boxes[0][2])
        assert visible(HOSTILE) in "".join(page.boxes[0][2])
        assert "http:" not in html and "https:" not in html and "url(" not in html
    assert "<html" not in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["origin"].endswith(".jsonl:1")


def test_visible_leaves_words_of_all_scripts_alone_and_names_what_is_hidden() -> None:
    for text in ("plain", "Grüße", "日本語", "שלום", "😀", "a\u00a0b"):
        assert visible(text) == text
    assert visible("a\nb", keep_lines=True) == "a↵\nb"
    assert visible("\x00\x7f\x9b\u200b\ufeff\ud800\u2028\U000e0041") == (
        "⟨U+0000⟩⟨U+007F⟩⟨U+009B⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+D800⟩⟨U+2028⟩⟨U+E0041⟩"
    )


def test_the_command_prints_json_writes_a_page_and_says_what_is_wrong(
    defects: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    data, held = defects

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lora_dpo", "inspect", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    base = [str(data), "--model", str(tiny_model), "--max-length", "40"]
    page = tmp_path / "look.html"
    settings = ["--set", "data.overflow=truncate-completion", "--rows", "1"]
    done = run(*base, "--eval", str(held), "--json", "--html", str(page), *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["totals"]["truncated"] == 1 and found["totals"]["leaking"] == 1
    assert len(found["rows"]) == 1 and found["ready"] is False
    assert found["readiness"]["rows"] == 3 and 0 <= found["readiness"]["end_probability"] < 0.1
    assert page.read_text().startswith("<!doctype html>")
    wrong = run(*base, "--no-readiness", "--set", "data.train=x.jsonl")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert "--set data.train" in wrong.stderr and "data.overflow" in wrong.stderr


def test_mistakes_are_told_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "rows.jsonl", FORMATS["plain"])
    with pytest.raises(DataError, match="rows is -1"):
        inspect_preferences(data, tiny_model, rows=-1)
    with pytest.raises(ConfigError, match=r"max_lenth.*Did you mean 'max_length'"):
        inspect_preferences(data, tiny_model, max_lenth=3)
    with pytest.raises(ConfigError, match="max_length"):
        inspect_preferences(data, tiny_model, max_length=4096)  # the tiny model sees 128


@pytest.mark.parametrize("width", [1200, 375])
def test_the_page_fits_desktop_and_phone_without_a_word_on_the_console(
    width: int, quickstart_model: Path, tmp_path: Path
) -> None:
    data = _write(tmp_path / "r.jsonl", [_chat("w" * 90, "long " * 9 + HOSTILE, "o" * 90)])
    inspect_preferences(data, quickstart_model, readiness=False, max_length=256).write_html(
        tmp_path / "look.html"
    )
    with browsing.chromium() as browser:
        colours, said = [], []
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url))
            page.goto((tmp_path / "look.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert not page.is_visible(".t sub")
            page.check(".show-ids")
            assert page.is_visible(".t sub")
            colours.append(
                page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            )
    assert [x for x in said if not x.startswith("file:") or not x.endswith("look.html")] == []
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
