"""DeepSpeed's ZeRO 1 and 2, as accelerate starts it: gradients and optimiser state of adapters dealt out.

The base stays whole in every process. The engine is told which micro-batch ends a step, and makes the update
when the trainer has looked at what the step found. Of its checkpoints, which are pickles, none is written
or read: each process keeps the state of its own share.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_dpo.errors import ConfigError
from lora_dpo.ranks import is_engine, processes, rank
from lora_dpo.stepping import WholeSteps
from lora_dpo.store import read_json, write_json


def check_zero(settings: Mapping[str, Any], *, float16: bool, skips: bool) -> None:
    """Refuse of DeepSpeed's settings what would train something else than was asked, or is not tried.

    Args:
        settings: DeepSpeed's, as accelerate holds them.
        float16: whether the run scales its gradients.
        skips: whether steps without a number are left out.

    Raises:
        ConfigError: names each.
    """
    zero = settings.get("zero_optimization") or {}
    stage, problems = zero.get("stage"), []
    if processes() < 2:
        problems.append("deepspeed: one process alone has nothing to deal out; start it without.")
    if stage not in (1, 2):
        problems.append(
            f"deepspeed: zero_stage {stage}; expected 1 or 2, which deal out what belongs to adapters. A base "
            "that is too large for one card is dealt out by train.shard_base: true, without DeepSpeed."
        )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            problems.append(f"deepspeed: {name} is not handled; leave it out.")
    for name in ("fp16", "bf16"):
        if (settings.get(name) or {}).get("enabled") in (True, "true"):
            problems.append(
                f"deepspeed: {name} would round the adapters to 16 bits; set mixed_precision: 'no', and "
                "model.compute_dtype says how the model computes."
            )
    if float16:
        problems.append(
            "model.compute_dtype: float16 scales gradients, which DeepSpeed would do on its own; set bfloat16 "
            "or float32."
        )
    if skips:
        problems.append("train.on_nonfinite: skip is not handled with DeepSpeed; set stop.")
    problems += [
        f"deepspeed: {name} belongs to the run's config (train); leave it out."
        for name in ("optimizer", "scheduler")
        if name in settings
    ]
    if problems:
        raise ConfigError(problems)


class ZeroTrainer(WholeSteps):
    """The library's trainer, with our own way through a step of DeepSpeed's engine and its state."""

    accelerator: Any
    steps: Any
    lr_scheduler: Any
    dealt_among: int | None = None  # processes that share the state of the optimiser

    def create_accelerator_and_postprocess(self) -> None:
        """Keep the library's own way with DeepSpeed, whose checkpoints are pickles, out of the run."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None:
            return
        settings = plugin.deepspeed_config
        skips = self.steps.on_nonfinite == "skip"
        check_zero(settings, float16=bool(self.args.fp16), skips=skips)
        self.is_deepspeed_enabled = False
        self.dealt_among = processes()
        # a batch of the engine is what one process hands it at a time, however many rows that has
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        settings |= {"train_batch_size": processes(), "gradient_clipping": self.args.max_grad_norm}

    def ways_back(self, model: Any) -> tuple[Callable[[Tensor], Any], Callable[[nn.Module], Any]]:
        """Return what takes a loss backwards, and a context for micro-batches that do not end a step."""
        if not is_engine(model):
            return self.accelerator.backward, self.accelerator.no_sync
        return model.backward, _within_a_step

    def update(self, model: Any) -> None:
        """Make the update of an engine; without one the library makes it."""
        if is_engine(model):
            model.step()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_engine(self.model_wrapped):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # whichever process comes first
        _write_share(_share_of(self.model_wrapped), _place(output_dir))
        if self.args.should_save:
            write_json(Path(output_dir, _SCHEDULE), self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_engine(self.model_wrapped):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        _read_share(_share_of(self.model_wrapped), _place(checkpoint))
        self.lr_scheduler.load_state_dict(read_json(Path(checkpoint, _SCHEDULE)))


_SCHEDULE = "scheduler.json"


@contextlib.contextmanager
def _within_a_step(engine: Any) -> Iterator[None]:
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)


def _share_of(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimiser of the parameters that this process updates."""
    own: torch.optim.Optimizer = engine.optimizer.optimizer
    return own


def _place(folder: str) -> Path:
    return Path(folder, f"optimizer-{rank()}-of-{processes()}.safetensors")


def _write_share(optimiser: torch.optim.Optimizer, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    found = optimiser.state_dict()
    for number, state in found["state"].items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{number}.{name}"] = value
    groups = json.dumps(found["param_groups"])
    save_file(tensors, path, metadata={"plain": json.dumps(plain), "groups": groups})


def _read_share(optimiser: torch.optim.Optimizer, path: Path) -> None:
    with safe_open(path, framework="pt") as stored:
        about = stored.metadata()
        values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**values, **json.loads(about["plain"])}.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": json.loads(about["groups"])})
