"""Input that nobody should give: read right or refused by name. Each defect that was found stays here.

``make campaign`` draws thousands of such cases; the first test is a sample of it.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.config import Config, data_settings, read_yaml
from lora_dpo.config.reading import override
from lora_dpo.data import load_preferences, tokenise
from lora_dpo.data.report import excerpt
from lora_dpo.errors import ConfigError, DataError, nearest
from lora_dpo.objectives import build
from tests.campaign import configs
from tests.campaign.data_files import encoded
from tests.campaign.running import run_kind
from tests.data.conftest import _chatml

GOOD = {"prompt": "Is it?", "chosen": " yes", "rejected": " no"}
SAMPLE = {"data files": 120, "configs": 120, "command lines": 12}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_of_the_campaign_is_read_right_or_refused_by_name(kind: str) -> None:
    tally = run_kind(kind, SAMPLE[kind], 20261)
    assert not tally.defects, "\n".join(f"{k}: {v}" for k, v in tally.defects.items())
    assert tally.total == SAMPLE[kind]
    assert tally.outcomes["refused"]
    assert kind == "command lines" or tally.outcomes["read"] > 0.1 * tally.total


# ---- data -------------------------------------------------------------------------------------


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def test_a_key_given_twice_in_one_object_is_refused_and_its_first_value_not_lost(
    tmp_path: Path,
) -> None:
    line = '{"prompt": "a", "chosen": " b", "chosen": " c", "rejected": " d"}\n'
    for name, place in (("x.jsonl", "x.jsonl:2: "), ("x.json", "x.json: ")):
        text = json.dumps(GOOD) + "\n" + line if name == "x.jsonl" else f"[{line}]"
        with pytest.raises(DataError, match=rf"{place}.*the key 'chosen' is given twice"):
            load_preferences(_write(tmp_path / name, text))


def test_a_column_that_stands_twice_is_refused_and_unnamed_ones_are_not(tmp_path: Path) -> None:
    text = "prompt,chosen,rejected,chosen\na, b, c, d\n"
    with pytest.raises(DataError, match="the column 'chosen' stands twice"):
        load_preferences(_write(tmp_path / "x.csv", text))
    text = "prompt,chosen,rejected,,\na, b, c,,\n"
    assert len(load_preferences(_write(tmp_path / "y.csv", text))) == 1
    table = pyarrow.table(
        [["a"], [" b"], [" c"], [" d"]], ["prompt", "chosen", "rejected", "chosen"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="the column 'chosen' stands twice"):
        load_preferences(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_number_of_thousands_of_digits_is_no_traceback(tmp_path: Path, name: str) -> None:
    text = json.dumps(GOOD)[:-1] + ', "id": ' + "9" * 5000 + "}"
    with pytest.raises(DataError, match=r"x\.json.*not valid JSON"):
        load_preferences(_write(tmp_path / name, text))


def test_a_score_larger_than_any_float_is_refused_by_its_row() -> None:
    with pytest.raises(DataError, match=r"<memory>:1: score_chosen is int .*; expected a number"):
        load_preferences([{**GOOD, "score_chosen": 10**400, "score_rejected": 1}])


def test_values_nested_without_end_are_refused_by_their_row(tmp_path: Path) -> None:
    for depth in (500, 900, 970, 990, 5000, 100_000):
        line = '{"prompt": ' + "[" * depth + "]" * depth + ', "chosen": " a", "rejected": " b"}'
        path = _write(tmp_path / "x.jsonl", json.dumps(GOOD) + "\n" + line + "\n")
        with pytest.raises(DataError, match=r"x\.jsonl:2: "):
            load_preferences(path)


@pytest.mark.parametrize(
    "cell", ["{[1]: 2}", "[{'a': {[1]: 2}}]", "['\\d', '\\q']", "{{1}: 2}", "[" * 5000]
)
def test_a_cell_that_only_looks_like_a_list_stays_text_without_a_warning(
    tmp_path: Path, cell: str
) -> None:
    quoted = cell.replace('"', '""')
    path = _write(tmp_path / "x.csv", f'prompt,chosen,rejected\nq,"{quoted}", no\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if cell.startswith("['"):  # a list indeed, of two texts
            with pytest.raises(DataError, match=r"x\.csv"):
                load_preferences(path)
        else:
            assert load_preferences(path).rows[0].chosen == cell


def test_a_key_that_is_no_text_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="<memory>:1: a dict with a key that is no text"):
        load_preferences([{**GOOD, 3: "x"}])
    cell = "[{'role': 'user', 'content': 'x', 'more': {1: 2}}]"
    text = f'prompt,chosen,rejected\n"{cell}"," a"," b"\n'
    with pytest.raises(DataError, match=r"x\.csv:1: prompt holds the key 1; expected text"):
        load_preferences(_write(tmp_path / "x.csv", text))


@pytest.mark.parametrize("where", ["name", "tools"])
def test_half_of_a_character_is_found_wherever_a_template_may_print_it(where: str) -> None:
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": "x"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    if where == "tools":
        row["tools"] = [{"name": "\ud800"}]
    else:
        row["prompt"][0]["name"] = "\ud800"
    with pytest.raises(DataError, match=r"<memory>:1: .*half of a character"):
        load_preferences([row])


def test_names_that_cannot_be_written_are_shown_and_thousands_are_not_all_listed() -> None:
    found = load_preferences([{**GOOD, "\ud800\x1b[31m": 1}])
    told = "\n".join((*found.report.lines(), found.why))
    assert told.encode("utf-8") and "⟨U+D800⟩⟨ESC⟩[31m" in told
    wide = {f"column {i}": "x" for i in range(5000)}
    assert len("\n".join(load_preferences([{**GOOD, **wide}]).report.lines())) < 2000
    with pytest.raises(DataError, match="and 4980 more") as error:
        load_preferences([wide])
    assert len(str(error.value)) < 4000


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("a\0b.jsonl", "NUL"),
        ("~nobody-of-that-name/x.jsonl", "is no path"),
        ("x" * 5000 + ".jsonl", "is no path"),
    ],
)
def test_what_is_no_path_is_refused_and_an_empty_one_reads_no_folder(
    given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "stray.jsonl", json.dumps(GOOD))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=told):
        load_preferences(given)


def test_a_file_whose_name_is_no_text_is_refused_before_rows_carry_it(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(name, "wb") as stream:
        stream.write(json.dumps(GOOD).encode())
    with pytest.raises(DataError, match="the name of the file is not UTF-8"):
        load_preferences(tmp_path)


def test_a_date_that_python_cannot_hold_is_told_as_the_files(tmp_path: Path) -> None:
    times = pyarrow.array([10**17], pyarrow.timestamp("ms"))
    names = ["prompt", "chosen", "rejected", "when"]
    table = pyarrow.table([["a"], [" b"], [" c"], times], names)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: not readable as parquet"):
        load_preferences(tmp_path / "x.parquet")


def test_bytes_of_a_table_that_were_flipped_end_no_process(tmp_path: Path) -> None:
    """An offset that points anywhere was followed, and ended Python without a word."""
    rows = [{"prompt": f"q{i}", "chosen": " yes", "rejected": " no"} for i in range(40)]
    whole, drawn, read = encoded(rows, ".arrow") or b"", random.Random(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(3):
            content[drawn.randrange(len(content))] = drawn.randrange(256)
        try:
            read += len(load_preferences(_write(tmp_path / "x.arrow", bytes(content)))) > 0
        except DataError as error:
            assert "x.arrow" in str(error)
    assert read < 300


def test_an_excerpt_of_a_long_text_is_short_and_quick() -> None:
    assert excerpt("a" * 10**7) == "a" * 77 + "..."
    assert excerpt("  a \n b ") == "a b"
    assert nearest("x" * 10**6, ["chosen", "y" * 10**6]) == ""


def test_arguments_of_a_template_that_mix_kinds_of_keys_are_told_before_the_cache(
    tmp_path: Path,
) -> None:
    values = configs.least()
    values["data"]["template_arguments"] = {"a": {1: 2, "b": 3}}
    with pytest.raises(ConfigError, match=r"data\.template_arguments\.a: the key 1 is no text"):
        Config.parse(values)
    rows = load_preferences([{
        "prompt": [{"role": "user", "content": "x"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }])  # fmt: skip
    assert len(tokenise(rows, _chatml(), max_length=99, cache_dir=tmp_path)) == 1


# ---- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [configs.BOMB, configs.MERGES])
def test_aliases_that_multiply_are_refused_at_once(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 20000 values, aliases counted"):
        read_yaml(_write(tmp_path / "x.yaml", text))


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_an_alias_within_itself_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="within what it names"):
        read_yaml(_write(tmp_path / "x.yaml", text))
    with pytest.raises(ConfigError, match="within what it names"):
        override({}, [f"data.columns={text.removeprefix('a: ')}"])


def test_aliases_that_do_not_multiply_and_merged_keys_are_read(tmp_path: Path) -> None:
    text = "model: &m {base: x}\nother: {<<: *m, rank: 3}\nagain: *m\n"
    found = read_yaml(_write(tmp_path / "x.yaml", text))
    assert found["other"] == {"base": "x", "rank": 3} and found["again"] == {"base": "x"}


def test_a_list_within_itself_from_python_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    values = configs.least()
    values["data"]["template_arguments"] = {"x": loop}
    with pytest.raises(ConfigError, match="within each other more than"):
        Config.parse(values)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("output.dir", "a\0b", "output.dir: got 'a\\\\x00b'; it holds a NUL character"),
        ("model.base", "\ud800", "model.base: .*half of a character"),
        ("lora.rank", 2**70, "lora.rank: .*more than 64 bits"),
        ("lora.alpha", float("inf"), "lora.alpha: got inf; input should be a finite number"),
        ("train.adam_beta1", float("nan"), "train.adam_beta1: got nan; input should be a finite"),
        ("train.dataloader_num_workers", 10**6, "expected a number below 1024"),
        ("train.per_device_train_batch_size", 10**12, "expected a number below 1000000"),
        ("output.dir", "", "output.dir: got ''; expected a name"),
        ("data.train", "x" * 300, "data.train.0.path: .*longer than file systems take"),
        (
            "objective",
            {"name": "dpo", "self": 1},
            "objective.self: 'dpo' has no such hyperparameter",
        ),
        ("objective", {"name": "mixture", 3: 4}, "objective: the key 3 is no text"),
        ("model.str", 1, "model.str: unknown key"),
    ],
)
def test_a_value_that_no_setting_can_have_is_refused_by_its_key(
    key: str, value: Any, told: str
) -> None:
    values = configs.least()
    configs._put(values, key, value)
    with pytest.raises(ConfigError, match=told):
        Config.parse(values)


def test_a_date_without_quotes_is_told_as_one(tmp_path: Path) -> None:
    text = "model: {base: x}\ndata: {train: y, template_arguments: {day: 2020-01-01}}\noutput: {dir: z}\n"
    with pytest.raises(
        ConfigError, match=r"data\.template_arguments\.day: got a date .* in quotes"
    ):
        Config.load(_write(tmp_path / "x.yaml", text))


def test_a_long_value_is_told_in_short() -> None:
    values = configs.least()
    values["lora"] = {"rank": "x" * 10**6, "targets": [["y" * 10**6]]}
    with pytest.raises(ConfigError) as error:
        Config.parse(values)
    assert len(str(error.value)) < 2000
    with pytest.raises(ConfigError) as error:
        build({"name": "mixture", "terms": ["x" * 10**6]})
    assert len(str(error.value)) < 2000


def test_a_config_whose_name_is_no_path_is_one_message() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml("a\0b")


@pytest.mark.parametrize(
    "text", ["data=3", "data=null", "data={1: 2}", "data.rows=1", "data.ids=true", "data.train=x"]
)
def test_what_is_no_setting_of_data_is_refused_where_only_these_count(text: str) -> None:
    with pytest.raises(ConfigError, match="--set data"):
        data_settings([text])


# ---- command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("generate", "run", "--prompt", "x", "--temperature", "nan"),
            "greater than or equal to 0",
        ),
        (
            ("generate", "run", "--prompt", "x", "--seed", "9" * 30),
            "less than or equal to 4294967295",
        ),
        (("sample", "run", "--prompts", "x", "--to", "y", "--temperature", "inf"), "not a finite"),
        (
            ("sample", "run", "--prompts", "x", "--to", "y", "--k", "9" * 12),
            "less than or equal to 10000",
        ),
        (("smoke", "run", "--tolerance", "inf"), "not a finite"),
    ],
)
def test_a_number_that_no_run_could_take_is_wrong_usage(words: tuple[str, ...], told: str) -> None:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == 2
    assert told in " ".join(found.stderr.replace("│", " ").split())
