"""Reports of runs: what the page says is what the files hold, and whatever comes from data is text."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from lora_dpo import report, train
from lora_dpo.cli import app
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.reporting.charts import curve_figure
from lora_dpo.reporting.contents import MOST_ROWS
from lora_dpo.reporting.curves import Curve, curves_of, smoothed
from lora_dpo.reporting.notes import chosen_limit, notes_on
from lora_dpo.reporting.reading import read_runs
from lora_dpo.run_folder import Run
from lora_dpo.showing import page
from tests import browsing

ENDS = "</script><script>pwned=1</script><!-- <script>"
LINK = "<a href='javascript:pwned=2'>x</a><img src=x onerror=pwned=3> %{y} &lt;b&gt; \u202e"
FOLDER = "<img src=x onerror=pwned=4> &lt;i&gt; %{y} <b>"


class _Page(HTMLParser):
    """Tables by their caption as exact values by row and column, and all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.headings: list[str] = []
        self._open: list[str] = []
        self._caption, self._table = "", [[[""]]]
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        if tag == "table":
            self._table, self._caption = [], ""
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append([])
        elif tag == "data":
            self._table[-1][-1].append(dict(attributes)["value"] or "")
        elif tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption] = self._table

    def handle_data(self, text: str) -> None:
        if "caption" in self._open:
            self._caption += text
        elif self._open and self._open[-1] in ("td", "th"):
            self._table[-1][-1].append(text)
        elif self._open and self._open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings[-1] += text


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("report")
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return train(
        {
            "model": {"base": str(tiny_model)},
            "lora": {"rank": 4},
            "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.25, "max_length": 128},
            "train": {
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "max_steps": 4,
                "eval_steps": 2,
                "logging_steps": 1,
                "use_cpu": True,
            },
            "output": {"dir": str(folder / "a" / "run"), "diagnose": False},
        }
    )


