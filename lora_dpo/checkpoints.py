"""Checkpoints that are whole or not taken: a manifest is written last and checked first."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo.errors import OutputError, TrainingError
from lora_dpo.store import MANIFEST, read_manifest, write_manifest

logger = logging.getLogger("lora_dpo")

_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(run: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first (by step, not by date)."""
    return sorted(
        (p for p in run.glob("checkpoint-*") if _step(p) >= 0 and (p / MANIFEST).is_file()),
        key=_step,
    )


def seal_checkpoint(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a checkpoint as whole: the last thing that is written to it."""
    write_manifest(folder, facts)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint that was never sealed."""
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder)


def latest_checkpoint(run: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the newest checkpoint whose files are what was written, its facts, and what was not.

    Raises:
        OutputError: the run has no whole checkpoint.
    """
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            return folder, read_manifest(folder), damaged
        except OutputError as error:
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


def rotate(run: Path, *, keep: int | None, best: Path | None) -> None:
    """Delete the oldest finished checkpoints beyond ``keep``, never the best nor the newest one."""
    if keep is None:
        return
    folders = list_checkpoints(run)
    protected = {folders[-1]} | ({best} if best is not None else set()) if folders else set()
    surplus = len(folders) - keep
    for folder in [f for f in folders if f not in protected][: max(surplus, 0)]:
        (folder / MANIFEST).unlink()  # a half-deleted checkpoint must not look whole
        shutil.rmtree(folder)


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match and folder.is_dir() else -1


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
