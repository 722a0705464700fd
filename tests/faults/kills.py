"""Kills: at random moments and at named ones, one after another, until a run has come to its end."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_dpo.checkpoints import list_checkpoints
from tests.faults.checks import (
    Whole,
    check_end,
    check_nothing_half,
    check_said,
    logged_step,
    lost_steps,
    whole,
)
from tests.faults.world import EVERY, SETTINGS, STEPS, Trial, World, kill_when


@dataclass(frozen=True)
class Kill:
    """One kill: when, under which settings, and what it has cost."""

    moment: str
    settings: str
    lost: int
    found: str  # what the next start finds


Happened = Callable[[], bool]
Moment = Callable[[Trial, random.Random, float], tuple[Happened, float]]


def _any_time(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    return lambda: True, numbers.uniform(0, seconds)


def _tokenising(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    return _there(trial.cache / "tokenised", ".*.unfinished-*"), numbers.uniform(0, 0.03)


def _filling(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    pattern = numbers.choice(["*/reference.json", "*/*.logps", "*/.*.logps.*"])
    return _there(trial.store, pattern), numbers.uniform(0, 0.3)


def _loading(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    begun = time.time()

    def happened() -> bool:
        path = trial.run / "lengths.json"
        return path.is_file() and path.stat().st_mtime >= begun

    return happened, numbers.uniform(0, 0.5)


def _step(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    goal = _kept(trial) + numbers.randint(1, 9)
    return _logged(trial, min(goal, STEPS - 1)), numbers.uniform(0, 0.05)


def _evaluation(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    """Between the last log line before an evaluation and the evaluation's own."""
    return _logged(trial, _next(trial, numbers)), numbers.uniform(0, 0.05)


def _checkpoint(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    folder = trial.run / f"checkpoint-{_next(trial, numbers)}"
    names = ["", "optimizer.pt", "rng_state.pth", "trainer_state.json", "lora_dpo_state.json"]
    return (folder / numbers.choice(names)).exists, numbers.uniform(0, 0.01)


def _rotation(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    path = trial.run / f"checkpoint-{_next(trial, numbers)}" / "manifest.json"
    return path.exists, numbers.uniform(0, 0.01)


def _ending(trial: Trial, numbers: random.Random, seconds: float) -> tuple[Happened, float]:
    pattern = numbers.choice([".adapter.unfinished-*", "adapter", ".run.json.*", "reference"])
    begun = _there(trial.run, f"{pattern}")
    if pattern == "reference":  # where there is none, the last step
        begun = _logged(trial, STEPS)
    return begun, numbers.uniform(0, 0.1)


# In the order in which a run comes by.
MOMENTS: dict[str, Moment] = {
    "tokenising": _tokenising,
    "filling the store of reference log-probs": _filling,
    "loading, before step 1": _loading,
    "any time": _any_time,
    "a step": _step,
    "an evaluation": _evaluation,
    "writing a checkpoint": _checkpoint,
    "sealing it and deleting older ones": _rotation,
    "the end: adapter, results": _ending,
}


def _there(folder: Path, pattern: str) -> Happened:
    return lambda: any(folder.glob(pattern))


def _logged(trial: Trial, step: int) -> Happened:
    """Once this process has logged a step: an older file is cut when training begins."""
    before = logged_step(trial)
    begun = time.time()

    def happened() -> bool:
        path = trial.run / "metrics.jsonl"
        if not path.is_file() or (before >= step and path.stat().st_mtime < begun):
            return False
        return logged_step(trial) >= step

    return happened


def _kept(trial: Trial) -> int:
    sealed = list_checkpoints(trial.run)
    return int(sealed[-1].name.rpartition("-")[2]) if sealed else 0


def _next(trial: Trial, numbers: random.Random) -> int:
    return min(_kept(trial) + EVERY * numbers.randint(1, 2), STEPS)


def uninterrupted(world: World, name: str) -> Whole:
    """Run settings to their end, all checkpoints kept."""
    trial = world.trial(f"{_slug(name)}-whole", {**SETTINGS[name], "train.save_total_limit": 99})
    began = time.monotonic()
    trial.ended(trial.train())
    return whole(trial, time.monotonic() - began)


def killed_run(
    world: World, name: str, expected: Whole, moments: list[str], serial: int
) -> Iterator[Kill]:
    """Kill one run at these moments, each time starting it again; then let it end, and compare.

    A moment that does not come by any more before the run ends is left out.
    """
    trial = world.trial(f"{_slug(name)}-{serial}", SETTINGS[name])
    for moment in sorted(moments, key=list(MOMENTS).index):
        process = trial.train("--resume")
        happened, delay = MOMENTS[moment](trial, world.random, expected.seconds)
        if not kill_when(process, happened, delay):
            trial.ended(process)
            break
        check_nothing_half(trial, expected)
        lost = lost_steps(trial)
        assert lost <= EVERY, f"{trial.run}: {lost} steps lost"
        yield Kill(moment, name, lost, check_said(trial))
    trial.ended(trial.train("--resume"))
    check_end(trial, expected)
    files = {path: path.read_bytes() for path in trial.run.rglob("*") if path.is_file()}
    assert "nothing is left to do" in trial.ended(trial.train("--resume"))
    assert {p: p.read_bytes() for p in trial.run.rglob("*") if p.is_file()} == files


def killed_export(
    world: World, run: Path, merge: bool, replaces: bool, kills: int
) -> Iterator[Kill]:
    """Kill exports into one folder; then let one end, and compare it with an undisturbed one."""
    what = "a merged export" if merge else "an adapter's export"
    what += " over an older one" if replaces else ""
    trial = world.trial(_slug(what), {})
    words = ["--merge"] if merge else []
    whole, target = trial.folder / "whole", trial.folder / "target"
    began = time.monotonic()
    trial.ended(trial.command("export", str(run), "--to", str(whole), *words))
    seconds = time.monotonic() - began
    names = sorted(path.name for path in whole.iterdir())
    if replaces:
        trial.ended(trial.command("export", str(run), "--to", str(target), *words))
        words.append("--overwrite")
    before = {p.name: p.read_bytes() for p in target.iterdir()} if replaces else {}
    for _ in range(kills):
        process = trial.command("export", str(run), "--to", str(target), *words)
        begun = _there(trial.folder, ".target.unfinished-*[!k]")
        if kill_when(process, begun, world.random.uniform(0, seconds / 2)):
            now = {p.name: p.read_bytes() for p in target.iterdir()} if target.exists() else {}
            done = sorted(now) == names and not (replaces and now == before)
            assert done or now == before, f"{target}: half of an export"
            yield Kill("an export", what, 0, "the new one" if done else "the older one or nothing")
            if done and not replaces:
                break
        elif not replaces:
            trial.ended(process)
            break
    if not target.exists() or replaces:
        trial.ended(trial.command("export", str(run), "--to", str(target), *words))
    assert sorted(path.name for path in target.iterdir()) == names
    assert not list(trial.folder.glob(".target*")), "left behind"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()
