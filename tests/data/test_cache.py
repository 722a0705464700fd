"""A cache entry is whole, ours and of these very inputs, or it is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_dpo.data import tokenise
from tests.data.helpers import ZQ, pairs


def test_the_cache_gives_the_same_rows_and_report(chatml: Any, tmp_path: Path) -> None:
    data = pairs(ZQ)
    first = tokenise(data, chatml, max_length=13, cache_dir=tmp_path)
    again = tokenise(data, chatml, max_length=13, cache_dir=tmp_path)
    plain = tokenise(data, chatml, max_length=13)
    assert (first.cached, again.cached) == (False, True)
    assert again.rows.to_list() == first.rows.to_list() == plain.rows.to_list()
    assert again.report == first.report and again.summary == first.summary


def test_a_change_of_rows_settings_or_tokenizer_is_another_entry(
    chatml: Any, tmp_path: Path
) -> None:
    tokenise(pairs(ZQ), chatml, max_length=14, cache_dir=tmp_path)
    assert not tokenise(pairs(ZQ), chatml, max_length=13, cache_dir=tmp_path).cached
    assert not tokenise(pairs(ZQ[:1]), chatml, max_length=14, cache_dir=tmp_path).cached
    chatml("pad me", padding="max_length", max_length=20, truncation=True)  # no change of ids
    assert tokenise(pairs(ZQ), chatml, max_length=14, cache_dir=tmp_path).cached
    chatml.eos_token = "<|endoftext|>"
    assert not tokenise(pairs(ZQ), chatml, max_length=14, cache_dir=tmp_path).cached


def test_a_damaged_cache_entry_is_computed_again(chatml: Any, tmp_path: Path) -> None:
    data = pairs(ZQ)
    first = tokenise(data, chatml, max_length=14, cache_dir=tmp_path)
    rows = first.rows.to_list()
    [file] = tmp_path.glob("*/rows/*.arrow")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    del first
    file.unlink()
    file.write_bytes(damaged)
    again = tokenise(data, chatml, max_length=14, cache_dir=tmp_path)
    assert not again.cached and again.rows.to_list() == rows
    assert tokenise(data, chatml, max_length=14, cache_dir=tmp_path).cached


def test_a_foreign_folder_in_the_cache_is_not_trusted(chatml: Any, tmp_path: Path) -> None:
    data = pairs(ZQ)
    tokenise(data, chatml, max_length=14, cache_dir=tmp_path)
    [entry] = [p for p in tmp_path.iterdir() if p.is_dir()]
    (entry / "manifest.json").write_text('{"facts": {}, "files": {}}')
    assert not tokenise(data, chatml, max_length=14, cache_dir=tmp_path).cached
