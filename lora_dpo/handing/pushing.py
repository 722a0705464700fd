"""An export on the hub: one commit, then every file's checksum there held against the one here.

The token is that of the environment (``HF_TOKEN``) or of the login, read by the hub's own library; it
is taken out of everything that is said here.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.guards import is_export
from lora_dpo.sealing import check_seal
from lora_dpo.store import file_sha256

_HIDDEN = (".*", "**/.*")


@dataclass(frozen=True)
class Pushed:
    """A folder that is on the hub.

    Args:
        repo: its id there.
        url: its page.
        commit: the revision that holds it.
        files: how many were sent and compared.
    """

    repo: str
    url: str
    commit: str
    files: int

    def __str__(self) -> str:
        return f"{self.url}: {self.files} files, each as it is here (commit {self.commit[:10]})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no repository of a user or an organisation.

    Raises:
        ConfigError: not of the form ``owner/name``.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"push: {repo_id!r} is no repository id ({error}).") from None
    if repo_id.count("/") != 1:
        raise ConfigError(f"push: {repo_id!r}: expected owner/name, as my-name/my-model.")


def push(
    folder: str | Path, repo_id: str, *, private: bool = False, overwrite: bool = False
) -> Pushed:
    """Put an exported folder on the hub, and check that it is there as it is here.

    Args:
        folder: what ``export`` wrote.
        repo_id: ``owner/name``; the repository is made if it is not there.
        private: whether a new repository is private.
        overwrite: send to a repository that holds a model already.

    Raises:
        OutputError: no export there; a repository that holds something, is out of reach or may not be
            written to; or a file that arrived otherwise than it was sent. The folder is as it was.
    """
    path = Path(folder)
    check_repo_id(repo_id)
    if not is_export(path):
        raise OutputError(f"{path}: holds no export of ours; give the folder that 'export' wrote.")
    _refuse_links(path)
    check_seal(path)
    api, sending = HfApi(), False
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        _refuse_full(api, repo_id, overwrite)
        sending = True
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            commit_message="Add an export of lora_dpo",
            ignore_patterns=list(_HIDDEN),
        )
        return Pushed(repo_id, str(address), str(info.oid), _compare(api, path, repo_id, info.oid))
    except Exception as error:  # of whatever library carries the bytes
        # large uploads are several commits: a part of them may be there
        options = "".join([" --private" * private, " --overwrite" * (overwrite or sending)])
        again = f"lora-dpo push {shlex.quote(str(path))} {repo_id}{options}"
        raise OutputError(
            f"push {repo_id}: {_said(error)}. {path} is whole and as it was; once that is mended: {again}"
        ) from None


def _refuse_links(folder: Path) -> None:
    """A link to elsewhere would send a file of this machine that nobody has named."""
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and inside not in path.resolve().parents:
            raise OutputError(
                f"{path}: is a link to a file outside of {folder}, which would be sent; remove it, or "
                "put a copy of the file there."
            )


def _refuse_full(api: HfApi, repo_id: str, overwrite: bool) -> None:
    held = [name for name in api.list_repo_files(repo_id) if name != ".gitattributes"]
    if held and not overwrite:
        raise OSError(
            f"the repository holds {len(held)} files already ({', '.join(held[:3])}); choose another, "
            "or ask for them to be replaced (--overwrite)"
        )


def _compare(api: HfApi, folder: Path, repo_id: str, commit: str) -> int:
    mine = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    theirs = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for name, path in mine.items():
        entry = theirs.get(name)
        if entry is None or not _same(path, entry):
            raise OSError(
                f"{name} arrived {'not at all' if entry is None else 'otherwise than sent'}"
            )
    return len(mine)


def _same(path: Path, entry: RepoFile) -> bool:
    """Compare sizes and checksums: sha256 of large files, git's blob id of small ones."""
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is not None:
        return file_sha256(path) == entry.lfs.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == entry.blob_id


def _said(error: Exception) -> str:
    """Return what went wrong in one line, without the token."""
    text = " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
    token = get_token()
    return text.replace(token, "<token>") if token else text
