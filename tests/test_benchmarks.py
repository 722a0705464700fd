"""The comparison with TRL runs and measures what it says; no time is asserted."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("engine", ["fast", "kept"])
def test_a_point_of_the_scaling_benchmark_is_measured_beside_its_plan(engine: str) -> None:
    point = {
        "layers": 3, "prompt": 24, "response": 16, "pairs": 1, "answers": 3, "engine": engine,
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


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_trl

    return compare_trl


def test_operations_of_an_8b_pair_are_those_of_the_performance_study(compare: Any) -> None:
    """Llama-3-8B, 512 + 2 x 512: 122, 86, 70 and, with a stored reference, 47 TFLOP (its tables)."""
    args = compare.parse(
        ["--preset", "llama3-8b", "--device", "cpu", "--runs", "trl+gc,ours+gc,ours"]
    )
    pairs = compare.shapes.random_pairs(1, 1000, 512, 512, 0.0, 0)
    found = {name: value / 1e12 for name, value in compare.operations(args, pairs).items()}
    assert found == {
        "trl+gc": pytest.approx(122, rel=0.01),
        "ours+gc": pytest.approx(86, rel=0.01),
        "ours": pytest.approx(70, rel=0.01),
    }
    config, how = compare.model_config(args), {"rank": 16, "epochs": 10**9}
    stored = compare.shapes.flop(config, pairs, "ours", ["precompute"], **how)
    assert stored / 1e12 == pytest.approx(47, rel=0.01)


@pytest.mark.parametrize("most", [20, 33, 700, 1301, 10**6])
def test_the_search_ends_within_a_sixteenth_of_the_longest_pair_that_fits(
    compare: Any, tmp_path: Path, most: int
) -> None:
    words = "--tiny --longest --mem-cap-gib 1 --prompt 8 --response 16"
    args = compare.parse(words.split())

    def run(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
        pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
        longer = len(pair["prompt_ids"]) > most
        peak = {"memory_gib": {"peak": 1.5}} if longer and most % 2 else {"memory_gib": {"peak": 1}}
        return {"error": "out of memory: no"} if longer and not most % 2 else peak

    args.micro = args.accum = args.steps = args.warmup = 1
    found = compare.longest(args, "ours", tmp_path, run)
    positions = compare.model_config(args).max_position_embeddings
    if most > positions:
        assert found["limited_by"] == "positions of the model"
        assert found["prompt"] == positions // 3
    else:
        assert most * 15 / 16 - 1 <= found["prompt"] <= most
        assert found["response"] == 2 * found["prompt"] and found["limited_by"] == "memory"


def test_the_search_needs_a_cap() -> None:
    done = subprocess.run(
        [sys.executable, str(COMPARE), "--tiny", "--longest"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--longest: give --mem-cap-gib" in done.stderr
