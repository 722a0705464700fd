"""The comparison with TRL runs and measures what it says; no time is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPARE = ROOT / "benchmarks" / "compare_trl.py"


def test_the_comparison_with_trl_starts_both_at_ln_2(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = "--tiny --layers 1 --steps 2 --warmup 1 --repeats 1 --accum 2 --prompt 8 --response 6"
    words += f" --jitter 0.5 --runs ours,trl --name test --out {tmp_path}"
    done = subprocess.run(
        [sys.executable, str(COMPARE), *words.split()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "compare_trl_test.json").read_text())
    assert set(report) == {"date", "machine", "versions", "settings", "pairs", "summary", "runs"}
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1
    assert str(tmp_path) not in json.dumps(report)
    assert [run["run"] for run in report["runs"]] == ["ours", "trl"]
    for run in report["runs"]:
        assert run["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert run["step_s"]["min"] <= run["step_s"]["median"] <= run["step_s"]["max"]
        assert run["cpu_s_per_pair"] > 0 and run["tokens_per_s"] > 0
    mine, theirs = report["runs"]
    assert mine["adapter_parameters"] == theirs["adapter_parameters"]
    ratio = report["summary"]["ours_to_trl"]["no checkpointing"]["pairs_per_s"]
    assert ratio["ratio"] == pytest.approx(mine["pairs_per_s"] / theirs["pairs_per_s"], abs=1e-3)
    assert report["summary"]["ours_to_trl"]["checkpointing"] is None


def test_the_comparison_says_which_options_there_are() -> None:
    done = subprocess.run(
        [sys.executable, str(COMPARE), "--runs", "ours+precompute"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no option ['precompute']" in done.stderr and "trl: fp32, gc" in done.stderr


def test_a_point_of_the_scaling_benchmark_is_measured_beside_its_plan() -> None:
    point = {
        "layers": 3, "prompt": 24, "response": 16, "pairs": 1, "answers": 3, "engine": "fast",
        "preset": "tiny", "device": "cpu", "steps": 1,
    }  # fmt: skip
    script = ROOT / "benchmarks" / "scaling.py"
    done = subprocess.run(
        [sys.executable, str(script), "--point", json.dumps(point)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["rows"] == 2 and found["tokens"] == 24 + 3 * 15  # the prompt once, no last tokens
    assert found["planned_peak_mib"] == pytest.approx(found["peak_mib"], rel=0.1)
    assert found["products_seconds_floor"] > 0
