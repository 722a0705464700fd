"""What has to hold after every fault: nothing half is taken for whole, and the end is the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo.checkpoints import list_checkpoints
from lora_dpo.config import Config
from lora_dpo.data import caching
from lora_dpo.errors import OutputError
from lora_dpo.reference_store import _records
from lora_dpo.restarting import check_start, found_in
from lora_dpo.store import read_json, read_manifest
from tests.faults.world import EVERY, STEPS, UNREPEATABLE, Trial

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Whole:
    """What the uninterrupted run was."""

    trial: Trial
    adapters: dict[str, bytes]  # of each checkpoint, and of the end
    numbers: list[dict[str, Any]]
    margins: list[Any]
    samples: list[Any]
    results: dict[str, Any]
    seconds: float


def whole(trial: Trial, seconds: float) -> Whole:
    """Read an uninterrupted run that kept all its checkpoints."""
    folders = [*list_checkpoints(trial.run), trial.run / "adapter"]
    assert [f.name for f in folders[:-1]] == [
        f"checkpoint-{step}" for step in range(EVERY, STEPS + 1, EVERY)
    ]
    return Whole(
        trial,
        {folder.name: (folder / WEIGHTS).read_bytes() for folder in folders},
        numbers(trial.run / "metrics.jsonl"),
        numbers(trial.run / "row_margins.jsonl"),
        numbers(trial.run / "samples.jsonl"),
        _results(trial.run),
        seconds,
    )


def numbers(path: Path) -> list[dict[str, Any]]:
    """Return every line of a file with every value that a run can repeat."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [
        {key: value for key, value in line.items() if not any(u in key for u in UNREPEATABLE)}
        for line in lines
    ]


def _results(run: Path) -> dict[str, Any]:
    results = read_json(run / "run.json")
    kept = ("objective", "reference", "steps", "rows", "objective_states", "held_out")
    return {key: results.get(key) for key in (*kept, "best_checkpoint", "train_rows")}


def check_end(trial: Trial, expected: Whole) -> None:
    """Hold that a run ended as the uninterrupted one, byte for byte and number for number."""
    run = trial.run
    found = numbers(run / "metrics.jsonl")
    for mine, theirs in zip(found, expected.numbers, strict=False):
        assert mine == theirs, f"{run}: a log line differs\n{mine}\n{theirs}"
    assert len(found) == len(expected.numbers), f"{run}: {len(found)} log lines"
    assert (run / "adapter" / WEIGHTS).read_bytes() == expected.adapters["adapter"], (
        f"{run}: adapter"
    )
    assert numbers(run / "row_margins.jsonl") == expected.margins, f"{run}: margins of rows"
    assert numbers(run / "samples.jsonl") == expected.samples, f"{run}: samples"
    assert _results(run) == expected.results, f"{run}: run.json"
    check_nothing_half(trial, expected)
    left = [p.name for p in run.rglob(".*") if p.name != ".lock"]
    left += [p.name for p in run.glob("checkpoint-*") if not (p / "manifest.json").is_file()]
    assert not left, f"{run}: left behind {left}"


def check_nothing_half(trial: Trial, expected: Whole) -> None:
    """Hold that what looks whole is whole, and is what the uninterrupted run had."""
    for folder in list_checkpoints(trial.run):
        read_manifest(folder)
        mine = (folder / WEIGHTS).read_bytes()
        assert mine == expected.adapters[folder.name], f"{folder}: not that of the whole run"
    if (trial.run / "adapter").exists():
        mine = (trial.run / "adapter" / WEIGHTS).read_bytes()
        assert mine == expected.adapters["adapter"], f"{trial.run}: adapter/ is not the final one"
    for entry in (trial.cache / "tokenised").glob("[!.]*"):
        assert caching.load(entry, entry.name) is not None, f"{entry}: looks whole"
    for path in trial.store.glob("*/[!.]*.logps"):
        _records(path)


def lost_steps(trial: Trial) -> int:
    """Return the steps that a kill has cost: logged, and not in a whole checkpoint."""
    sealed = list_checkpoints(trial.run)
    kept = int(sealed[-1].name.rpartition("-")[2]) if sealed else 0
    return max(logged_step(trial) - kept, 0)


def logged_step(trial: Trial) -> int:
    """Return the last step in ``metrics.jsonl``; a torn line is none."""
    path = trial.run / "metrics.jsonl"
    step = 0
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
    return step


def check_said(trial: Trial) -> str:
    """Hold that a start without ``--resume`` says what it found and how to go on, and change nothing."""
    config = Config.load(trial.path).resolved()
    state = found_in(trial.run).state
    assert state in ("nothing", "begun", "stopped", "ended"), f"{trial.run}: {state}"
    before = sorted(trial.run.rglob("*"))
    try:
        check_start(trial.run, config, resume=False)
        assert state == "nothing"
    except OutputError as error:
        word = {"begun": "--resume begins it again", "stopped": "--resume goes on"}.get(
            state, "ended"
        )
        assert word in str(error), error
    assert sorted(trial.run.rglob("*")) == before
    return state
