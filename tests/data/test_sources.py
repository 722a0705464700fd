"""Every way to name data gives the same rows, and every mistake one message that says where."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_dpo.data import load_preferences
from lora_dpo.errors import DataError

ROWS = [
    {"prompt": "Ugly?", "chosen": " Beautiful.", "rejected": " Fine."},
    {"prompt": "Nested?", "chosen": " Flat.", "rejected": " Round."},
]
Write = Callable[..., Path]


def texts(source: Any, **options: Any) -> list[tuple[Any, ...]]:
    return [(r.prompt, r.chosen, r.rejected) for r in load_preferences(source, **options).rows]


EXPECTED = [("Ugly?", " Beautiful.", " Fine."), ("Nested?", " Flat.", " Round.")]


def test_jsonl_with_a_byte_order_mark_blank_lines_and_crlf_is_read(tmp_path: Path) -> None:
    lines = "\r\n\r\n".join(json.dumps(row) for row in ROWS)
    path = tmp_path / "prefs.ndjson"
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert texts(path) == EXPECTED
    assert load_preferences(path).rows[1].origin.row == 3  # line 2 is blank


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(write: Write) -> None:
    row = '{"prompt": "a\u2028b?", "chosen": "x", "rejected": "y"}'
    assert texts(write(row)) == [("a\u2028b?", "x", "y")]


@pytest.mark.parametrize("wrapped", [ROWS, {"data": ROWS}], ids=["list", "data"])
def test_json_holds_a_list_or_an_object_with_data(write: Write, wrapped: Any) -> None:
    assert texts(write(json.dumps(wrapped, indent=1), "prefs.json")) == EXPECTED


def test_json_lines_under_the_name_json_are_read_too(write: Write) -> None:
    assert texts(write(ROWS, "prefs.json")) == EXPECTED
    assert texts(write(ROWS[:1], "one.json")) == EXPECTED[:1]


@pytest.mark.parametrize(("name", "delimiter"), [("p.csv", ","), ("p.tsv", "\t")])
def test_csv_and_tsv_are_read_with_long_cells(tmp_path: Path, name: str, delimiter: str) -> None:
    long = "word, " * 40_000  # beyond the csv module's own limit
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows([*ROWS, {"prompt": "Long?\nYes", "chosen": long, "rejected": "no"}])
    assert texts(tmp_path / name) == [*EXPECTED, ("Long?\nYes", long, "no")]


@pytest.mark.parametrize("print_cell", [json.dumps, repr], ids=["json", "python"])
def test_csv_cells_may_hold_messages(tmp_path: Path, print_cell: Callable[[Any], str]) -> None:
    def cell(role: str, text: str) -> str:
        return print_cell([{"role": role, "content": text}])

    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerow([cell("user", "Hi"), cell("assistant", "Yes"), cell("assistant", "No")])
    assert load_preferences(tmp_path / "p.csv").rows[0].chosen == (
        {"role": "assistant", "content": "Yes"},
    )


def test_parquet_and_both_arrow_formats_are_read(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert texts(tmp_path / name) == EXPECTED


def test_compressed_text_files_are_read(tmp_path: Path) -> None:
    data = "\n".join(json.dumps(row) for row in ROWS).encode()
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(data))
    with pyarrow.output_stream(str(tmp_path / "p.jsonl.zst"), compression="zstd") as stream:
        stream.write(data)
    assert texts(tmp_path / "p.jsonl.gz") == texts(tmp_path / "p.jsonl.zst") == EXPECTED


def test_memory_hub_like_and_saved_datasets_are_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    assert texts(ROWS) == texts(data) == texts(tmp_path / "saved") == EXPECTED
    assert str(load_preferences(ROWS).rows[1].origin) == "<memory>:2"


def test_a_folder_gives_all_its_files_in_order_of_name(write: Write, tmp_path: Path) -> None:
    write(ROWS[1:], "d/b.jsonl")
    write(json.dumps(ROWS[:1]), "d/a.json")
    write("not data", "d/readme.md")
    assert texts(tmp_path / "d") == EXPECTED


def test_a_split_chooses_files_of_a_folder_and_parts_of_a_dataset(
    write: Write, tmp_path: Path
) -> None:
    write(ROWS[:1], "d/train-00000-of-00001.jsonl")
    write(ROWS[1:], "d/test.jsonl")
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:1]), test=datasets.Dataset.from_list(ROWS[1:])
    )
    assert texts(tmp_path / "d", split="test") == texts(both, split="test") == EXPECTED[1:]
    with pytest.raises(DataError, match=r"several splits and none chosen.*train, test"):
        load_preferences(both)
    with pytest.raises(DataError, match="no split 'dev'"):
        load_preferences(both, split="dev")
    with pytest.raises(DataError, match=r"split 'dev'.*test\.jsonl"):
        load_preferences(tmp_path / "d", split="dev")
    with pytest.raises(DataError, match="none chosen"):
        load_preferences(datasets.DatasetDict())
    assert texts(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))) == EXPECTED


def test_a_name_that_no_file_can_have_is_one_error() -> None:
    with pytest.raises(
        DataError, match=r"is no path \(.*too long.*expected a file, a folder or a hub"
    ):
        load_preferences("x" * 5000)


def test_a_split_of_a_single_file_is_refused_and_not_ignored(write: Write) -> None:
    with pytest.raises(DataError, match="single file and has no splits"):
        load_preferences(write(ROWS), split="train")


def test_an_unreachable_hub_id_is_said_to_be_neither_file_nor_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"nobody/nothing: neither a file or folder here nor"):
        load_preferences("nobody/nothing")


def test_a_hub_id_is_loaded_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str | None) -> Any:
        assert (name, split) == ("org/prefs", "train")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = load_preferences({"path": "org/prefs", "split": "train"})
    assert str(loaded.rows[0].origin) == "org/prefs[train]:1"


def test_weights_say_how_often_a_row_is_seen_per_epoch(write: Write) -> None:
    many = [{"prompt": f"Q{i}?", "chosen": "yes", "rejected": "no"} for i in range(10)]
    sources = [{"path": write(many, "a.jsonl"), "weight": 2.5}, {"path": write(ROWS, "b.jsonl")}]
    loaded = load_preferences(sources, seed=1)
    seen = [sum(r.prompt == f"Q{i}?" for r in loaded.rows) for i in range(10)]
    assert sorted(seen) == [2] * 5 + [3] * 5
    assert len(loaded) == 27 == loaded.report.read - loaded.report.dropped + loaded.report.added
    assert loaded.rows == load_preferences(sources, seed=1).rows
    half = load_preferences([{"path": write(many, "a.jsonl"), "weight": 0.5}])
    assert len({r.prompt for r in half.rows}) == len(half) == 5


def test_duplicates_are_dropped_before_weights_apply(write: Write) -> None:
    path = write([ROWS[0], ROWS[0], ROWS[1]])
    loaded = load_preferences([{"path": path, "weight": 2}])
    assert len(loaded) == 4
    assert (loaded.report.read, loaded.report.dropped, loaded.report.added) == (3, 1, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl: the file holds no rows"),
        ("a.jsonl", '{"prompt": 1\n', r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl:1: a JSON list; expected one object per line"),
        ("a.json", "{", r"a\.json: not valid JSON"),
        (
            "a.json",
            '{"rows":\n []}',
            r"a\.json: a JSON object with the keys 'rows'; expected a list",
        ),
        ("a.json", "[1]", r"a\.json:1: a JSON number; expected an object"),
        ("a.csv", "prompt,chosen,rejected\na,b,c,d", r"a\.csv:1: has 1 cells more"),
        ("a.csv", 'prompt,chosen\n"a,b', r"a\.csv:1: not valid CSV"),
        ("a.csv", "prompt,chosen,rejected\n", r"a\.csv: the file holds no rows"),
        ("a.parquet", "nonsense", r"a\.parquet: not readable as parquet"),
        ("a.arrow", "nonsense", r"a\.arrow: not readable as arrow"),
        ("a.jsonl.gz", "nonsense", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", "nonsense", r"a\.jsonl\.zst: cannot be read"),
        ("a.txt", "text", r"a\.txt: the kind of file is not known"),
    ],
)
def test_a_broken_file_is_one_error_that_names_it(
    write: Write, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences(write(content, name))


def test_all_bad_lines_are_told_at_once_and_counted_beyond_ten(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        load_preferences(write("\n".join(["{"] * 23)))
    lines = str(caught.value).splitlines()
    assert lines[0] == "23 rows cannot be used:"
    assert [f"prefs.jsonl:{i}:" in lines[i] for i in range(1, 11)] == [True] * 10
    assert lines[11] == "... and 13 more."


@pytest.mark.parametrize("text", ["[1, 2, 3]", "[]", '{"a": 1}', "[null]"])
def test_a_text_that_reads_like_numbers_stays_a_text(write: Write, text: str) -> None:
    """Only what is a message, or a list of such, is taken for more."""
    row = {"prompt": "Three numbers?", "chosen": text, "rejected": "1"}
    assert texts(write([row])) == [("Three numbers?", text, "1")]
    quoted = text.replace('"', '""')
    table = write(f'prompt,chosen,rejected\nThree numbers?,"{quoted}",1\n', "p.csv")
    assert texts(table) == [("Three numbers?", text, "1")]


def test_text_that_is_not_utf8_is_an_error_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "caf\xe9"}')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not UTF-8"):
        load_preferences(path)
    (tmp_path / "p.csv").write_bytes(b"prompt,chosen,rejected\ncaf\xe9,a,b")
    with pytest.raises(DataError, match=r"p\.csv: not UTF-8"):
        load_preferences(tmp_path / "p.csv")


def test_a_missing_file_names_the_nearest_one(write: Write) -> None:
    path = write(ROWS, "preferences.jsonl")
    with pytest.raises(DataError, match=r"preference\.jsonl: no such file.*'preferences\.jsonl'"):
        load_preferences(path.with_name("preference.jsonl"))
    with pytest.raises(DataError, match="no folder"):
        load_preferences(path.parent / "nowhere" / "deep" / "x.jsonl")


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder without data"):
        load_preferences(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of sources is empty"),
        (42, "int is not a source"),
        ([{"path": "a.jsonl", "wieght": 2}], "unknown key 'wieght'"),
        ([{"path": "a.jsonl", "weight": 0}], "a number above 0"),
        ([{"path": "a.jsonl", "weight": "2"}], "a number above 0"),
        (iter(()), "is not a source"),
    ],
)
def test_what_is_no_source_is_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences(source)


def test_a_source_may_be_an_object_with_a_path(write: Write) -> None:
    class Entry:
        path, weight, split = str(write(ROWS)), 1.0, None

    assert texts([Entry()]) == EXPECTED
