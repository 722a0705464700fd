"""Files of preferences: every format and shape, with values, bytes and names that should not be there."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from lora_dpo.data import Labelled, Pair, Preferences, Tokenised, load_preferences, tokenise
from lora_dpo.data.imitations import leaves
from lora_dpo.data.vocabulary import Vocabulary, read_vocabulary
from lora_dpo.errors import LoraDpoError
from tests.campaign.judging import READ, hold, refusal
from tests.campaign.texts import good_texts, texts, values
from tests.data.conftest import CHATML, byte_level

SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".csv.gz",
    ".ndjson",
)
KINDS = (None, "paired", "unpaired", "demonstrations")
MAX_LENGTH = 100_000
# of settings, where these and not the file are what is wrong
SETTINGS = ("kind", "columns", "min_margin", "transcripts", "max_length", "tokenizer")


@dataclass(frozen=True)
class File:
    """A file of data, and how it is read.

    Args:
        name: of the file.
        content: its bytes.
        records: what was written, where nothing was done to the bytes behind it; else None.
        kind: of rows that are asked for.
        settings: of ``load_preferences``.
    """

    name: str
    content: bytes
    records: list[dict[str, Any]] | None
    kind: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@cache
def tokenizer() -> Any:
    """Byte-level, so that every text is given back exactly; ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = byte_level(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


# ---- rows -------------------------------------------------------------------------------------

_roles = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "narrator"])
_message = st.fixed_dictionaries(
    {"role": _roles, "content": st.one_of(good_texts, texts)},
    optional={"name": texts, "tool_calls": st.lists(values, max_size=1)},
)
_user = st.builds(lambda text: {"role": "user", "content": text}, good_texts)
_said = st.builds(lambda text: {"role": "assistant", "content": text}, good_texts)
_prompt = st.lists(_user, min_size=1, max_size=1) | st.builds(
    lambda a, b, c: [a, b, c], _user, _said, _user
)
_text_pair = st.fixed_dictionaries(
    {"prompt": good_texts, "chosen": good_texts, "rejected": good_texts}
)
_chat_pair = st.fixed_dictionaries(
    {"prompt": _prompt, "chosen": st.lists(_said, min_size=1, max_size=1),
     "rejected": st.lists(_said, min_size=1, max_size=1)}
)  # fmt: skip
_wild_chat = st.fixed_dictionaries(
    {"prompt": st.lists(_message, max_size=3), "chosen": st.lists(_message, max_size=2),
     "rejected": st.lists(_message, max_size=2)}
)  # fmt: skip
_implicit = st.builds(
    lambda p, a, b: {"chosen": f"{p} {a}", "rejected": f"{p} {b}"},
    good_texts,
    good_texts,
    good_texts,
)
_transcript = st.builds(
    lambda p, a, b: {
        "chosen": f"\n\nHuman: {p}\n\nAssistant: {a}",
        "rejected": f"\n\nHuman: {p}\n\nAssistant: {b}",
    },
    good_texts, good_texts, good_texts,
)  # fmt: skip
_unpaired = st.fixed_dictionaries(
    {"prompt": good_texts, "completion": good_texts, "label": st.booleans()}
)
_alpaca = st.fixed_dictionaries(
    {"instruction": good_texts, "chosen": good_texts, "rejected": good_texts},
    optional={"input": good_texts, "system": good_texts, "history": values},
)
_sharegpt = st.fixed_dictionaries(
    {
        "conversations": st.lists(
            st.builds(lambda t: {"from": "human", "value": t}, good_texts), min_size=1, max_size=1
        ),
        "chosen": st.builds(lambda t: {"from": "gpt", "value": t}, good_texts),
        "rejected": st.builds(lambda t: {"from": "gpt", "value": t}, good_texts),
    }
)
_ranked = st.fixed_dictionaries(
    {
        "prompt": good_texts,
        "responses": st.lists(st.one_of(good_texts, values), max_size=4),
        "scores": st.lists(values, max_size=4),
    }
)
SHAPES = (
    _text_pair, _chat_pair, _implicit, _transcript, _unpaired, _alpaca, _sharegpt, _ranked, _wild_chat,
)  # fmt: skip
_extra = st.dictionaries(
    st.sampled_from(
        ["tools", "score_chosen", "score_rejected", "margin", "id", "\ud800", "x" * 500]
    )
    | texts,
    values,
    max_size=2,
)


