"""What faults are tried on: a tiny model, preferences, settings of all kinds, and real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 24, 4  # of a run; between two of its checkpoints and evaluations

# Settings that change what a checkpoint has to hold. Beside each other they cover every scheduler
# that reads more than the step, and every state that outlives a step. The schedules and optimisers
# that are left are resumed without kills in tests/test_schedules_and_optimisers.py.
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation over 3, dropout, cosine": {
        "train.gradient_accumulation_steps": 3,
        "lora.dropout": 0.2,
    },
    "packing by tokens, linear": {
        "train.max_tokens_per_batch": 160,
        "train.lr_scheduler_type": "linear",
    },
    "stored reference, constant with warm-up": {
        "train.cache_reference": True,
        "train.lr_scheduler_type": "constant_with_warmup",
        "data.train": "many.jsonl",
    },
    "KTO, polynomial": {
        "objective.name": "kto",
        "train.lr_scheduler_type": "polynomial",
    },
    "KTO's running baseline, inverse square root": {
        "objective.name": "kto_running",
        "train.lr_scheduler_type": "inverse_sqrt",
        "lora.dropout": 0.1,
    },
    "BCO's running baseline, cosine with restarts": {
        "objective.name": "bco_pair_running",
        "train.lr_scheduler_type": "cosine_with_restarts",
    },
    "reference that moves (hard)": {
        "train.reference_update": "hard",
        "train.reference_update_steps": 3,
    },
    "reference that moves (soft), dropout": {
        "train.reference_update": "soft",
        "train.reference_update_steps": 5,
        "lora.dropout": 0.1,
    },
    "8-bit AdamW, rank 64": {"train.optim": "adamw_8bit", "lora.rank": 64},
    "rate that follows evaluations (plateau), 8-bit Lion": {
        "train.lr_scheduler_type": "reduce_lr_on_plateau",
        "train.lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 10.0},
        "train.optim": "lion_8bit",
        "lora.rank": 64,
    },
    "rate that follows evaluations of epochs (greedy), 8-bit AdEMAMix": {
        "train.lr_scheduler_type": "greedy",
        "train.lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "warmup": 1, "min_lr": 1e-5},
        "train.eval_strategy": "epoch",
        "data.eval_fraction": 0.333,  # 8 steps an epoch: checkpoints fall on its end
        "train.optim": "ademamix_8bit",
        "lora.rank": 64,
    },
    "warm-up, stable, decay; last rate above nothing": {
        "train.lr_scheduler_type": "warmup_stable_decay",
        "train.lr_scheduler_kwargs": {"num_decay_steps": 8, "min_lr_ratio": 0.1},
    },
    "best model at the end, samples, diagnosis": {
        "train.load_best_model_at_end": True,
        "train.learning_rate": 0.05,
        "output.samples": 2,
        "output.sample_tokens": 8,
        "output.diagnose": True,
    },
}

# What no run can repeat: seconds, what follows from them, and memory of a process.
UNREPEATABLE = ("runtime", "per_second", "peak_gib")


@dataclass(frozen=True)
class World:
    """A folder with a model and data, and the random numbers of a campaign."""

    folder: Path
    random: random.Random

    @classmethod
    def make(cls, folder: Path, seed: int) -> World:
        """Write model and data."""
        from tests.conftest import write_tiny_model

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        write_tiny_model(folder / "model")
        numbers = random.Random(seed)
        for name, count in (("few.jsonl", 48), ("many.jsonl", 700)):
            lines = (json.dumps(_pair(numbers, i)) for i in range(count))
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return cls(folder, numbers)

    def config(self, **changes: Any) -> dict[str, Any]:
        """Return a config with changes, whose names have ``.`` between section and key."""
        values: dict[str, Any] = {
            "objective": {"name": "dpo"},
            "model": {"base": str(self.folder / "model")},
            "lora": {"rank": 4},
            "data": {"train": "few.jsonl", "eval_fraction": 0.2, "max_length": 128},
            "train": {
                "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                "per_device_eval_batch_size": 8, "max_steps": STEPS, "learning_rate": 5e-3,
                "logging_steps": 1, "eval_steps": EVERY, "save_steps": EVERY,
                "save_total_limit": 2, "use_cpu": True,
            },
            "output": {"diagnose": False, "samples": 0},
        }  # fmt: skip
        for name, value in changes.items():
            section, _, key = name.partition(".")
            values[section][key] = value
        values["data"]["train"] = str(self.folder / values["data"]["train"])
        return values

    def trial(self, name: str, settings: dict[str, Any]) -> Trial:
        """Return a run that has not begun, in folders of its own."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        store = {}
        if settings.get("train.cache_reference"):
            store = {"train.reference_cache_dir": str(folder / "store")}
        values = self.config(**settings, **store, **{"output.dir": str(folder / "run")})
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return Trial(folder, path, dict(settings))


@dataclass
class Trial:
    """A run, its caches, and what its processes printed."""

    folder: Path
    path: Path
    settings: dict[str, Any]
    starts: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def log(self) -> Path:
        """What the newest process printed."""
        return self.folder / f"log-{self.starts}.txt"

    def train(self, *options: str) -> BaseProcess:
        """Start ``lora-dpo train``."""
        return self.command("train", str(self.path), *options)

    def command(self, *words: str) -> BaseProcess:
        """Start ``lora-dpo`` with these words."""
        self.starts += 1
        return start(words, self.log, {"LORA_DPO_CACHE": str(self.cache), **self.environment})

    def ended(self, process: BaseProcess, code: int = 0, seconds: float = 300) -> str:
        """Wait for a process, hold its exit code, and return what it printed."""
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"{self.log}: did not end in {seconds:.0f} s")
        text = self.log.read_text(encoding="utf-8")
        assert process.exitcode == code, f"{self.log}: exit code {process.exitcode}\n{text[-3000:]}"
        assert "Traceback" not in text, f"{self.log}\n{text[-3000:]}"
        return text


def start(words: tuple[str, ...], log: Path, environment: dict[str, str]) -> BaseProcess:
    """Start the command as a process of its own, forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    process = context.Process(target=_command, args=(words, str(log), environment))
    process.start()
    return process


def _command(words: tuple[str, ...], log: str, environment: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    sys.argv = ["lora-dpo", *words]
    from lora_dpo.cli import main

    main()


def kill_when(process: BaseProcess, happened: Callable[[], bool], delay: float) -> bool:
    """Send SIGKILL some seconds after something has happened; False where the process ended before."""
    while process.is_alive() and not happened():
        time.sleep(0.001)
    time.sleep(delay)
    if not process.is_alive():
        process.join()
        return False
    process.kill()
    process.join()
    return process.exitcode == -9


def _pair(numbers: random.Random, i: int) -> dict[str, str]:
    words = ["sun", "rain", "yes", "no", "tree", "house", "very", "late"]

    def text(fewest: int, most: int) -> str:
        return " ".join(numbers.choices(words, k=numbers.randint(fewest, most)))

    return {
        "prompt": f"{i}: {text(1, 4)}?",
        "chosen": f" {text(1, 6)}.",
        "rejected": f" {text(1, 6)}!",
    }
