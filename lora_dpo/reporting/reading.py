"""The files of a run's folder, read as they are: a run that goes on, was killed or is damaged too.

Nothing here opens a model or the data, and no config is checked again: a report of an older run must
not fail on a setting that has a new name since. What cannot be read is a problem that the report tells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from lora_dpo.errors import ConfigError, OutputError

MOST_TOLD = 3


@dataclass(frozen=True)
class Recorded:
    """What the folder of one run holds; None or empty where a file is not there.

    Args:
        name: short, and no other run's of the same report.
        folder: as it was given.
        config: of ``config.yaml``, nested.
        results: of ``run.json``, which is written when training ends.
        data: of ``data.json``.
        lengths: of ``lengths.json``.
        history: the lines of ``metrics.jsonl``, oldest first.
        findings: of ``diagnostics.json``.
        notes: the lines of ``notes.jsonl``, what was noted while it ran.
        samples: the lines of ``samples.jsonl``.
        comparison: of ``comparison.json``.
        plan: of ``plan.json``.
        exports: the lines of ``exports.jsonl``.
        last_written: when ``metrics.jsonl`` was, in seconds since 1970.
        problems: what could not be read, in sentences.
    """

    name: str
    folder: str
    config: dict[str, Any]
    results: dict[str, Any]
    data: dict[str, Any]
    lengths: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    findings: tuple[dict[str, Any], ...]
    notes: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...]
    comparison: dict[str, Any]
    plan: dict[str, Any]
    exports: tuple[dict[str, Any], ...]
    last_written: float | None
    problems: tuple[str, ...]

    @property
    def ended(self) -> bool:
        """Whether training came to its end."""
        return bool(self.results)

    @property
    def steps(self) -> int:
        """Optimiser steps that are recorded."""
        ended = self.results.get("steps")
        if is_number(ended) and math.isfinite(ended):
            return int(ended)
        return int(max((line["step"] for line in self.history), default=0))

    @property
    def objective_name(self) -> str:
        """The objective's name."""
        found = self.config.get("objective")
        return str(found.get("name", "-") if isinstance(found, dict) else found or "-")

    @property
    def objective(self) -> str:
        """The objective, with its hyperparameters once training has ended."""
        return str(self.results.get("objective") or self.objective_name)

    @property
    def reference_moves(self) -> bool:
        """Whether the reference followed the policy."""
        found = self.config.get("train")
        moves = found.get("reference_update") if isinstance(found, dict) else None
        return moves not in (None, "none")

    def last(self, metric: str) -> float | None:
        """Return the newest value of a logged metric."""
        values = (line[metric] for line in reversed(self.history) if metric in line)
        return next((float(v) for v in values if is_number(v)), None)


def read_runs(folders: Sequence[Path]) -> tuple[Recorded, ...]:
    """Read runs, each under a name of its own.

    Raises:
        ConfigError: no run, or one of them twice.
        OutputError: a folder that holds no run.
    """
    if not folders:
        raise ConfigError("report: got no run; give the folder of one or more.")
    seen: set[Path] = set()
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise OutputError(
                f"{folder}: no run there (config.yaml is missing). Give the folder that "
                "'lora-dpo train' wrote, its output.dir."
            )
        if folder.resolve() in seen:
            raise ConfigError(f"{folder}: given twice; give each run once.")
        seen.add(folder.resolve())
    names = distinct_names(folders)
    return tuple(_read(name, folder) for name, folder in zip(names, folders, strict=True))


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many before it as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    counts = [1] * len(parts)
    while True:
        names = ["/".join(part[-count:]) for part, count in zip(parts, counts, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not alike:
            return names
        for i in alike:
            counts[i] += 1


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number; NaN is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: float) -> float | None:
    """Return a number that JSON and charts know, else None."""
    return value if math.isfinite(value) else None


def _read(name: str, folder: Path) -> Recorded:
    reader = _Reader(folder)
    metrics = folder / "metrics.jsonl"
    history = [line for line in reader.lines("metrics.jsonl") if reader.has_step(line)]
    findings = reader.mapping("diagnostics.json").get("findings")
    return Recorded(
        name=name,
        folder=str(folder),
        config=reader.settings(),
        results=reader.mapping("run.json"),
        data=reader.mapping("data.json"),
        lengths=reader.mapping("lengths.json"),
        history=tuple(history),
        findings=tuple(f for f in findings if isinstance(f, dict))
        if isinstance(findings, list)
        else (),
        notes=tuple(reader.lines("notes.jsonl")),
        samples=tuple(reader.lines("samples.jsonl")),
        comparison=reader.mapping("comparison.json"),
        plan=reader.mapping("plan.json"),
        exports=tuple(reader.lines("exports.jsonl")),
        last_written=metrics.stat().st_mtime if metrics.is_file() else None,
        problems=tuple(reader.problems),
    )


class _Reader:
    """Reads what can be read, and keeps a sentence for what cannot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        path = self.folder / name
        try:
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError as error:
            self.problems.append(f"{name}: cannot be read ({error.strerror}); left out")
            return ""

    def settings(self) -> dict[str, Any]:
        try:
            found = yaml.safe_load(self.text("config.yaml"))
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())[:200]
            self.problems.append(f"config.yaml: not readable as YAML ({reason}); left out")
            return {}
        return found if isinstance(found, dict) else {}

    def mapping(self, name: str) -> dict[str, Any]:
        if not (text := self.text(name)):
            return {}
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            self.problems.append(f"{name}: not readable as JSON ({error}); left out")
            return {}
        if not isinstance(found, dict):
            self.problems.append(f"{name}: holds no mapping; left out")
            return {}
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the whole lines; a torn one is what a killed process leaves."""
        found, torn = [], []
        for number, line in enumerate(self.text(name).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                value = None
            if isinstance(value, dict):
                found.append(value)
            else:
                torn.append(number)
        if torn:
            where = ", ".join(map(str, torn[:MOST_TOLD])) + ", ..." * (len(torn) > MOST_TOLD)
            counted = f"{len(torn)} lines" if len(torn) > 1 else "1 line"
            self.problems.append(f"{name}: {counted} not readable as JSON ({where}); left out")
        return found

    def has_step(self, line: dict[str, Any]) -> bool:
        if is_number(line.get("step")) and math.isfinite(line["step"]):
            return True
        self.problems.append("metrics.jsonl: a line without a step; left out")
        return False