@st.composite
def _rows(draw: Any) -> list[dict[str, Any]]:
    shape = draw(st.sampled_from(SHAPES))
    rows = [dict(row) for row in draw(st.lists(shape, min_size=1, max_size=5))]
    wild = draw(st.sampled_from(["none", "none", "value", "extra", "lost", "mixed", "wide"]))
    row = rows[draw(st.integers(0, len(rows) - 1))]
    if wild == "value":
        row[draw(st.sampled_from(sorted(row)))] = draw(values)
    elif wild == "extra":
        row |= draw(_extra)
    elif wild == "lost":
        row.pop(draw(st.sampled_from(sorted(row))))
    elif wild == "mixed":
        rows.append(dict(draw(draw(st.sampled_from(SHAPES)))))
    elif wild == "wide":
        row |= {f"column {i}": i for i in range(draw(st.sampled_from([50, 3000])))}
    return rows


# ---- files ------------------------------------------------------------------------------------


def _json(rows: Any) -> str:
    return json.dumps(rows)  # NaN and halves of characters as Python writes them


def _table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, names, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else _json(v) for k, v in row.items()})
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _arrow(rows: list[dict[str, Any]], suffix: str) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def encoded(rows: list[dict[str, Any]], suffix: str) -> bytes | None:
    """Return rows in a format; None where it cannot hold them."""
    plain = suffix.removesuffix(".gz")
    try:
        if plain in (".parquet", ".arrow"):
            content = _arrow(rows, plain)
        elif plain in (".csv", ".tsv"):
            content = _table(rows, "\t" if plain == ".tsv" else ",")
        elif plain == ".json":
            content = _json(rows).encode()
        else:
            content = "\n".join(map(_json, rows)).encode()
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError, csv.Error):
        return None
    return gzip.compress(content) if suffix.endswith(".gz") else content


def _twice(content: bytes) -> bytes:
    return content.replace(b'{"', b'{"chosen": "first", "', 1)


MANGLERS = {
    "cut": lambda c, n: c[: n % (len(c) + 1)],
    "flipped": lambda c, n: c[: n % max(len(c), 1)] + bytes([n % 256]) + c[n % max(len(c), 1) + 1 :],
    "garbage line": lambda c, n: c + b"\n" + (b"\xff\xfe", b"{", b"[]", b"3", b"\x00", b"null")[n % 6],
    "utf-16": lambda c, n: c.decode("utf-8", "replace").encode(("utf-16", "utf-16-le")[n % 2]),
    "latin-1": lambda c, n: c + "é".encode("latin-1"),
    "bom": lambda c, n: b"\xef\xbb\xbf" + c,
    "crlf": lambda c, n: c.replace(b"\n", b"\r\n"),
    "joined": lambda c, n: c.replace(b"\n", b""),
    "key twice": lambda c, n: _twice(c),
    "deep": lambda c, n: c + b'\n{"prompt": ' + b"[" * (n % 200_000) + b"]" * (n % 200_000) + b"}",
    "long number": lambda c, n: c + b'\n{"prompt": ' + b"9" * (n % 9000 + 1) + b"}",
    "quote": lambda c, n: c[: n % (len(c) + 1)] + b'"' + c[n % (len(c) + 1) :],
    "empty": lambda c, n: (b"", b"\n", b"   ", b"\xef\xbb\xbf", b"[]", b"{}")[n % 6],
    "random": lambda c, n: n.to_bytes(8, "little") * (n % 50),
}  # fmt: skip
# Rows come out of these as they went in.
HARMLESS = {"bom", "crlf"}
_TEXT = (".jsonl", ".ndjson")


@st.composite
def files(draw: Any) -> File:
    """Draw a file."""
    rows, suffix = draw(_rows()), draw(st.sampled_from(SUFFIXES))
    content = encoded(rows, suffix)
    if content is None:
        suffix = ".jsonl"
        content = encoded(rows, suffix) or b""
    exact = suffix.removesuffix(".gz") not in (".csv", ".tsv", ".parquet", ".arrow")
    records: list[dict[str, Any]] | None = rows if exact else None
    if draw(st.sampled_from([False, False, True])):
        mangler = draw(st.sampled_from(sorted(MANGLERS)))
        content = MANGLERS[mangler](content, draw(st.integers(0, 2**40)))
        records = records if mangler in HARMLESS and suffix in _TEXT else None
    settings: dict[str, Any] = {"empty": draw(st.sampled_from(["error", "drop"]))}
    settings["duplicates"] = draw(st.sampled_from(["drop", "keep", "error"]))
    if draw(st.integers(0, 9)) == 0:
        settings["columns"] = {"prompt": draw(texts)}
    return File(f"prefs{suffix}", content, records, draw(st.sampled_from(KINDS)), settings)


