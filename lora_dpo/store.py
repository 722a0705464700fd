"""Files that are either whole or not there: atomic folders, manifests, locks, fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_dpo.errors import OutputError

MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """Return the sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old one or the new one, never a half."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def refuse_existing(path: Path) -> None:
    """Raise ``OutputError`` where a file that is to be new is there already."""
    if path.exists():
        raise OutputError(f"{path}: exists already and would be replaced; choose another file.")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is an ``OutputError`` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"{path}: no such file; the folder is not one that we wrote.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OutputError(f"{path}: not readable as JSON ({error}); the file is damaged.") from None


def lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave of a file of JSON lines those up to a step, and return them; none without the file.

    What a checkpoint had not seen never happened, nor did a line that a killed process left torn.
    """
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append((line, entry))
    write_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [entry for _, entry in kept]


def json_line(entry: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON in one line, whatever its texts hold.

    Args:
        entry: plain values.
        default: what makes others plain.
    """
    ends = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
    text = json.dumps(entry, ensure_ascii=False, default=default).translate(ends)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # halves of characters


def add_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append to a file of JSON lines, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():  # a folder from elsewhere may hold one to any file of this machine
        raise OutputError(f"{path}: is a link, to which nothing is appended; put a file there.")
    with path.open("a", encoding="utf-8") as stream:
        for entry in entries:
            stream.write(json_line(entry) + "\n")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside ``target``; it takes the target's name only when all is done.

    Raises ``OutputError`` before anything is written if the target exists and is not empty, unless
    ``overwrite``; on any exception inside the block the temporary folder is removed and an existing
    target stays as it was.
    """
    target = target.absolute()
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(
            f"{target}: exists already and is not empty. Choose another folder, or ask for it to be "
            "replaced (--overwrite)."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.unfinished-"))
    os.chmod(work, 0o777 & ~_umask())
    try:
        yield work
        for path in work.rglob("*"):  # some libraries write files for the owner alone
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        _replace_folder(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_manifest(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Record every file of ``folder`` with size and sha256: the last file a writer writes."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"facts": facts or {}, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts of a folder's manifest after checking every file it lists.

    Raises ``OutputError`` where there is no manifest (an unfinished write) or a file is missing,
    truncated or changed.
    """
    manifest = read_json(folder / MANIFEST)
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise OutputError(
                f"{folder / MANIFEST}: names {name!r}, which lies outside of {folder}."
            )
        if not path.is_file():
            raise OutputError(f"{path}: missing, though the manifest of {folder} lists it.")
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            raise OutputError(f"{path}: not what was written (size or checksum differs).")
    facts: dict[str, Any] = manifest["facts"]
    return facts


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; a second holder gets an ``OutputError`` at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", folder):
        yield


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold one file for this process; a second holder gets an ``OutputError`` at once."""
    with _held(path.with_name(f".{path.name}.lock"), path):
        yield


@contextmanager
def _held(sign: Path, what: Path) -> Iterator[None]:
    try:
        with FileLock(sign, timeout=0):
            yield
    except Timeout:
        kind = "folder" if what.is_dir() else "file"
        raise OutputError(
            f"{what}: another process is writing here. Wait for it, or choose another {kind}."
        ) from None


def _replace_folder(work: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
        os.replace(target, old / "folder")
        os.replace(work, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, target)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
