"""What a start finds in its output folder, and whether it begins, goes on, or has nothing to do."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_dpo.checkpoints import (
    check_facts,
    clear_unfinished,
    latest_checkpoint,
    list_checkpoints,
    progress_of,
)
from lora_dpo.config import Config
from lora_dpo.errors import OutputError
from lora_dpo.guards import checkpoint_facts
from lora_dpo.store import (
    clear_half_written,
    half_written,
    is_held,
    is_storage_fault,
    lock,
    not_written,
    read_json,
)

logger = logging.getLogger("lora_dpo")

# What a run has written before its first step: a start that failed there can simply be repeated.
BEFORE_TRAINING = {
    ".lock",
    "config.yaml",
    "data.json",
    "environment.json",
    "lengths.json",
    "plan.json",
    "reference",
}

State = Literal["nothing", "begun", "stopped", "damaged", "ended", "other"]


@dataclass(frozen=True)
class Found:
    """What an output folder holds.

    Args:
        state: ``nothing`` that a start could cost; a run that was ``stopped`` and has a whole
            checkpoint, or had only ``begun``; ``damaged``, none of whose checkpoints is whole;
            ``ended``; or ``other`` things than a run.
        words: the same for people.
        checkpoint: the newest one.
        facts: of the run that was there, as ``checkpoint_facts``.
    """

    state: State
    words: str
    checkpoint: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def found_in(folder: Path) -> Found:
    """Look at an output folder."""
    if folder.exists() and not folder.is_dir():
        return Found("other", "no folder")
    names = {p.name for p in folder.iterdir() if not half_written(p)} if folder.exists() else set()
    if names <= BEFORE_TRAINING:
        return Found("nothing", "nothing was trained there yet")
    if "config.yaml" not in names:
        return Found("other", "something else than a run of ours")
    sealed = list_checkpoints(folder)
    newest = sealed[-1] if sealed else None
    if "run.json" in names and not _cut_short(newest):
        results = read_json(folder / "run.json")
        steps = results.get("steps") if isinstance(results, dict) else "?"
        return Found("ended", f"a run that has ended ({steps} steps)", newest, _facts_of(folder))
    if newest is not None:
        return _stopped(folder)
    if "adapter" in names:  # a run that saves no checkpoints
        words = f"{folder}: a run without checkpoints, stopped at its end; its adapter/ is whole"
        return Found("damaged", f"{words}. Use that, or start afresh in another output.dir.")
    return Found(
        "begun", "a run that was stopped before its first checkpoint", None, _facts_of(folder)
    )


def _cut_short(newest: Path | None) -> bool:
    """Whether a run was ended before its last step, as ``stop_after`` does."""
    try:
        step, steps = progress_of(newest) if newest is not None else (0, 0)
    except (OutputError, KeyError):
        return False
    return step < steps


def _stopped(folder: Path) -> Found:
    try:
        checkpoint, facts, damaged = latest_checkpoint(folder)
        step, steps = progress_of(checkpoint)
    except OutputError as error:
        return Found("damaged", str(error))
    but = f" ({len(damaged)} newer damaged)" if damaged else ""
    words = (
        f"a run that was stopped; {checkpoint.name} of {steps} steps is its newest whole one{but}"
    )
    if step >= steps:
        words = f"a run that was stopped at its end, after all {steps} steps"
    return Found("stopped", words, checkpoint, facts)


def _facts_of(folder: Path) -> dict[str, Any]:
    return checkpoint_facts(Config.load(folder / "config.yaml"))


def check_start(folder: Path, config: Config, *, resume: bool) -> Found:
    """Return what a folder holds, if a run can start or go on there.

    Args:
        folder: of the run.
        config: of the run that starts.
        resume: whether a run that is there is to go on; without one it begins.

    Raises:
        OutputError: a start would cost what is there, or nothing of it can be gone on from.
        TrainingError: what is there is another run.
    """
    where = f"output.dir {str(folder)!r}"
    try:
        folder.exists()
    except OSError as error:  # a name that no file system takes
        raise OutputError(f"{where}: cannot be used ({error}).") from None
    if (folder / "config.yaml").is_file() and is_held(folder):
        raise OutputError(
            f"{where}: another process is writing here. Wait for it, or choose another folder."
        )
    found = found_in(folder)
    if not resume:
        if found.state != "nothing":
            raise OutputError(f"{where}: {_refusal(found)}")
    elif found.state == "other":
        raise OutputError(f"{where}: no run there to resume (config.yaml is missing).")
    elif found.state == "damaged":
        raise OutputError(found.words)
    elif found.facts:
        expected = checkpoint_facts(config)
        there = {key: found.facts.get(key) for key in expected}
        check_facts(found.checkpoint or folder, there, expected)
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if found.state != "ended" and not os.access(above, os.W_OK):
        raise OutputError(
            f"{where}: cannot be written ({above} is read-only). Choose another folder."
        )
    return found


def _refusal(found: Found) -> str:
    if found.state == "other":
        return "exists already and is not empty; choose another folder."
    if found.state == "ended":
        return f"exists already: {found.words}. Choose another folder."
    if found.state == "damaged":
        return f"exists already: {found.words}"
    how = "goes on" if found.state == "stopped" else "begins it again"
    return f"exists already: {found.words}. --resume {how}; or choose another folder."


@contextmanager
def started(folder: Path, config: Config, found: Found) -> Iterator[None]:
    """Hold the folder of a run and clear it of what a killed process left half done.

    Raises:
        OutputError: another process has it, had it since it was looked at, or the disk is full or
            read-only.
    """
    with storage_faults(folder), lock(folder):
        if found_in(folder) != found:
            raise OutputError(
                f"{folder}: another process has written here while the data were read. Start again."
            )
        clear_half_written(folder)
        if found.state != "stopped":
            clear_unfinished(folder)
            if config.model.adapter is None:  # of a start with another config, which failed
                shutil.rmtree(folder / "reference", ignore_errors=True)
        yield


@contextmanager
def storage_faults(folder: Path) -> Iterator[None]:
    """Say of a disk that is full or cannot be written to what is kept, and what to do.

    Raises:
        OutputError: for an error of the disk.
    """
    try:
        yield
    except Exception as error:
        if not is_storage_fault(error):
            raise
        name = getattr(error, "filename", None)
        if isinstance(name, str) and folder.absolute() not in Path(name).absolute().parents:
            raise OutputError(
                f"{name}: cannot be used ({' '.join(str(error).split())[:200]}). What was saved in {folder} "
                "is kept: mend that, and start again (train with --resume)."
            ) from None
        raise not_written(folder, error, "What was saved is kept") from None
