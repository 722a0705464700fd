"""Two short runs on one tiny base, and one that never moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.sealing import seal


@pytest.fixture(scope="session")
def settings(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {
        "objective": {"name": "dpo", "beta": 0.2},
        "model": {"base": str(tiny_model)},
        "lora": {"rank": 4},
        "data": {"train": str(path), "eval_fraction": 0.25, "max_length": 128},
        "train": {
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "max_steps": 3,
            "use_cpu": True,
        },
        "output": {"dir": "none", "diagnose": False},
    }


@pytest.fixture(scope="session")
def first(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "first"
    return train({**settings, "output": {"dir": str(out), "diagnose": False}})


@pytest.fixture(scope="session")
def second(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another objective and another rank, so that nothing of the first can stand in for it."""
    out = tmp_path_factory.mktemp("runs") / "second"
    changed = {"objective": {"name": "simpo"}, "lora": {"rank": 8}}
    return train({**settings, **changed, "output": {"dir": str(out), "diagnose": False}})


@pytest.fixture(scope="session")
def unmoved(first: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first run with its adapter set to zero: the policy is its reference."""
    folder = tmp_path_factory.mktemp("runs") / "unmoved"
    shutil.copytree(first.folder, folder)
    weights = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()},
        weights,
        metadata={"format": "pt"},
    )
    seal(folder / "adapter", "adapter")
    return Run.open(folder)
