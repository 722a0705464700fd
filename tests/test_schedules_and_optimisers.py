"""Every schedule and every optimiser that runs here: interrupted and resumed, bit for bit the same.

A schedule that follows evaluations (``reduce_lr_on_plateau``, ``greedy``) and an optimiser that stores
8-bit moments have states that no other test comes by. A name that cannot run here is skipped with its
reason. Kills of real processes under some of them are the campaign's: ``tests/faults/world.py``.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lora_dpo.arguments import build_arguments
from lora_dpo.callbacks import EndCallback
from lora_dpo.config import LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.policy import load_policy
from lora_dpo.trainer import PreferenceTrainer
from tests.faults.checks import numbers

STEPS, CUT, EVERY = 8, 5, 2  # of a run; where it is interrupted, in mid-epoch; between evaluations
# In make test; the others are for make slow.
QUICK = {"reduce_lr_on_plateau", "greedy", "ademamix_8bit"}
OF_A_SCHEDULE: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 2},
    "warmup_stable_decay": {"num_decay_steps": 6},
    # so impatient that the rate moves within the run
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 10.0},
    "greedy": {"patience": 0, "factor": 0.5, "smooth": True, "window_size": 2, "warmup": 1},
}
# Optimisers of packages that this project does not bring, or of hardware that is not here.
NOT_HERE = {
    "adamw_torch_xla": "torch_xla", "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx", "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao",
    "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free_radam": "schedulefree", "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree", "stable_adamw": "optimi",
    **{n.value: "galore_torch" for n in OptimizerNames if n.value.startswith("galore")},
    **{n.value: "apollo_torch" for n in OptimizerNames if n.value.startswith("apollo")},
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    return tokenise(
        load_preferences(pairs[:8]), AutoTokenizer.from_pretrained(tiny_model), max_length=128
    )


def _trained(
    model: Path, rows: Tokenised, folder: Path, *, stop: int | None = None, resume: bool = False,
    rank: int = 4, **changes: Any,
) -> PreferenceTrainer:  # fmt: skip
    values: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 8, "max_steps": STEPS, "learning_rate": 1e-2,
        "warmup_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": EVERY,
        "save_strategy": "steps", "save_steps": 100, "use_cpu": True, "seed": 5, **changes,
    }  # fmt: skip
    torch.manual_seed(11)
    trainer = PreferenceTrainer(
        load_policy(model, lora=LoraConfig(rank=rank, dropout=0.1)),
        args=build_arguments(values, output_dir=str(folder), evaluates=True),
        train_data=rows,
        eval_data=rows,
    )
    trainer.write_metrics_to(folder / "metrics.jsonl")
    if stop is not None:
        trainer.add_callback(EndCallback(stop))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def _weights(trainer: PreferenceTrainer) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for n, p in trainer.model.named_parameters() if ".default." in n]
    )


def _same_end(
    model: Path, rows: Tokenised, folder: Path, **changes: Any
) -> tuple[list[dict[str, Any]], PreferenceTrainer]:
    whole = _trained(model, rows, folder / "whole", **changes)
    _trained(model, rows, folder / "cut", stop=CUT, **changes)
    resumed = _trained(model, rows, folder / "cut", resume=True, **changes)
    ours, theirs = (numbers(folder / name / "metrics.jsonl") for name in ("cut", "whole"))
    assert ours == theirs
    assert torch.equal(_weights(resumed), _weights(whole))
    shutil.rmtree(folder)
    return theirs, resumed


def _cases(names: Iterable[str]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in QUICK else slow) for n in names]


@pytest.mark.parametrize("name", _cases(kind.value for kind in SchedulerType))
def test_a_run_of_any_schedule_that_is_resumed_is_the_uninterrupted_one(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, name: str
) -> None:
    further = {"lr_scheduler_kwargs": OF_A_SCHEDULE[name]} if name in OF_A_SCHEDULE else {}
    lines, _ = _same_end(tiny_model, rows, tmp_path / "runs", lr_scheduler_type=name, **further)
    rates = {line["learning_rate"] for line in lines if "learning_rate" in line}
    assert (len(rates) > 1) == (name != "constant"), rates
    late = {line["learning_rate"] for line in lines if line["step"] > CUT and "loss" in line}
    assert (len(late) > 1) == (name not in ("constant", "constant_with_warmup")), late


# On a CPU nothing is paged: bitsandbytes says so, and keeps the same moments in ordinary memory.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", _cases(kind.value for kind in OptimizerNames))
def test_a_run_of_any_optimiser_that_is_resumed_is_the_uninterrupted_one(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, name: str
) -> None:
    """Rank 64: bitsandbytes keeps moments in 8 bits from 4096 weights of a tensor on."""
    package = NOT_HERE.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} needs {package}, which is not installed")
    changes = {"optim": name, "rank": 64, "learning_rate": 1e-3}
    lines, trainer = _same_end(tiny_model, rows, tmp_path / "runs", **changes)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS and len(set(losses)) > STEPS // 2
    states: Any = trainer.optimizer.state.values()
    bytes_alone = any(value.dtype == torch.uint8 for state in states for value in tensors(state))
    assert bytes_alone == name.endswith("8bit")


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    """Return what an optimiser keeps of one weight."""
    return [value for value in state.values() if isinstance(value, torch.Tensor)]
