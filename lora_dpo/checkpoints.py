"""Checkpoints that are whole or not taken: a manifest is written last and checked first."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.errors import OutputError, TrainingError
from lora_dpo.store import (
    MANIFEST,
    is_storage_fault,
    not_written,
    read_json,
    read_manifest,
    write_manifest,
)

logger = logging.getLogger("lora_dpo")

_NAME = re.compile(r"checkpoint-(\d+)")

STATE = "lora_dpo_state.json"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first (by step, not by date)."""
    return sorted(
        (p for p in run.glob("checkpoint-*") if _step(p) >= 0 and (p / MANIFEST).is_file()),
        key=_step,
    )


def seal_checkpoint(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a checkpoint as whole: the last thing that is written to it."""
    write_manifest(folder, facts)


@contextmanager
def new_checkpoint(folder: Path, *, writes: bool) -> Iterator[None]:
    """Make room for a checkpoint, and leave nothing of one that could not be written.

    A finished one in its place (damaged, or of a run that was resumed from further back) waits aside
    until the new one is whole.

    Args:
        folder: of the checkpoint.
        writes: whether this process is the one that does.

    Raises:
        OutputError: the disk is full, or cannot be written to.
    """
    aside = folder.with_name(f".{folder.name}.replaced")
    if writes:
        clear_unfinished(folder.parent)
        if folder.is_dir():
            os.replace(folder, aside)
    try:
        yield
    except Exception as error:
        if not is_storage_fault(error):
            raise
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            if aside.is_dir():
                os.replace(aside, folder)
        raise not_written(folder, error, "Earlier checkpoints are kept") from None
    if writes:
        shutil.rmtree(aside, ignore_errors=True)


def clear_unfinished(run: Path) -> None:
    """Remove every checkpoint of a run that a killed process had begun to write, or to replace."""
    half = [f for f in run.glob("checkpoint-*") if not (f / MANIFEST).is_file() and _step(f) >= 0]
    for folder in (*half, *run.glob(".checkpoint-*.replaced")):
        shutil.rmtree(folder, ignore_errors=True)


def latest_checkpoint(run: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the newest checkpoint whose files are what was written, its facts, and what was not.

    Raises:
        OutputError: the run has no whole checkpoint.
    """
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            return folder, read_manifest(folder), damaged
        except (OutputError, OSError) as error:
            damaged.append(str(error))
    found = "; ".join(damaged) or "no finished checkpoint-N folder"
    raise OutputError(
        f"{run}: nothing to resume from ({found}). Start the run afresh in another output.dir."
    )


def check_facts(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a checkpoint whose facts are not those of the run that wants to go on from it.

    Raises:
        TrainingError: names every fact that differs.
    """
    different = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if different:
        told = "; ".join(
            f"{k}: {found.get(k)!r} there, {expected.get(k)!r} here" for k in different
        )
        raise TrainingError(
            f"{folder}: saved by another run ({told}). Resume with the config of that run, or start "
            "afresh in another output.dir."
        )


def check_weights(folder: Path, before: Any, now: str) -> None:
    """Hold that a run goes on with the base and the frozen reference that it began with, to the byte.

    Args:
        folder: of the checkpoint.
        before: one hash of them, as the checkpoint has it.
        now: that of those that are here.

    Raises:
        TrainingError: they are others.
    """
    if before != now:
        raise TrainingError(
            f"{folder}: the base, or the adapter that is the reference, is not the one that this run began "
            "with (its weights' bytes differ): another model, or one quantised by another version of "
            "bitsandbytes or on another kind of device. Resume with that one, or start afresh in another "
            "output.dir."
        )


def rotate(new: Path, *, keep: int | None, best: str | None) -> None:
    """Delete the oldest finished checkpoints beyond ``keep``, never the best nor the one just written.

    Only once that has been read back; and what killed processes left of others. Those of later steps,
    behind which the run was resumed, are left alone until it comes to them.

    Args:
        new: the one just written.
        keep: how many stay; None keeps all.
        best: the name, or the path, of the best one.

    Raises:
        OutputError: the new one is not what was written to it.
    """
    run = new.parent
    folders = [folder for folder in list_checkpoints(run) if _step(folder) <= _step(new)]
    surplus = len(folders) - (len(folders) if keep is None else keep)
    if surplus > 0:
        read_manifest(new)
    protected = {new.name, Path(best or "").name}
    for folder in [f for f in folders if f.name not in protected][: max(surplus, 0)]:
        (folder / MANIFEST).unlink()  # a half-deleted checkpoint must not look whole
        shutil.rmtree(folder)
    clear_unfinished(run)


def check_best(folder: Path) -> None:
    """Hold that the best checkpoint, with which a run is to end, is what was written.

    Raises:
        OutputError: it is not, or is gone.
    """
    try:
        read_manifest(folder)
    except (OutputError, OSError) as error:
        raise OutputError(
            f"{folder}: the best checkpoint, with which the run was to end, is damaged ({error}). The "
            "last step is kept: remove that folder, and --resume ends the run with the last step."
        ) from None


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    # nothing is deleted through a link
    own = match is not None and folder.is_dir() and not folder.is_symlink()
    return int(match.group(1)) if match and own else -1


def asked_checkpoint(run: Path, asked: str | bool) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint of a path, or for True the newest whole one of a run, with its facts."""
    if asked is not True:
        return Path(str(asked)), read_manifest(Path(str(asked)))
    folder, facts, damaged = latest_checkpoint(run)
    for problem in damaged:
        logger.warning("left alone: %s", problem)
    return folder, facts


def check_first_rows(folder: Path, before: Sequence[float], now: Sequence[float]) -> None:
    """Hold that the reference gives the first rows the log-probs that it gave when the run began."""
    if len(before) != len(now) or not np.allclose(now, before, rtol=1e-3, atol=1e-2):
        raise TrainingError(
            f"{folder}: the reference or the data is not the one that this run began with (its "
            "log-probs of the first rows differ). Resume with the same base, adapter and data."
        )


def read_state(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds of ours beside the library's files.

    Raises:
        OutputError: another version wrote it.
    """
    state: dict[str, Any] = read_json(folder / STATE)
    if missing := _OF_A_STATE - state.keys():
        raise OutputError(
            f"{folder}: written by another version of lora_dpo ({', '.join(sorted(missing))} missing). "
            "Resume with that version, or start afresh in another output.dir."
        )
    return state


_OF_A_STATE = {"window", "loss", "reference_logps", "objective", "metrics", "skipped_steps"}
_OF_A_STATE |= {"micro_batch"}


def progress_of(folder: Path) -> tuple[int, int]:
    """Return the step of a checkpoint, and the steps of its run."""
    state = read_json(folder / "trainer_state.json")
    return int(state["global_step"]), int(state["max_steps"])


def evaluated_at_its_end(folder: Path) -> bool:
    """Whether a checkpoint is that of the last step, and its log has the evaluation of it."""
    state = read_json(folder / "trainer_state.json")
    steps = [line["step"] for line in state["log_history"] if "eval_loss" in line]
    return bool(state["global_step"] == state["max_steps"] == (steps or [None])[-1])


def lacks_its_epochs_evaluation(folder: Path) -> bool:
    """Whether a checkpoint was written at the end of an epoch, or of all, and its evaluation is not logged."""
    state = read_json(folder / "trainer_state.json")
    steps = [line["step"] for line in state["log_history"] if "eval_loss" in line]
    ended = float(state["epoch"]).is_integer() or state["global_step"] == state["max_steps"]
    return bool(ended and state["global_step"] != (steps or [None])[-1])
