"""A file of JSON lines that only grows: what was added is on the disk before the next thing begins.

A process that is killed loses at most the line that it was writing; that torn line is cut off when
the file is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dpo.errors import OutputError
from lora_dpo.store import lock_file, sync


class Journal:
    """The lines of an open journal; ``open_journal`` makes one.

    Args:
        path: the file.
        lines: those behind its first, oldest first.
        stream: the file, open for appending.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]], stream: Any) -> None:
        self.path, self.lines, self._stream = path, lines, stream

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line; when this returns it is on the disk."""
        self._stream.write(_encoded(line))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.lines.append(dict(line))


@contextmanager
def open_journal(path: Path, head: Mapping[str, Any]) -> Iterator[Journal]:
    """Open a journal for this process alone, or begin one.

    Args:
        path: the file.
        head: its first line: what the lines below it belong to.

    Raises:
        OutputError: another process has it open, it was begun with another head, or it is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path):
        found = _repaired(path, dict(head))
        with path.open("ab") as stream:
            journal = Journal(path, found[1:], stream)
            if not found:
                journal.add(head)
                journal.lines.clear()
                sync(path.parent)
            yield journal


def _encoded(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _repaired(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of a journal; one that a kill has torn is cut off, once it is known as ours."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found = [_parsed(path, i, line) for i, line in enumerate(whole.split(b"\n")[:-1], start=1)]
    if found:
        _check_head(path, found[0], head)
    elif not _encoded(head).startswith(content):  # not even its first line, torn
        raise OutputError(f"{path}: exists already, and is not what we wrote; choose another file.")
    if whole != content:
        os.truncate(path, len(whole))
    return found


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise OutputError(
            f"{path}:{number}: not readable as JSON ({error}); the file is damaged. Remove that line, "
            "or choose another file to write to."
        ) from None
    if not isinstance(found, dict):
        raise OutputError(f"{path}:{number}: not a line that we wrote; choose another file.")
    return found


def _check_head(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(_encoded(wanted))
    differing = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise OutputError(
            f"{path}: was begun with {key} {found.get(key)!r}, and this is {wanted.get(key)!r}. Go on "
            "with the same settings, or choose another file to write to."
        )