# ---- laws -------------------------------------------------------------------------------------


def judge(case: File, folder: Path) -> str:
    """Read and tokenise a file; hold that it is read right or refused."""
    path = folder / case.name
    path.write_bytes(case.content)
    names = (path.name, *SETTINGS)
    try:
        rows = load_preferences(path, kind=case.kind, **case.settings)
        tokens = tokenise(rows, tokenizer(), max_length=MAX_LENGTH)
    except LoraDpoError as error:
        return refusal(error, names)
    finally:
        path.unlink()
    hold(not any(folder.iterdir()), "something was left in the folder")
    check_counts(case, rows, tokens)
    if case.records is not None:
        for row in rows.rows:
            check_texts(row, case.records[row.origin.row - 1])
    check_tokens(rows, tokens)
    return READ


def check_counts(case: File, rows: Preferences, tokens: Tokenised) -> None:
    """Rows in are rows kept and rows reported dropped."""
    report = rows.report
    hold(len(rows) == report.read - report.dropped + report.added, f"counts: {report.to_dict()}")
    hold(len(tokens) == len(rows) - tokens.report.dropped, f"counts: {tokens.report.to_dict()}")
    if case.records is not None:
        hold(report.read == len(case.records), f"{report.read} of {len(case.records)} rows read")


def check_texts(row: Pair | Labelled, record: dict[str, Any]) -> None:
    """Every text of a row stands in its record, as it is there."""
    strings = list(leaves(record))
    alpaca = f"{record.get('instruction')}\n{record.get('input')}"
    joined = ("".join(strings), "\n".join(strings), alpaca)
    for text in _contents(row):
        found = any(text in string for string in (*strings, *joined))
        hold(found, f"{text!r} does not stand in the record {record!r}")
    if isinstance(row, Pair) and {"prompt", "chosen", "rejected"} == set(record):
        for name in ("prompt", "chosen", "rejected"):
            given, kept = record[name], getattr(row, name)
            if isinstance(given, str) and isinstance(kept, str):
                hold(given == kept, f"{name} was changed from {given!r} to {kept!r}")


def _contents(row: Pair | Labelled) -> Iterator[str]:
    parts = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
    for part in (row.prompt, *parts):
        if isinstance(part, str):
            yield part
        else:
            yield from (str(turn["content"]) for turn in part)


def check_tokens(rows: Preferences, tokens: Tokenised) -> None:
    """Tokens decode to the row's texts, and control tokens are those of the template alone."""
    vocabulary = read_vocabulary(tokenizer(), ())
    kept = {}
    for row in rows.rows:
        kept.setdefault((row.origin.row, isinstance(row, Labelled) and row.label), []).append(row)
    for found in tokens.rows:
        same = kept[found["row"], found.get("label", False)]
        answers = [found[n] for n in ("chosen_ids", "rejected_ids", "completion_ids") if n in found]
        texts = [vocabulary.decode([found["prompt_ids"] + ids])[0] for ids in answers]
        fits = any(_expected(row, vocabulary) == texts for row in same)
        hold(fits, f"{texts!r} are not the texts of {same!r}")
        for ids in answers:
            whole = found["prompt_ids"] + ids
            controls = sum(token in vocabulary.control_ids for token in whole)
            allowed = {_controls(row) for row in same}
            hold(controls in allowed, f"{controls} control tokens, {allowed} expected: {texts!r}")


def _expected(row: Pair | Labelled, vocabulary: Vocabulary) -> list[str]:
    parts = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion,)
    if isinstance(row.prompt, str):
        return [row.prompt + vocabulary.without_eos(str(part))[0] + "<|im_end|>" for part in parts]
    made = []
    for part in parts:
        turns = (*row.prompt, *part)
        text = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)
        made.append(text.removesuffix("\n"))
    return made


def _controls(row: Pair | Labelled) -> int:
    return 1 if isinstance(row.prompt, str) else 2 * (len(row.prompt) + 1)
