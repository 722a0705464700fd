"""Files that are either whole or not there: atomic folders, manifests, locks, fingerprints."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
    with rewritten(path) as stream:
        stream.write(content)


@contextmanager
def rewritten(path: Path) -> Iterator[IO[bytes]]:
    """Write a file beside its place, which it takes when the block ends well and all is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


_BESIDE = re.compile(r"\..+\.[a-z0-9_]{8}")  # the names of ``rewritten``


def half_written(path: Path) -> bool:
    """Whether a file is one that ``rewritten`` had not finished."""
    return _BESIDE.fullmatch(path.name) is not None and path.is_file()


def clear_half_written(folder: Path) -> None:
    """Remove what killed processes left of files; call it where no other process writes."""
    for path in folder.glob(".*"):
        if half_written(path):
            path.unlink(missing_ok=True)


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def is_storage_fault(error: BaseException) -> bool:
    """Whether an error is the disk's: full, read-only, broken. Two libraries tell it as their own."""
    if isinstance(error, OSError):
        return error.errno in _STORAGE
    if type(error).__name__ == "SafetensorError":
        return "os error" in str(error)
    return any(sign in str(error) for sign in ("PytorchStreamWriter", "inline_container"))


def not_written(path: Path, error: BaseException, kept: str) -> OutputError:
    """Return the error that says so.

    Args:
        path: what could not be written.
        error: of the disk.
        kept: a sentence's beginning: what is left.
    """
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(above).free / 2**20
    reason = " ".join(str(error).split())[:200]
    return OutputError(
        f"{path}: could not be written ({reason}; {free:.0f} MiB are free there). {kept}: make room, and "
        "start again (train with --resume)."
    )


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: what comes later is there later."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot do it for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Have every file below a folder on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


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


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside ``target``; it takes the target's name only when all is done.

    Raises ``OutputError`` before anything is written if the target exists and is not empty, unless
    ``overwrite``, and where the disk is full or cannot be written to; on any exception inside the
    block the temporary folder is removed and an existing target stays as it was. What a killed
    process left beside the target is removed.
    """
    target = target.absolute()
    _settle_killed(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(
            f"{target}: exists already and is not empty. Choose another folder, or ask for it to be "
            "replaced (--overwrite)."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".{target.name}{_UNFINISHED}{os.urandom(6).hex()}"
    work, sign = target.with_name(name), target.with_name(f"{name}.lock")
    with FileLock(sign):  # for as long as this process lives
        try:
            work.mkdir()
            yield work
            for path in work.rglob("*"):  # some libraries write files for the owner alone
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            sync_tree(work)
            if target.exists():
                os.replace(target, _moved_away(work))
            os.replace(work, target)
            sync(target.parent)
        except Exception as error:
            if is_storage_fault(error):
                raise not_written(target, error, "Nothing of it is kept") from None
            raise
        finally:
            _settle(target, work)
            sign.unlink(missing_ok=True)


_UNFINISHED = ".unfinished-"


def _moved_away(work: Path) -> Path:
    """Return where an older target waits until the new one has its name."""
    return work.with_name(f"{work.name}.old")


def _settle(target: Path, work: Path) -> None:
    """Remove a temporary folder; put back what had been moved away for it, or remove that too."""
    old = _moved_away(work)
    if old.exists() and not target.exists():
        os.replace(old, target)
    if old.is_file():
        old.unlink()
    for path in (old, work):
        shutil.rmtree(path, ignore_errors=True)


def _settle_killed(target: Path) -> None:
    """Settle what processes that live no more have left beside a target."""
    for sign in target.parent.glob(f".{glob.escape(target.name)}{_UNFINISHED}*.lock"):
        try:
            with FileLock(sign, timeout=0):
                _settle(target, sign.with_suffix(""))
                sign.unlink(missing_ok=True)
        except (Timeout, OSError):  # it lives; or nothing can be written here, which is told next
            continue


def write_manifest(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Record every file of ``folder`` with size and sha256: the last file a writer writes.

    All of them are on the disk before it, so that not even a loss of power leaves a manifest of
    files that are not there.
    """
    sync_tree(folder)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    content = json.loads(json.dumps({"facts": facts or {}, "files": files}))
    write_json(folder / MANIFEST, {**content, "sha256": fingerprint(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts of a folder's manifest after checking every file it lists, and itself.

    Raises ``OutputError`` where there is no manifest (an unfinished write) or a file is missing,
    truncated or changed.
    """
    manifest = read_json(folder / MANIFEST)
    found = manifest if isinstance(manifest, dict) else {}
    content: dict[str, Any] = {key: found.get(key) for key in ("facts", "files")}
    if found.get("sha256") != fingerprint(content) or not isinstance(content["files"], dict):
        raise OutputError(f"{folder / MANIFEST}: damaged, or of another version.")
    for name, expected in content["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise OutputError(
                f"{folder / MANIFEST}: names {name!r}, which lies outside of {folder}."
            )
        if not path.is_file():
            raise OutputError(f"{path}: missing, though the manifest of {folder} lists it.")
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            raise OutputError(f"{path}: not what was written (size or checksum differs).")
    facts: dict[str, Any] = content["facts"]
    return facts


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; a second holder gets an ``OutputError`` at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", folder):
        yield


def is_held(folder: Path) -> bool:
    """Return whether another process holds a folder at this moment."""
    sign = folder / ".lock"
    if not sign.exists():
        return False
    try:
        with FileLock(sign, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # read-only: nobody writes there
        return False


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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
