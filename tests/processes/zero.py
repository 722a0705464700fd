"""``make zero``: two processes under accelerate's DeepSpeed train what two train without it.

Not collected by default, and skipped where DeepSpeed is not installed (``pip install deepspeed``).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.processes.running import called, free_port, together, torchrun
from tests.processes.test_processes import _adapters_near, _near
from tests.processes.worker import Case, write_plan

pytest.importorskip("deepspeed")

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CASES = [
    Case("dpo", "dpo"),
    Case("adam", "dpo", arguments=ADAM),
    Case("split", "dpo", arguments={**ADAM, **SPLIT}),
    Case("coupled", "aot", trainer={"max_tokens_per_batch": 90}),
    Case("baseline", "bco", arguments=ADAM),
    Case("no reference", "simpo", arguments=ADAM),
    Case("moves", "dpo", arguments=ADAM, moves="soft"),
    Case("unclipped", "dpo", arguments={**ADAM, "max_grad_norm": 0.0}),
]


def _environment(stage: int) -> dict[str, str]:
    """Return what accelerate's launcher tells its processes."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def _under_deepspeed(
    stage: int, cases: list[Case], model: Path, pairs: Any, out: Path
) -> list[dict[str, Any]]:
    out.mkdir(parents=True, exist_ok=True)
    write_plan(out / "plan.json", cases, model, pairs)
    command = torchrun("tests.processes.worker", str(out / "plan.json"), str(out))
    ended = called(command, **_environment(stage))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads((out / f"results-{number}.json").read_text()) for number in range(2)]


@pytest.fixture(scope="module")
def without(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("without")
    return together(CASES, tiny_model, pairs, folder), folder


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_what_two_processes_train_without_it(
    without: Any, tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path, stage: int
) -> None:
    expected, folder = without
    found = _under_deepspeed(stage, CASES, tiny_model, pairs, tmp_path)
    for case in CASES:
        assert found[0][case.name] == found[1][case.name]
        _near(found[0][case.name], expected[0][case.name], 1e-4)
        assert found[0][case.name]["held_out"] == expected[0][case.name]["held_out"]
        ours, theirs = (place / f"{case.name}.safetensors" for place in (tmp_path, folder))
        _adapters_near(ours, theirs)


def test_the_optimisers_state_is_dealt_out_and_a_resume_goes_on_bit_for_bit(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    saves = {**ADAM, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = Case("whole", "dpo", arguments=saves)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    first = _under_deepspeed(2, [whole], tiny_model, pairs, tmp_path)
    shares = [load_file(checkpoint / f"optimizer-{number}-of-2.safetensors") for number in range(2)]
    sizes = [sum(value.numel() for value in share.values()) for share in shares]
    adapter = sum(v.numel() for v in load_file(checkpoint / "adapter_model.safetensors").values())
    assert sizes[0] == pytest.approx(sizes[1], abs=64)
    assert sum(sizes) == pytest.approx(2 * adapter, abs=256)  # two moments a weight, padding beside
    again = replace(whole, resume=str(checkpoint))
    second = _under_deepspeed(2, [again], tiny_model, pairs, tmp_path / "again")
    assert second[0]["whole"]["logs"] == first[0]["whole"]["logs"]
    ours, theirs = (place / "whole.safetensors" for place in (tmp_path / "again", tmp_path))
    assert ours.read_bytes() == theirs.read_bytes()


def test_steps_that_are_skipped_are_refused(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    case = Case("x", "dpo", trainer={"on_nonfinite": "skip"})
    for result in _under_deepspeed(2, [case], tiny_model, pairs, tmp_path):
        assert "skip is not handled" in result["x"]["error"]


def test_accelerate_starts_it_from_the_config_that_is_shipped(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = {
        "model": {"base": str(tiny_model)},
        "data": {"train": str(data), "max_length": 128, "eval_fraction": 0.25},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "save_steps": 2,
        },
        "output": {"dir": str(tmp_path / "run"), "diagnose": False},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    shipped = str(ROOT / "configs" / "accelerate" / "zero2.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", shipped]
    command += ["--main_process_port", str(free_port()), "-m", "lora_dpo", "train", str(config)]
    ended = called(command)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    results = json.loads((tmp_path / "run" / "run.json").read_text())
    assert results["processes"] == 2 and "held_out" in results
    assert not list((tmp_path / "run").rglob("*global_step*"))  # nothing of DeepSpeed's own
