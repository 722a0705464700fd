"""Checksums of what is handed on: a finished adapter, a reference, an export.

A file that was cut short does not load. One with a flipped bit loads, and is another model: our own readers
hold what they load against the manifest that its writer left. A folder without one, as other programs write
them, is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lora_dpo.errors import OutputError
from lora_dpo.store import MANIFEST, file_sha256, fingerprint, sync_tree, write_json

# People write on these before they pass a folder on; no program reads numbers from them.
_TEXTS = {"README.md", "SERVE.md", "Modelfile"}
_KEYS = {"facts", "files", "sha256"}


def seal(folder: Path, kind: str) -> None:
    """Record size and sha256 of every file that a program reads: the last file a writer writes.

    Args:
        folder: with all its files.
        kind: what it holds, in a word, for who opens the manifest.
    """
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {MANIFEST, *_TEXTS}
    }
    content = {"facts": {"kind": kind}, "files": files}
    write_json(folder / MANIFEST, {**content, "sha256": fingerprint(content)})


def check_seal(folder: Path, only: Collection[str] = ()) -> bool:
    """Hold the files of a folder against its manifest; return whether it has one of ours.

    Args:
        folder: of an adapter or a model. Files that the manifest does not list are not looked at.
        only: names of the files that are about to be read; all that are listed if left out.

    Raises:
        OutputError: names the file that is missing or another, or the manifest that is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise OutputError(f"{path}: not readable as JSON; {_AGAIN}") from None
    if not isinstance(found, dict) or not found.keys() & _KEYS:
        return False  # another program's
    files = found.get("files")
    content = {"facts": found.get("facts"), "files": files}
    if found.get("sha256") != fingerprint(content) or not isinstance(files, dict):
        raise OutputError(f"{path}: damaged, or of another version; {_AGAIN}")
    for name, expected in files.items():
        if not only or name in only:
            _check(folder, name, expected)
    return True


_AGAIN = f"export or train again, or bring the file back. Where you changed it yourself, delete {MANIFEST} there."


def _check(folder: Path, name: str, expected: Any) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise OutputError(f"{folder / MANIFEST}: names {name!r}, which lies outside of {folder}.")
    path = folder / name
    if not path.is_file():
        raise OutputError(f"{path}: missing, though {MANIFEST} beside it lists it; {_AGAIN}")
    if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
        raise OutputError(f"{path}: not what was written (size or checksum differs); {_AGAIN}")