def _made(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
    **files: Any,
) -> Path:
    """A run's folder with these files alone."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or {"objective": {"name": "dpo"}}))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for name, value in files.items():
        if isinstance(value, list):
            text = "".join(json.dumps(x) + "\n" for x in value)
            (folder / f"{name}.jsonl").write_text(text)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_every_number_of_the_pages_tables_is_that_of_the_runs_files(
    run: Run, tmp_path: Path
) -> None:
    shutil.copytree(run.folder, tmp_path / "b" / "run")  # the same last name
    found = _Page(report([run, tmp_path / "b" / "run"]).to_html())
    lines = run.history
    for prefix, part in (("", "training"), ("eval_", "held-out")):
        for metric in ("loss", "rewards/margins", "rewards/accuracies", "logratios/chosen"):
            head, *rows = found.tables[f"{metric}, {part}"]
            assert head == [["step"], ["a/run"], ["b/run"]]
            logged = {x["step"]: x[prefix + metric] for x in lines if prefix + metric in x}
            assert len(logged) >= 2
            assert {int(row[0][0]): float(row[1][0]) for row in rows} == logged
            assert [row[1] for row in rows] == [row[2] for row in rows]
    held = run.results["held_out"]["mean_low_high"]
    shown: dict[str, list[list[float]]] = {}
    for row in found.tables["Before and after"][1:]:
        if len(row) == 1:  # the metric, of which each run has a row
            each = shown.setdefault(row[0][0], [])
        else:
            each.append([float(x) for x in row[2] if _is_number(x)])
    assert shown == {name: [values, values] for name, values in held.items()}
    lengths = json.loads((run.folder / "lengths.json").read_text())
    quantiles = lengths["held out"]["quantiles"]
    rows = {
        row[0][0]: [int(c[0]) for c in row[1:]] for row in found.tables["Lengths in tokens"][1:]
    }
    assert rows["prompt"] == list(quantiles["prompt"].values())
    assert rows["rejected"] == list(quantiles["answers"]["rejected"].values())
    versions = {row[0][0]: row[1][0] for row in found.tables["Versions and machine"][1:]}
    assert versions == run.results["versions"]


def test_the_reference_has_a_tie_no_reward_and_the_log_probs_that_the_ratios_tell(run: Run) -> None:
    rows = _Page(report(run).to_html()).tables["Before and after"][1:]
    before = {row[0][0]: float(row[1][0]) for row in rows if _is_number(row[1][0])}
    held = run.results["held_out"]["mean_low_high"]
    assert before["rewards/accuracies"] == 0.5 and before["rewards/margins"] == 0
    reference = held["logps/rejected"][0] - held["logratios/rejected"][0]
    assert before["logps/rejected"] == pytest.approx(reference, rel=1e-12)
    assert "loss" not in before  # no file tells it


def test_a_run_keeps_the_lengths_and_the_fingerprint_of_its_rows(run: Run) -> None:
    cards = json.loads((run.folder / "lengths.json").read_text())
    assert cards["held out"]["fingerprint"] == run.held_out().fingerprint
    assert {name: card["rows"] for name, card in cards.items()} == {"train": 12, "held out": 4}
    for card in cards.values():
        assert all(sum(bars) == card["rows"] for bars in card["histogram"]["counts"].values())


def test_runs_of_one_name_stand_in_one_chart_under_names_of_their_own(tmp_path: Path) -> None:
    lines = [{"loss": 0.6, "step": 1}, {"loss": 0.5, "step": 2}]
    folders = [_made(tmp_path / part / "run", lines) for part in ("x/same", "y/same", "z/other")]
    contents = report([*folders, _made(tmp_path / "alone", lines)]).contents()
    (figure,) = contents.figures.values()
    assert [trace["name"] for trace in figure["data"]] == [
        "x/same/run training", "y/same/run training", "other/run training", "alone training",
    ]  # fmt: skip
    assert len({trace["line"]["color"] for trace in figure["data"]}) == 4


@pytest.mark.parametrize("torn", [b"", b'{"loss": 0.6, "step": 1}\n{"loss": 0.', b"\xff\x00\n[]\n"])
def test_a_run_that_was_killed_has_a_report_of_its_whole_lines(tmp_path: Path, torn: bytes) -> None:
    folder = _made(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(torn)
    found = report(folder)
    contents = found.contents()
    assert [row.state.partition(":")[0].partition(",")[0] for row in contents.rows] == ["not ended"]
    assert len(contents.charts) == (b"0.6" in torn)
    assert any("metrics.jsonl" in problem for problem in contents.problems) == bool(torn)
    assert found.to_html() and str(found) and json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "name", ["run", "data", "lengths", "diagnostics", "comparison", "plan", "samples", "exports"]
)
@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"findings": [{}], "entries": 3, "models": 1, "a": 1}']
)
def test_a_damaged_file_is_told_and_the_rest_is_shown(tmp_path: Path, name: str, text: str) -> None:
    folder = _made(tmp_path / "run", [{"loss": 0.6, "step": 1}])
    ending = "jsonl" if name in ("samples", "exports") else "json"
    (folder / f"{name}.{ending}").write_text(text)
    contents = report(folder).contents()
    assert [chart.title for chart in contents.charts] == ["loss"]
    # a result of which nothing is read holds nothing wrong
    assert contents.problems or (name == "run" and text.startswith('{"'))


def test_a_part_that_is_not_there_is_one_line_with_the_command_that_makes_it(run: Run) -> None:
    folder = str(run.folder)
    missing = {k: v for k, v in report(run).contents().missing.items() if v}
    assert set(missing) >= {"diagnoses", "comparisons", "exports"}
    assert not {"held_out", "data", "lengths", "versions"} & set(missing)
    assert missing["diagnoses"] == f"run: lora-dpo diagnose {folder}"
    html = report(run).to_html()
    assert all(unescape(line) in unescape(html) for line in missing.values())


def test_only_settings_that_differ_are_called_so(tmp_path: Path) -> None:
    one = {"train": {"seed": 0, "learning_rate": 1e-4}, "output": {"dir": "a"}}
    two = {"train": {"seed": 0, "learning_rate": 2e-4}, "output": {"dir": "b"}, "new": [1]}
    folders = [_made(tmp_path / "a", [], one), _made(tmp_path / "b", [], two)]
    found = report(folders).to_dict()["differences"]
    assert found == [
        {"setting": "train.learning_rate", "values": ["0.0001", "0.0002"]},
        {"setting": "new", "values": ["-", "[1]"]},
    ]


def test_the_line_is_the_mean_of_its_window_and_the_band_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=200)
    curve = Curve("run", 0, "loss", False, tuple(range(200)), tuple(values))
    soft = smoothed(curve)
    assert soft is not None and soft.window == 11
    for i in (0, 3, 100, 199):
        around = values[max(0, i - 5) : i + 6]
        assert soft.mean[i] == pytest.approx(around.mean(), rel=1e-12)
        assert (soft.low[i], soft.high[i]) == (around.min(), around.max())
    band, line = curve_figure("loss", [curve])["data"]
    assert len(band["y"]) == 400 and list(line["y"]) == list(soft.mean)


def test_a_fall_of_chosen_answers_is_normal_up_to_a_nat_or_a_tenth_of_one_a_token(
    tmp_path: Path,
) -> None:
    states = {}
    for name, fall, tokens in (
        ("a", 0.3, 10), ("b", -0.9, 5), ("c", -1.1, 5), ("d", -1.1, 50), ("e", -5.1, 50),
    ):  # fmt: skip
        line = {"eval_logratios/chosen": fall, "eval_lengths/chosen": tokens, "step": 1}
        runs = read_runs([_made(tmp_path / name, [line])])
        states[name] = [note.state for note in notes_on("logratios/chosen", runs)][1:]
        assert chosen_limit(runs) == -max(1, tokens / 10)
        figure = report(tmp_path / name).contents().figures["chart-0"]
        marks = [shape["y0"] for shape in figure["layout"].get("shapes", ())]
        near = name in "bce"  # the curve is beyond half of it
        assert marks == ([chosen_limit(runs)] if near else [])
    assert states == {"a": ["ok"], "b": ["ok"], "c": ["found"], "d": ["ok"], "e": ["found"]}


def test_long_tables_say_which_steps_they_leave_out_and_keep_the_last(tmp_path: Path) -> None:
    lines = [{"loss": 1 / step, "step": step} for step in range(1, 1002)]
    (chart,) = report(_made(tmp_path / "run", lines)).contents().charts
    (values,) = chart.tables
    assert len(values.rows) <= MOST_ROWS and str(values.rows[-1][0]) == "1 001"
    assert values.remark.startswith("every 6th of 1001 steps")


def test_values_that_are_not_finite_leave_a_gap_and_json_stays_json(tmp_path: Path) -> None:
    lines = [{"loss": v, "step": i} for i, v in enumerate((0.7, math.nan, math.inf, 0.5))]
    found = report(_made(tmp_path / "run", lines))
    (curve,) = curves_of(found.runs, "loss")
    assert curve.values == (0.7, None, None, 0.5)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["curves"]["loss"]
    assert "NaN" not in found.to_html().partition('id="lora-dpo-figures">')[2].partition("<")[0]


def test_what_cannot_be_reported_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"no run there \(config.yaml is missing\)"):
        report(tmp_path, to=tmp_path / "r.html")
    with pytest.raises(ConfigError, match="given twice"):
        report([run, str(run.folder)])
    with pytest.raises(ConfigError, match="got no run"):
        report([])
    with pytest.raises(OutputError, match="is a folder"):
        report(run, to=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_page_and_replaces_one_only_when_asked(
    run: Run, tmp_path: Path
) -> None:
    to = tmp_path / "new" / "r.html"

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["report", str(run.folder), "--to", str(to), *words])

    done = call()
    assert done.exit_code == 0 and f"page: {to}" in done.output and "held out: loss" in done.output
    assert to.read_text().startswith("<!doctype html>")
    to.write_text("mine")
    refused = call()
    assert refused.exit_code == 1 and "--overwrite" in refused.output and to.read_text() == "mine"
    found = json.loads(call("--overwrite", "--json").output)
    assert found["runs"][0]["ended"] and found["curves"]["loss"][0]["run"] == "run"
    assert to.read_text() != "mine"


def test_a_report_opens_no_model_and_plotly_only_where_a_page_is_made(run: Run) -> None:
    code = (
        "import sys, lora_dpo; found = lora_dpo.report(sys.argv[1]); str(found), found.to_dict();"
        "found.to_html(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, run.folder], check=False).returncode == 0
    code = "import sys, lora_dpo.reporting, lora_dpo.cli; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_notebook_gets_the_page_in_a_frame_of_its_own(tmp_path: Path) -> None:
    found = report(_made(tmp_path / FOLDER, [{"loss": 0.6, "step": 1}]))
    html = found._repr_html_()
    assert html.startswith('<iframe sandbox="allow-scripts"') and html.count("<") == 2
    assert unescape(html.partition('srcdoc="')[2].rpartition('"')[0]) == found.to_html()


@pytest.mark.parametrize("text", ["x</script>", "x<!--", "a\r\nb"])
def test_a_script_that_would_end_its_element_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="would end its own element"):
        page("checkup", "title", (text,))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- in a browser -----------------------------------------------------------------------------


def _hostile(tmp_path: Path) -> list[Path]:
    """Two runs with strings in every place that would do something if they were not text."""
    text = ENDS + LINK
    lines = [
        {"loss": 0.7 - 0.01 * step, f"m {text}": 1.0 * step, "step": step} for step in range(1, 30)
    ] + [{"eval_loss": 0.6, "step": 15}, {"eval_loss": 0.5, "step": 29}]
    settings = {"objective": {"name": text}, "w" * 200: "v" * 400, text: [text]}
    finding = {
        "name": text, "state": "found", "what": text, "why": text, "remedies": [text],
        "rows": [text], "measured": {text: 1.0},
    }  # fmt: skip
    entry = {"reason": f"dropped: {text}", "count": 1, "examples": [[text, text]]}
    quantiles = dict.fromkeys(("p50", "p90", "p99", "max"), 3)
    card = {
        "rows": 2,
        "fingerprint": text,
        "quantiles": {"prompt": quantiles, "answers": {text: quantiles}, "total": quantiles, "before": quantiles},
        "histogram": {"edges": [0, 10, 20], "counts": {"prompt": [2, 0], text: [1, 1]}},
    }  # fmt: skip
    measured = {
        "mean_low_high": [1.0, 0.5, None],
        "change": [0.1, 0.0, 0.2],
        "p_value": 0.5,
        "test": text,
    }
    model = {"name": text, "measures": {text: measured}, "notes": [text]}
    hostile = _made(
        tmp_path / FOLDER,
        lines,
        settings,
        run={"objective": text, "steps": 29, "versions": {text: text},
             "held_out": {"mean_low_high": {text: [1.0, 0.5, 2.0]}}},
        data={text: {"read": 3, "added": 0, "entries": [entry]}},
        lengths={text: card},
        diagnostics={"findings": [finding]},
        comparison={"prompts": 1, "samples": 1, "max_new_tokens": 9, "seed": 0, "judge": text,
                    "models": [model], "findings": [text], "tests": [text],
                    "answers": [{"prompt": text, "texts": {text: text}}]},
        plan={"peak_bytes": 2**30, "parts": {text: 2**30}, "layers": 2, "recomputed_layers": 1,
              "room_bytes": 2**31, "room_is": text, "fits": True, "seconds_floor": None,
              "measured": {"peak_bytes": 2**30, "seconds_a_step": 1.5}},
        samples=[{"step": 1, "prompt": text, "policy": text, "reference": "w" * 300}],
        exports=[{"to": text, "kind": text, "base": None, "dtype": text, "gguf": {text: text},
                  "proof": {"kl": 1e-6, "gate": 1e-4, "noise": 0.0, "top1": 1.0, "greedy": 1.0,
                            "positions": 9}}],
        notes=[{"step": 3, "kind": "memorising", "text": text}],
    )  # fmt: skip
    return [hostile, _made(tmp_path / "plain", lines[:3])]


@pytest.fixture(scope="module")
def browser() -> Any:
    with browsing.chromium() as found:
        yield found


def _opened(browser: Any, path: Path, said: list[str], **options: Any) -> Any:
    opened = browser.new_page(**options)
    opened.set_default_timeout(120_000)
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(request.url))
    opened.goto(path.as_uri())
    return opened


DRAWN = """() => Object.keys(JSON.parse(document.getElementById("lora-dpo-figures").textContent))
  .map((key) => document.getElementById(key).calcdata.map(
    (trace) => [trace[0].trace.name, trace.filter((p) => p.x !== undefined || p.s > 0).length]))"""
COLOURS = """() => [
  getComputedStyle(document.querySelector(".lora-dpo")).color,
  document.getElementById("chart-0").calcdata.at(-1)[0].trace.line.color,
  document.getElementById("chart-0")._fullLayout.font.color]"""


def test_the_page_is_right_in_a_browser_and_hostile_strings_stay_text(
    browser: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    path = tmp_path / "report.html"
    found = report(_hostile(tmp_path), to=path)
    opened = _opened(browser, path, said, viewport={"width": 390, "height": 800})

    # every chart has the points of its figure, under names that show what they are
    drawn = opened.evaluate(DRAWN)
    figures = list(found.contents().figures.values())
    assert [len(chart) for chart in drawn] == [len(figure["data"]) for figure in figures]
    assert len(drawn) == 3 and all(count for chart in drawn for _, count in chart)
    lines = {name: count for name, count in drawn[0] if "least" not in name}
    assert sorted(lines.values()) == [2, 3, 29]

    # nothing of what came from data is an element, of the page or of plotly's own small HTML
    opened.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    hover = (
        "Plotly.Fx.hover(document.getElementById('chart-0'), [{curveNumber: 1, pointNumber: 3}])"
    )
    opened.evaluate(hover)
    opened.wait_for_selector("#chart-0 .hoverlayer text")
    shown = opened.evaluate("document.querySelector('#chart-0 .hoverlayer').textContent")
    assert "<img src=x onerror=pwned=4> &lt;i&gt; %{y} <b> training, mean of 5 lines" in shown
    assert opened.locator("img, .main-svg a, .main-svg tspan[style*=bold]").count() == 0
    assert opened.locator("script").count() == 3
    assert opened.evaluate("window.pwned") is None
    text = opened.evaluate("document.body.textContent")
    assert text.count("</script><script>pwned=1</script>") > 30 and "\u202e" not in text

    # it fits a phone, wide words and all, and the keyboard gets past the head
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the curves"
    opened.keyboard.press("Enter")
    assert opened.url.endswith("#curves")

    # charts follow light, dark and print, which is light
    seen = [opened.evaluate(COLOURS)]
    for media in ({"color_scheme": "dark"}, {"color_scheme": "dark", "media": "print"}):
        opened.emulate_media(**media)
        changed = f"(before) => ({COLOURS})().every((colour, i) => colour !== before[i])"
        opened.wait_for_function(changed, arg=seen[-1])
        seen.append(opened.evaluate(COLOURS))
    light, dark, printed = seen
    assert all(a != b for a, b in zip(light, dark, strict=True)) and printed == light
    own = [x for x in said if x.startswith("file:") and "report.html" in x]
    assert said == own and len(own) <= 2  # the file itself, and nothing on the console


def test_a_script_that_got_into_the_page_would_not_run(browser: Any, tmp_path: Path) -> None:
    html = report(_made(tmp_path / "run", [{"loss": 0.6, "step": 1}])).to_html()
    path = tmp_path / "report.html"
    extra = "<script>window.pwned = 1</script><img src='http://127.0.0.1:9/x' onerror='pwned = 2'>"
    path.write_text(html.replace("<main>", f"<main>{extra}"))
    said: list[str] = []
    opened = _opened(browser, path, said, viewport={"width": 1280, "height": 800})
    assert opened.evaluate("window.pwned") is None
    assert sum("Content Security Policy" in line for line in said) >= 2
    assert len(opened.evaluate(DRAWN)) == 1  # and ours does
