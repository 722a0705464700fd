"""Rows that several files of tests use."""

from __future__ import annotations

from typing import Any

from lora_dpo.data import load_preferences

# One byte is one token for these letters, which the corpus never joins: lengths by hand.
ZQ = [("ZQZQZQ", "QQQQ", "JJJJJJJ"), ("Z", "Q", "J")]  # 6 + 4 + EOS, 6 + 7 + EOS = 14; 1 + 2 = 3


def pairs(rows: list[tuple[str, str, str]]) -> Any:
    names = ("prompt", "chosen", "rejected")
    return load_preferences([dict(zip(names, row, strict=True)) for row in rows])
