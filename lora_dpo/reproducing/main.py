"""``reproduce``: run a run again, from what its folder says, and compare."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_dpo.checkpoints import list_checkpoints
from lora_dpo.config import Config
from lora_dpo.errors import ConfigError, DataError, OutputError
from lora_dpo.policy import check_base
from lora_dpo.preparing import load_tokenizer, prepare_data
from lora_dpo.reproducing.measuring import (
    check_kept,
    compare_adapters,
    compare_figures,
    compare_lines,
    held_out,
    keyed,
)
from lora_dpo.reproducing.result import Reproduction
from lora_dpo.run import train
from lora_dpo.run_folder import Run, bound_objective
from lora_dpo.stepping import fitted
from lora_dpo.surroundings import (
    as_it_began,
    check_sources,
    differences,
    environment_of,
    surroundings,
)

logger = logging.getLogger("lora_dpo")


def reproduce(
    run: Run | str | Path, *, to: str | Path | None = None, tolerance: float = 0.0
) -> Reproduction:
    """Run a run again from its resolved config, and hold every figure and the adapter against it.

    Base and data are looked at first. A run that was killed is run up to the step that it had
    reached. Nothing is written to its folder.

    Args:
        run: a run or its folder.
        to: the new folder; the name of the run with ``-again`` behind it if left out.
        tolerance: by how much a figure may differ: in its own units up to 1, as a share above. 0 asks
            for the same bits.

    Raises:
        OutputError: no run there, one without a step, one whose adapters are not what it wrote, or a
            folder that is in the way.
        ModelError: the base or the adapter that it began with is not what it was.
        DataError: the data are not what they were.
        ConfigError: a tolerance that is none.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance: got {tolerance}; expected 0 or a number above.")
    run = run if isinstance(run, Run) else Run.open(run)
    target = Path(to) if to is not None else run.folder.with_name(f"{run.folder.name}-again")
    _check_target(run.folder, target)
    check_kept(run.folder)
    recorded, ended = environment_of(run.folder), bool(run.results)
    history = run.history
    steps = _steps(run, history)
    config = _config(run, target)
    _check_rows_and_sources(config, run, recorded)
    sessions = recorded.get("sessions") or []
    with _threads(sessions[-1].get("threads") if sessions else None):
        again = train(config, stop_after=steps)
    was, now = keyed(history, steps), keyed(again.history, steps)
    differing, missing, figures = compare_lines(was, now, ended=ended)
    if ended:
        first, second = held_out(run.results), held_out(again.results)
        names = list({**first, **second})
        differing += compare_figures("held out", names, first, second)
        figures += len(names)
    return Reproduction(
        run=str(run.folder),
        to=str(target),
        steps=steps,
        ended=ended,
        lines_compared=len(was),
        figures=figures,
        differing=tuple(differing),
        missing=tuple(missing),
        adapters=tuple(compare_adapters(run.folder, target, ended=ended)),
        changed=tuple(_changed(run, sessions, again)),
        notes=tuple(_notes(recorded, config)),
        tolerance=tolerance,
    )


def _check_target(run: Path, target: Path) -> None:
    here, there = run.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(
            f"{target}: is, holds or lies inside the run {run}; choose another (--to)."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(
            f"{target}: exists already and is not empty; choose another folder (--to)."
        )


def _steps(run: Run, history: list[dict[str, Any]]) -> int:
    kept = [int(path.name.rpartition("-")[2]) for path in list_checkpoints(run.folder)]
    steps = max([*(int(line["step"]) for line in history), *kept], default=0)
    if steps < 1:
        raise OutputError(
            f"{run.folder}: has logged no step yet; there is nothing to compare with."
        )
    return steps


def _config(run: Run, target: Path) -> Config:
    """Return the run's config for another folder, from which nothing leaves and nothing goes back."""
    config = run.config.replace("output.dir", str(target.absolute()))
    config = config.replace("train.report_to", "none").replace("output.diagnose", False)
    config = as_it_began(config, run.folder)
    if _inside(config.data.cache_dir, run.folder):
        config = config.replace("data.cache_dir", None)
    if _inside(config.train.reference_cache_dir, run.folder):
        config = config.replace(
            "train.reference_cache_dir", str(target.absolute() / "reference_cache")
        )
    return config


def _inside(place: str | None, folder: Path) -> bool:
    return place is not None and folder.resolve() in Path(place).resolve().parents


def _check_rows_and_sources(config: Config, run: Run, recorded: Mapping[str, Any]) -> None:
    """Hold base, adapter and data against what was recorded, before any weight loads."""
    check_sources(run.folder, config, check_base(config.model))
    objective = bound_objective(config)
    data = prepare_data(config, load_tokenizer(config), objective.data)
    rows = fitted(objective, data.train, data.held_out)
    prints = recorded.get("data") or {
        "train": run.results.get("train_rows"),
        "held_out": run.results.get("held_out_rows"),
    }
    for part, found in zip(("train", "held_out"), rows, strict=True):
        was, is_ = prints.get(part), found.fingerprint if found is not None else None
        if was not in (None, is_):
            raise DataError(
                f"data: the rows of {part.replace('_', ' ')} are not those of the run {run.folder} (their "
                f"tokens have the fingerprint {str(is_)[:16]}, and had {str(was)[:16]}). Bring the old "
                "files back."
            )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with as many threads as then: sums are cut up by their number."""
    before = torch.get_num_threads()
    usual = isinstance(count, int) and 0 < count <= 4096
    torch.set_num_threads(count if count is not None and usual else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _changed(run: Run, sessions: list[dict[str, Any]], again: Run) -> list[tuple[str, str, str]]:
    now = environment_of(again.folder)["sessions"][-1]
    if sessions:
        return differences(sessions[-1], now)
    was = run.results.get("versions") or {}
    return differences({"versions": was}, {"versions": now["versions"]}) if was else []


def _notes(recorded: Mapping[str, Any], config: Config) -> Iterator[str]:
    sessions = recorded.get("sessions") or []
    if not recorded:
        yield "the run is older than environment.json: hardware and files of its base are not known"
    if len(sessions) > 1:
        steps = ", ".join(str(session["from_step"]) for session in sessions[1:])
        yield f"the first run was resumed at step {steps}; the second ran in one piece"
    here = surroundings()["git"]
    if sessions and sessions[-1].get("git") != here:
        yield f"git: {_told(sessions[-1].get('git'))} then, {_told(here)} now"
    if not config.train.further.get("full_determinism") and torch.cuda.is_available():
        yield "train.full_determinism was off; on a GPU two runs then differ in their last bits"


def _told(state: Mapping[str, Any] | None) -> str:
    if not state:
        return "no repository"
    return f"{str(state['commit'])[:12]}{' with changes' if state.get('dirty') else ''}"
