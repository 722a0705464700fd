"""``report``: runs on one page, which needs no network and no program but a browser."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from markupsafe import escape
from rich.console import RenderableType

from lora_dpo.errors import OutputError
from lora_dpo.reporting.contents import Contents, contents_of
from lora_dpo.reporting.curves import curves_of, metrics_of
from lora_dpo.reporting.reading import Recorded, finite, is_number, read_runs
from lora_dpo.reporting.tables import shown
from lora_dpo.showing import Displayed, hanging, page, said, script

if TYPE_CHECKING:
    from lora_dpo.run_folder import Run

HEADLINES = ("loss", "rewards/accuracies", "rewards/margins")
NOTEBOOK_HEIGHT = 720  # pixels


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """Runs, as their folders tell of them. ``print(report)``; in a notebook, its name alone.

    Args:
        runs: as read, each under a name of its own.
        made: when, in seconds since 1970.
    """

    runs: tuple[Recorded, ...]
    made: float

    template: ClassVar[str] = "report"

    @property
    def title(self) -> str:
        """The page's."""
        return f"lora-dpo report: {', '.join(run.name for run in self.runs)}"

    @property
    def made_at(self) -> str:
        """When it was made, in words."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.made))

    def contents(self) -> Contents:
        """Return all parts, with the figures of the charts."""
        return contents_of(self.runs, self.made)

    def __repr__(self) -> str:
        ended = sum(run.ended for run in self.runs)
        names = ", ".join(run.name for run in self.runs)
        return f"Report({len(self.runs)} runs, {ended} ended: {names})"

    def terminal(self) -> list[RenderableType]:
        """Return what is printed."""
        contents = self.contents()
        lines: list[RenderableType] = []
        for row in contents.rows:
            lines.append(said(f"{row.run.name}: {row.run.objective}, {row.state}", "bold"))
            lines += [hanging(f"  {line}", 4) for line in _figures(row.run)]
            if row.run.findings:
                found = ", ".join(row.found) or "none of DPO's known failures"
                lines.append(hanging(f"  found: {found}", 4, "yellow" if row.found else ""))
        if contents.differences is not None and contents.differences.rows:
            lines.append(said("settings that differ", "bold"))
            for each in contents.differences.rows:
                values = " | ".join(str(value) for value in each[1:])
                lines.append(hanging(f"  {each[0]}: {values}", 4))
        lines += [hanging(f"LOOK  {problem}", 6, "yellow") for problem in contents.problems]
        absent = {part: what for part, what in contents.missing.items() if what}
        lines += [hanging(f"  no {_NAMES[part]}: {what}", 4) for part, what in absent.items()]
        return lines

    def to_html(self) -> str:
        """Return a whole page in one string: no network, light and dark, charts by plotly.js."""
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

        contents = self.contents()
        scripts = (get_plotlyjs(), script("charts"))
        return page(self.template, self.title, scripts, facts=self, contents=contents)

    def _repr_html_(self) -> str:
        # a frame of its own: its scripts and styles cannot touch the notebook, nor the notebook's it
        style = f"width:100%;height:{NOTEBOOK_HEIGHT}px;border:0"
        return (
            f'<iframe sandbox="allow-scripts" style="{style}" title="{escape(self.title)}" '
            f'srcdoc="{escape(self.to_html())}"></iframe>'
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: each run, its curves, what differs, what is not there."""
        contents = self.contents()
        differences = contents.differences
        return {
            "runs": [_run(row.run, row.state, row.found) for row in contents.rows],
            "differences": [
                {"setting": str(row[0]), "values": [str(value) for value in row[1:]]}
                for row in (differences.rows if differences else ())
            ],
            "curves": {
                metric: [
                    {"run": c.run, "held_out": c.held_out, "steps": c.steps, "values": c.values}
                    for c in curves_of(self.runs, metric)
                ]
                for metric in metrics_of(self.runs)[0]
            },
            "missing": {part: what for part, what in contents.missing.items() if what},
            "problems": contents.problems,
        }


_NAMES = {
    "held_out": "held-out metrics",
    "diagnoses": "diagnosis",
    "samples": "samples",
    "comparisons": "comparison",
    "data": "data card",
    "lengths": "lengths",
    "plans": "plan",
    "exports": "export",
    "versions": "versions",
}


def report(
    runs: Run | str | Path | Sequence[Run | str | Path],
    *,
    to: str | Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Read runs and, if asked, write one page about all of them; no model and no data are opened.

    Runs that go on, were killed or have damaged files are told of as far as their files go.

    Args:
        runs: one or more runs or their folders.
        to: the HTML file of the page.
        overwrite: replace an existing file.

    Raises:
        ConfigError: no run, or one twice.
        OutputError: a folder that holds no run, or a file that exists already.
    """
    several: Any = runs if isinstance(runs, (list, tuple)) else [runs]
    folders = [Path(run) if isinstance(run, (str, Path)) else run.folder for run in several]
    if to is not None:
        _check_file(Path(to), overwrite)
    found = Report(read_runs(folders), time.time())
    if to is not None:
        found.write_html(to)
    return found


def _check_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file, such as report.html.")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path}: exists already. Choose another file, or replace it (--overwrite)."
        )


def _figures(run: Recorded) -> list[str]:
    """Return the newest headline figures, held out and of training."""
    lines = []
    held = run.results.get("held_out")
    estimates = held.get("mean_low_high") if isinstance(held, dict) else None
    if isinstance(estimates, dict):
        shown_ones = [
            f"{name} {_estimate(estimates[name])}" for name in HEADLINES if name in estimates
        ]
        lines.append("held out: " + "  ".join(shown_ones))
    for prefix, rows in (("eval_", "last held out"), ("", "last line")):
        values = [(name, run.last(f"{prefix}{name}")) for name in HEADLINES]
        if (prefix == "" or not lines) and any(value is not None for _, value in values):
            found = [f"{name} {shown(value)}" for name, value in values if value is not None]
            lines.append(f"{rows}: " + "  ".join(found))
    return lines


def _estimate(values: Any) -> str:
    if isinstance(values, list) and len(values) == 3 and all(map(is_number, values)):
        return f"{shown(values[0])} [{shown(values[1])}, {shown(values[2])}]"
    return "-"


def _run(run: Recorded, state: str, found: Sequence[str]) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": run.folder,
        "objective": run.objective,
        "state": state,
        "ended": run.ended,
        "steps": run.steps,
        "held_out": _plain(run.results.get("held_out")),
        "found": list(found),
    }


def _plain(value: Any) -> Any:
    """Return a value of JSON without the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value
