"""``RUN/environment.json``: what a run's numbers depend on beside its config, from its start on.

Nothing in it names a machine, a user or a folder.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_dpo.config import Config
from lora_dpo.data import Tokenised
from lora_dpo.errors import ModelError
from lora_dpo.policy import adapter_folder
from lora_dpo.run_folder import versions
from lora_dpo.store import read_json, write_json

logger = logging.getLogger("lora_dpo")

ENVIRONMENT = "environment.json"
# what a model and its tokenizer are read from; other files of a folder may change
_READ = (
    "*.safetensors", "*.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.jinja", "*.py",
)  # fmt: skip
_WHOLE, _PIECES, _PIECE = 1 << 28, 256, 1 << 20  # bytes; of a larger file pieces are read


def note_environment(
    folder: Path, config: Config, base: Any, train: Tokenised, held_out: Tokenised | None, step: int
) -> None:
    """Write what a run begins with; a run that goes on adds what has changed since.

    Args:
        folder: of the run.
        config: its own, resolved.
        base: the base's config, as ``check_base`` returns it.
        train: rows that are trained on.
        held_out: rows that are not.
        step: at which it goes on; 0 for one that begins.
    """
    earlier = environment_of(folder) if step else {}
    sessions = list(earlier.get("sessions", []))
    now = {"from_step": step, "at": _now(), **surroundings()}
    if sessions and (changed := differences(sessions[-1], now)):
        logger.warning(
            "this machine is not as it was when the run last went on (%s); its numbers may not be those "
            "of a run in one piece",
            ", ".join(f"{name}: {was} -> {is_}" for name, was, is_ in changed),
        )
    write_json(
        folder / ENVIRONMENT,
        {
            "seed": int(config.train.further.get("seed", 0)),
            "data": {
                "train": train.fingerprint,
                "held_out": held_out.fingerprint if held_out is not None else None,
            },
            **sources_of(config, base),
            "sessions": [*sessions, now],
        },
    )


def environment_of(folder: Path) -> dict[str, Any]:
    """Return what ``note_environment`` wrote; empty for a run that is older than it."""
    path = folder / ENVIRONMENT
    found = read_json(path) if path.is_file() else {}
    sessions = found.get("sessions") if isinstance(found, dict) else None
    whole = isinstance(sessions, list) and all(isinstance(each, dict) for each in sessions)
    return found if whole else {}


def sources_of(config: Config, base: Any) -> dict[str, Any]:
    """Return fingerprints of base and starting adapter: a commit of the hub, or a hash a file."""
    found: dict[str, Any] = {"base": fingerprints(config.model.base, base)}
    if config.model.adapter is not None:
        found["adapter"] = fingerprints(str(adapter_folder(config.model.adapter)))
    return found


def fingerprints(place: str, config: Any = None) -> dict[str, str]:
    """Return the hash of each file that a model is read from, or the commit on the hub.

    Of a file above 256 MiB 256 pieces of 1 MiB are read, spread over it, so that nobody waits for
    minutes before the first step.

    Args:
        place: a folder or a hub id.
        config: of the model, which knows the commit.
    """
    folder = Path(place)
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None)
        return {"commit": str(commit)} if commit else {}
    files = sorted({path for pattern in _READ for path in folder.glob(pattern) if path.is_file()})
    return {path.name: _digest(path) for path in files}


def check_sources(run: Path, config: Config, base: Any) -> None:
    """Hold that base and starting adapter are what a run began with: a path may lead to others by now.

    Args:
        run: its folder.
        config: its own.
        base: the base's config.

    Raises:
        ModelError: names the files.
    """
    recorded, now = environment_of(run), sources_of(config, base)
    for name in ("base", "adapter"):
        was, is_ = recorded.get(name) or {}, now.get(name) or {}
        if was and (different := sorted(k for k in {**was, **is_} if was.get(k) != is_.get(k))):
            place = config.model.base if name == "base" else config.model.adapter
            raise ModelError(
                f"model.{name} {str(place)!r}: is not what the run {run} was trained on "
                f"({', '.join(different[:5])} differ). Bring the old files back."
            )


def as_it_began(config: Config, folder: Path) -> Config:
    """Return a config with the commit of the hub that a run began with, where it names none."""
    commit = (environment_of(folder).get("base") or {}).get("commit")
    free = commit and config.model.revision is None
    return config.replace("model.revision", commit) if free else config


def surroundings() -> dict[str, Any]:
    """Return versions, hardware, threads and the state of git where the command was started."""
    return {
        "versions": versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "git": git_state(Path.cwd()),
    }


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, earlier and later value of what may move a run's numbers and has changed."""
    flat = [_flat({key: part.get(key) for key in _MOVING}) for part in (was, now)]
    names = sorted({*flat[0], *flat[1]})
    pairs = ((name, flat[0].get(name, "-"), flat[1].get(name, "-")) for name in names)
    return [(name, old, new) for name, old, new in pairs if old != new]


_MOVING = ("versions", "hardware", "threads", "processes")


def hardware() -> dict[str, Any]:
    """Return what this machine computes with."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["cards"] = [
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.major}.{card.minor}"
            for card in cards
        ]
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether tracked files differ from it; None outside of a repository."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed) if changed is not None else None}


def _git(folder: Path, *arguments: str) -> str | None:
    # no program that the repository's own settings name is started for this
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}: " if before else "")
        else:
            found[name] = str(value)
    return found


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= _WHOLE:
            while piece := stream.read(_PIECE):
                digest.update(piece)
        else:
            for number in range(_PIECES):
                stream.seek(number * (size - _PIECE) // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
