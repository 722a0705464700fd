"""The contents of the page: every part of every run, and one line for each that is not there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lora_dpo.reporting import parts
from lora_dpo.reporting.cards import DataCard, data_cards
from lora_dpo.reporting.charts import COLOURS, curve_figure, histogram_figure, scales
from lora_dpo.reporting.curves import Curve, curves_of, metrics_of, smoothed
from lora_dpo.reporting.notes import Note, chosen_limit, notes_on, run_notes
from lora_dpo.reporting.reading import Recorded
from lora_dpo.reporting.tables import Table, same_groups, settings_tables, table, thinned

MOST_ROWS = 200  # of a table behind a chart

# What makes a part that is not there.
MAKES = {
    "held_out": "lora-dpo train writes it at the end of training (run.json), if rows are held out",
    "diagnoses": "lora-dpo diagnose {run}",
    "samples": "lora-dpo train writes it at each evaluation (samples.jsonl)",
    "comparisons": "lora-dpo compare {run}",
    "data": "lora-dpo train writes it at its start (data.json)",
    "lengths": "lora-dpo train writes it at its start (lengths.json); of data alone: lora-dpo inspect",
    "plans": "lora-dpo train writes it at its start (plan.json); without a run: lora-dpo plan",
    "exports": "lora-dpo export {run} --merge --to FOLDER",
    "versions": "lora-dpo train writes it at the end of training (run.json)",
}


@dataclass(frozen=True)
class RunRow:
    """One run in the list at the top."""

    run: Recorded
    colour: int
    state: str
    found: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """A chart with what stands beside it; its figure is in ``Contents.figures`` under its key."""

    key: str
    title: str
    label: str
    notes: tuple[Note, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass
class Contents:
    """Everything that the page shows. Parts that several runs share stand once, under all names."""

    rows: tuple[RunRow, ...]
    settings: Table
    differences: Table | None = None
    charts: list[Chart] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    undrawn: list[str] = field(default_factory=list)
    held_out: Table | None = None
    diagnoses: list[tuple[list[str], Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)  # of the runs themselves, while they went on
    samples: list[tuple[list[str], Any]] = field(default_factory=list)
    comparisons: list[tuple[list[str], Any]] = field(default_factory=list)
    data: list[tuple[list[str], list[tuple[DataCard, Chart | None]]]] = field(default_factory=list)
    plans: list[tuple[list[str], Any]] = field(default_factory=list)
    exports: Table | None = None
    versions: Table | None = None
    missing: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add_figure(self, figure: Any) -> str:
        """Keep a figure; return the key under which it is drawn."""
        key = f"chart-{len(self.figures)}"
        self.figures[key] = figure
        return key


def contents_of(runs: Sequence[Recorded], now: float) -> Contents:
    """Collect the parts of all runs.

    Args:
        runs: as read.
        now: when the page is made, in seconds since 1970.
    """
    differences, settings = settings_tables({run.name: run.config for run in runs})
    contents = Contents(_rows(runs, now), settings)
    contents.differences = differences if len(runs) > 1 else None
    contents.problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    contents.notes = [note for run in runs for note in run_notes(run)]
    _add_curves(contents, runs)

    def part(name: str, make: Callable[[Recorded], Any]) -> dict[str, Any]:
        found = parts.read_part(name, runs, make, contents.problems)
        contents.missing[name] = left_out(name, [run for run in runs if run.name not in found])
        return found

    if found := part("held_out", parts.held_out):
        contents.held_out = parts.held_out_table(found)
    contents.diagnoses = same_groups(part("diagnoses", parts.findings))
    contents.samples = same_groups(part("samples", parts.sampled))
    contents.comparisons = same_groups(part("comparisons", parts.comparison))
    for names, cards in same_groups(part("data", data_cards)):
        contents.data.append((names, [(card, _histogram(contents, names, card)) for card in cards]))
    contents.missing["lengths"] = left_out("lengths", [run for run in runs if not run.lengths])
    contents.plans = same_groups(part("plans", parts.plans))
    if exported := part("exports", parts.exports):
        contents.exports = parts.exports_table(exported)
    if versions := part("versions", parts.versions):
        contents.versions = _versions(versions)
    return contents


def left_out(part: str, runs: Iterable[Recorded]) -> str:
    """Return which command makes a part that runs do not have; "" where all have it."""
    runs = list(runs)
    if not runs:
        return ""
    one = shlex.quote(runs[0].folder) if len(runs) == 1 else "RUN"
    command = MAKES[part].format(run=one)
    if "{run}" in MAKES[part] and not all(run.ended for run in runs):
        command += ", once training has ended"
    return f"{', '.join(run.name for run in runs)}: {command}"


def state_of(run: Recorded, now: float) -> str:
    """Return how far a run is, as its files tell it: what runs and what was killed look the same."""
    if run.ended:
        return f"ended after {run.steps} steps"
    if not run.history:
        return "not ended, and no line is logged yet"
    ago = max(now - (run.last_written or now), 0) / 60
    when = f"{ago:.0f} min" if ago < 120 else f"{ago / 60:.0f} h"
    return (
        f"not ended: going on, or stopped; at step {run.steps}, last line {when} before this page"
    )


def _rows(runs: Sequence[Recorded], now: float) -> tuple[RunRow, ...]:
    found = []
    for index, run in enumerate(runs):
        names = [str(f.get("name")) for f in run.findings if f.get("state") == "found"]
        found.append(RunRow(run, index % COLOURS, state_of(run, now), tuple(names)))
    return tuple(found)


def _add_curves(contents: Contents, runs: Sequence[Recorded]) -> None:
    metrics, contents.undrawn = metrics_of(runs)
    curves = {metric: curves_of(runs, metric) for metric in metrics}
    shared = scales(curves)
    for metric in metrics:
        limit = chosen_limit(runs) if metric == "logratios/chosen" else None
        figure = curve_figure(metric, curves[metric], shared=shared.get(metric), limit=limit)
        key = contents.add_figure(figure)
        names = ", ".join(curve.name for curve in curves[metric])
        tables = tuple(_values(metric, curves[metric]))
        label = f"{metric} by step: {names}"
        contents.charts.append(Chart(key, metric, label, tuple(notes_on(metric, runs)), tables))
    every = [soft for each in curves.values() for curve in each if (soft := smoothed(curve))]
    contents.windows = sorted({soft.window for soft in every})


def _values(metric: str, curves: Sequence[Curve]) -> Iterable[Table]:
    """Return the values that a chart is drawn from: training, and held out."""
    for held_out, name in ((False, "training"), (True, "held-out")):
        columns = {
            c.run: dict(zip(c.steps, c.values, strict=True))
            for c in curves
            if c.held_out == held_out
        }
        if columns:
            steps = sorted({step for column in columns.values() for step in column})
            kept, remark = thinned(steps, MOST_ROWS)
            rows = ([step, *(column.get(step) for column in columns.values())] for step in kept)
            yield table(f"{metric}, {name}", ("step", *columns), rows, remark)


def _histogram(contents: Contents, names: Sequence[str], card: DataCard) -> Chart | None:
    if card.histogram is None:
        return None
    edges, counts = card.histogram
    key = contents.add_figure(histogram_figure(edges, counts))
    bins = pairwise(edges)
    rows = (
        [f"{low} to {high - 1}", *(side[i] for side in counts.values())]
        for i, (low, high) in enumerate(bins)
    )
    values = table("Rows by length", ("tokens", *counts), rows)
    label = f"histogram of tokens of {card.part} rows of {', '.join(names)}"
    return Chart(key, f"lengths, {card.part}", label, tables=(values,))


def _versions(found: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for versions in found.values() for name in versions))
    rows = ([name, *(versions.get(name) for versions in found.values())] for name in names)
    return table("Versions and machine", ("", *found), rows)
