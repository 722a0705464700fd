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


def _report(words: str, folder: Path) -> dict[str, Any]:
    """Return what a comparison named test has written into a folder."""
    command = [sys.executable, str(COMPARE), *words.split(), "--name", "test", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "compare_trl_test.json").read_text())
    return report


def test_the_comparison_with_trl_starts_both_at_ln_2(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = "--tiny --layers 1 --steps 2 --warmup 1 --repeats 1 --accum 2 --prompt 8 --response 6"
    words += " --jitter 0.5 --runs ours,trl --profile"
    report = _report(words, tmp_path)
    facts = {"date", "machine", "versions", "settings", "pairs"}
    assert set(report) == facts | {"summary", "runs", "profiles"}
    assert report["machine"]["cpu"] and report["machine"]["cores"] >= 1
    assert str(tmp_path) not in json.dumps(report)
    assert [run["run"] for run in report["runs"]] == ["ours", "trl"]
    for run in report["runs"]:
        assert run["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert run["step_s"]["min"] <= run["step_s"]["median"] <= run["step_s"]["max"]
        assert run["cpu_s_per_pair"] > 0 and run["tokens_per_s"] > 0
        assert run["init_s"] > 0 and run["start_s"] > 0
    for found in report["profiles"].values():
        parts = found["profile"]["parts"]
        for part in ("base products", "LoRA products", "dequantisation", "attention", "head"):
            assert parts[part]["operations"] > 0, part
        assert parts["optimiser"]["s"] > 0
        whole = sum(part["s"] for part in parts.values())
        assert whole == pytest.approx(found["profile"]["step_s"], rel=1e-3)
    mine, theirs = report["runs"]
    assert mine["adapter_parameters"] == theirs["adapter_parameters"]
    ratio = report["summary"]["ours_to_trl"]["nothing recomputed"]["pairs_per_s"]
    assert ratio["ratio"] == pytest.approx(mine["pairs_per_s"] / theirs["pairs_per_s"], abs=1e-3)
    assert report["summary"]["ours_to_trl"]["all layers recomputed"] is None


def test_the_smallest_setting_and_a_stored_reference_run_and_say_what_they_took(
    tmp_path: Path,
) -> None:
    pytest.importorskip("trl")
    words = "--tiny --layers 2 --steps 1 --warmup 1 --repeats 1 --micro 2 --accum 1 --prompt 8"
    words += " --response 6 --epochs 3 --runs ours+cached,ours+gc+all+8bit+cpuembed,trl+8bit+micro1"
    words += " --trl precompute_ref_log_probs=true"
    report = _report(words, tmp_path)
    cached, smallest, theirs = report["runs"]
    assert [run["layout"]["recomputed_layers"] for run in report["runs"]] == [0, 2, 0]
    for run in (cached, theirs):  # a step and a third of the pass over its two pairs
        filled = run["reference_pass"]
        assert filled["wall_s"] > 0 and filled["pairs"] == 4
        whole = run["step_s"]["median"] + filled["wall_s"] * 2 / 4 / 3
        assert run["pairs_per_s"] == pytest.approx(2 / whole, rel=0.01)
    assert "reference_pass" not in smallest
    assert [run["optimiser"] for run in report["runs"]] == [
        "torch AdamW, 32 bits",
        "bitsandbytes AdamW, 8 bits",
        "bitsandbytes AdamW, 8 bits",
    ]
    ratios = report["summary"]["ours_to_trl"]
    assert ratios["all layers recomputed"] is None  # an approximation is compared with none
    assert ratios["best of each"]["cpu_s_per_pair"]["trl"] == "trl+8bit+micro1"


@pytest.mark.parametrize("budget", [0.001, 100.0])
def test_layers_that_a_budget_leaves_alone_are_not_counted_as_recomputed(
    tmp_path: Path, budget: float
) -> None:
    pytest.importorskip("trl")
    words = "--tiny --layers 2 --steps 1 --warmup 0 --repeats 1 --accum 1 --prompt 8 --response 6"
    words += f" --runs ours+gc --ours memory_budget_gib={budget}"
    report = _report(words, tmp_path)
    assert report["runs"][0]["layout"]["recomputed_layers"] == (2 if budget < 1 else 0)
    row = report["summary"]["runs"]["ours+gc"]
    with_all, without = (
        _flop_of_tiny(report["pairs"]["usual_tokens"]["median"], recomputed)
        for recomputed in (1, 0)
    )
    assert row["tflop_per_pair"] * 1e12 == pytest.approx(with_all if budget < 1 else without)


def _flop_of_tiny(tokens: float, recomputed: float) -> float:
    """Two layers of width 256 (4 heads, 2 of them for keys), MLP of 688, 32000 words, rank 16."""
    assert tokens == 2 * 8 + 6 + 6
    layer, mlp, words = 2 * 256 * 256 + 2 * 256 * 128, 256 * 688, 32000
    lora = 16 * (4 * 512 - 2 * 128 + 3 * (256 + 688))
    laid = 8 + 6 + 6
    seen = 14**2 - 8**2 / 2
    total = 2 * laid * (3 * (layer + 3 * mlp) + recomputed * (layer + 2 * mlp))
    total += 2 * laid * lora * (3 + recomputed) + 4 * 256 * seen * (4.5 + recomputed)
    return 2 * total + 2 * words * 256 * 12 * 3


def test_the_comparison_says_which_options_there_are() -> None:
    done = subprocess.run(
        [sys.executable, str(COMPARE), "--runs", "ours+precompute"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no option ['precompute']" in done.stderr and "trl: 8bit, fp32, gc" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--runs ours+all", "all goes with gc"),
        ("--micro 2 --accum 2 --runs trl+micro3", "3 pairs do not divide the 4 of a step"),
        ("--device cpu --runs trl+offload", "activation offloading needs a GPU"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_it_runs(words: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(COMPARE), *words.split()], capture_output=True, text=True
    )
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.parametrize("engine", ["fast", "kept"])
def test_a_point_of_the_scaling_benchmark_is_measured_beside_its_plan(engine: str) -> None:
    point = {
        "layers": 3, "width": 0.5, "prompt": 24, "response": 16, "pairs": 1, "answers": 3,
        "engine": engine, "preset": "tiny", "device": "cpu", "steps": 1,
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
    assert found["products_seconds_floor"] > 0 and found["hidden_size"] == 128
    assert found["counted_peak_mib"] < found["peak_mib"]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare_trl

    return compare_trl


def test_operations_of_an_8b_pair_are_those_of_the_performance_study(compare: Any) -> None:
    """Llama-3-8B, 512 + 2 x 512: 122.4, 86.4, 70.1 and, with a stored reference, 47.1 TFLOP."""
    way = compare.floors.Way
    ways = {
        122.4: way(shared=False, recomputed=1, head_again=True),
        93.1: way(shared=False, head_again=True),
        92.2: way(shared=True, recomputed=1),
        86.4: way(shared=True, recomputed=1, skips_last=True),
        78.2: way(shared=True, recomputed=0.5, skips_last=True),
        70.1: way(shared=True),
        47.1: way(shared=True, reference=0),
    }
    config = compare.shapes.preset_config("llama3-8b")
    for tflop, how in ways.items():
        found = compare.floors.flop(config, [(512, [512, 512])], how) / 1e12
        assert found == pytest.approx(tflop, abs=0.05), how


def test_activations_of_an_8b_pair_are_those_of_the_performance_study(compare: Any) -> None:
    """Its memory table, GB: checkpoints 0.40, kept 5.44, a layer in flight 0.40, head 0.21."""
    config = compare.shapes.preset_config("llama3-8b")
    how = {"element": 2, "chunk": 256}
    pair = [(512, [512, 512])]
    counted = compare.floors.activation_bytes
    assert counted(config, pair, recomputed=32, **how) / 1e9 == pytest.approx(0.80, abs=0.01)
    assert counted(config, pair, recomputed=0, **how) / 1e9 == pytest.approx(5.67, abs=0.05)


def test_ranges_and_names_decide_the_part_of_an_operation(compare: Any) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    parts = compare.profiling
    x, base, down = torch.ones(4, 32), torch.ones(32, 24), torch.ones(32, 8)
    q = torch.ones(1, 2, 4, 8)

    def head() -> torch.Tensor:
        return x @ base

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        x @ base
        x @ down
        parts.ranged(head, "head")()
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        x * 2
    seen = {(e.name, parts.part_of(e, rank=8)) for e in found.events()}
    products = {part for name, part in seen if name == "aten::mm"}
    assert products == {"base products", "LoRA products", "head"}
    assert {part for name, part in seen if "attention" in name} == {"attention"}
    assert ("aten::mul", "elementwise") in seen


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
