"""Files of JSON lines that a run adds to, each line with its step: read, cut back to a step, added to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_dpo.errors import OutputError
from lora_dpo.store import rewritten

logger = logging.getLogger("lora_dpo")


def whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of a file of steps, as they are and as mappings; none without the file.

    A process that is killed leaves its last line torn: such lines are passed over.
    """
    yield from ((line, entry) for line, entry in _lines(path) if entry is not None)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    if not path.is_file():
        return
    with path.open("rb") as source:
        for line in source:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            whole = isinstance(entry, dict) and isinstance(entry.get("step"), int)
            yield line, entry if whole else None


def lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave of a file of JSON lines those up to a step, and return them; none without the file.

    What a checkpoint had not seen never happened, nor did a line that a killed process left torn.
    """
    kept: list[dict[str, Any]] = []
    keep_lines_until(path, step, kept.append)
    return kept


def keep_lines_until(
    path: Path, step: int, heard: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """Do the same with one line in memory at a time.

    Args:
        path: of the file.
        step: the last one.
        heard: takes each line that is kept.
    """
    if not path.is_file():
        return
    damaged = 0
    with rewritten(path) as target:
        for line, entry in _lines(path):
            if entry is None:
                damaged += line.endswith(b"\n")  # a torn one has no end
            elif entry["step"] <= step:
                target.write(line.rstrip(b"\n") + b"\n")
                if heard is not None:
                    heard(entry)
    if damaged:
        logger.warning("%s: %d lines that cannot be read are left out of it", path, damaged)


def json_line(entry: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON in one line, whatever its texts hold.

    Args:
        entry: plain values.
        default: what makes others plain.
    """
    ends = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
    text = json.dumps(entry, ensure_ascii=False, default=default).translate(ends)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # halves of characters


def refuse_link(path: Path) -> None:
    """Raise ``OutputError`` where a file that is written on is a link.

    A folder from elsewhere may hold one to any file of this machine.
    """
    if path.is_symlink():
        raise OutputError(f"{path}: is a link, to which nothing is appended; put a file there.")


def add_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append to a file of JSON lines, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_link(path)
    with path.open("a", encoding="utf-8") as stream:
        for entry in entries:
            stream.write(json_line(entry) + "\n")
