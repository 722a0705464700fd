"""Tables of the page: cells that keep the exact value beside the shown one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dpo.reporting.reading import is_number

UNITS = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}


@dataclass(frozen=True)
class Cell:
    """What one field of a table shows.

    Args:
        pieces: texts in their order, each with the exact number that it stands for, if it does.
        numeric: whether it is set to the right.
    """

    pieces: tuple[tuple[str, str | None], ...]
    numeric: bool = False

    def __str__(self) -> str:
        return "".join(text for text, _ in self.pieces)


NOTHING = Cell((("-", None),))


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row heads it, or with ``grouped`` all rows that begin with it."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    remark: str = ""
    grouped: bool = False

    @property
    def numeric(self) -> set[int]:
        """The columns that hold numbers or nothing, but for the first."""
        columns = enumerate(zip(*self.rows, strict=True))
        return {i for i, column in columns if i and all(c.numeric or c == NOTHING for c in column)}


def table(
    caption: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    remark: str = "",
    *,
    grouped: bool = False,
) -> Table:
    """Make a table of texts, numbers, cells and None."""
    cells = tuple(tuple(map(cell, row)) for row in rows)
    return Table(caption, tuple(columns), cells, remark, grouped)


def cell(value: Any) -> Cell:
    """Return a cell for a text, a number, None, or what else JSON has."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return NOTHING
    if is_number(value):
        return Cell(((shown(value), repr(value)),), numeric=True)
    if isinstance(value, str):
        return Cell(((value, None),))
    return Cell(((json.dumps(value, ensure_ascii=False), None),))


def interval(mean: Any, low: Any, high: Any) -> Cell:
    """Return a mean with its interval; the mean alone where there is no interval."""
    if not (is_number(low) and is_number(high)):
        return cell(mean)
    numbers = [(shown(value), repr(value)) for value in (mean, low, high)]
    first, second, third = numbers
    return Cell((first, (" [", None), second, (", ", None), third, ("]", None)), numeric=True)


def size(found: Any) -> Cell:
    """Return a number of bytes in GiB, or in less where it is small."""
    if not is_number(found):
        return NOTHING
    unit = next((u for u in UNITS if found >= UNITS[u] / 10), "KiB")
    return Cell(((f"{found / UNITS[unit]:.3g} {unit}", repr(found)),), numeric=True)


def shown(value: float) -> str:
    """Return a number with four digits that count; whole ones below a million as they are."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        return f"{int(value):,}".replace(",", " ") if abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:.4g}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def setting(value: Any) -> str:
    """Return a setting as YAML would have it on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def settings_tables(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Table, Table]:
    """Return the settings in which runs differ, and all of them."""
    columns = {name: flat(config) for name, config in configs.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = {
        key: [setting(column[key]) if key in column else None for column in columns.values()]
        for key in keys
    }
    # where a run was written to says nothing about it
    differ = [k for k, row in rows.items() if len(set(row)) > 1 and k != "output.dir"]
    heads = ("setting", *columns)
    return (
        table("Settings that differ", heads, ([key, *rows[key]] for key in differ)),
        table("All settings", heads, ([key, *row] for key, row in rows.items())),
    )


def same_groups(parts: Mapping[str, Any]) -> list[tuple[list[str], Any]]:
    """Return what runs have, once for those that have the same: names, and the part."""
    groups: list[tuple[list[str], Any]] = []
    for name, part in parts.items():
        for names, other in groups:
            if other == part:
                names.append(name)
                break
        else:
            groups.append(([name], part))
    return groups


def thinned(rows: Sequence[Any], most: int) -> tuple[list[Any], str]:
    """Return at most so many rows, evenly spread, the last among them, and what was left out."""
    if len(rows) <= most:
        return list(rows), ""
    every = -(-len(rows) // most)
    kept = [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % every == 0]
    return kept, f"every {every}th of {len(rows)} steps; all are in metrics.jsonl"
