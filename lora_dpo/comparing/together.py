"""Several runs on one base: what they must share, and their adapters beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dpo.errors import ConfigError
from lora_dpo.policy import ADAPTER, MOVING_FILE, add_adapter
from lora_dpo.run_folder import Run
from lora_dpo.store import file_sha256

_OF_MODEL = ("revision", "quantisation", "double_quantisation", "compute_dtype", "attention")
_NO_REFERENCE = "the base with adapters disabled"


def check_together(runs: Sequence[Run], checkpoint: str) -> None:
    """Hold that all runs can be compared on one base in memory, before any weight loads.

    Raises:
        ConfigError: no run, one given twice, or settings that differ, each named.
        OutputError: a checkpoint that a run does not have.
    """
    if not runs:
        raise ConfigError("compare: give at least one run.")
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError("compare: the same run is given twice; give each once.")
    for run in runs:
        run.adapter_folder(checkpoint)
    if len(runs) == 1:
        return
    first, *others = [_facts(run, checkpoint) for run in runs]
    problems = [
        f"compare: {name} of {run.folder} is {facts[name]!r}, of {runs[0].folder} {first[name]!r}; "
        "runs on one base must share it. Compare each with its own reference."
        for run, facts in zip(runs[1:], others, strict=True)
        for name in first
        if facts[name] != first[name]
    ]
    if problems:
        raise ConfigError(problems)


def load_together(runs: Sequence[Run], checkpoint: str) -> Any:
    """Load the base once, with each run's adapter under the name that ``adapters_of`` gives it."""
    policy = runs[0].load_policy(checkpoint)
    for name, run in zip(adapters_of(runs)[1:], runs[1:], strict=True):
        add_adapter(policy, run.adapter_folder(checkpoint), name)
    return policy


def adapters_of(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run's adapter in the policy of ``load_together``."""
    return [ADAPTER, *(f"run_{place}" for place in range(2, len(runs) + 1))]


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a distinct name for each run, for people; that of its folder where there are several."""
    if len(runs) == 1:
        return ["policy"]
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names) or "reference" in names:
        names = [f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}" for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder.resolve()) for run in runs]
    return names


def _facts(run: Run, checkpoint: str) -> dict[str, Any]:
    model, data = run.config.model, run.config.data
    base = Path(model.base)
    template = data.chat_template
    return {
        "model.base": str(base.resolve()) if base.is_dir() else model.base,
        **{f"model.{name}": getattr(model, name) for name in _OF_MODEL},
        "the chat template": file_sha256(Path(template)) if template else "the tokenizer's",
        "data.template_arguments": dict(data.template_arguments),
        "the form of its rows": "chats" if run.is_chat else "texts",
        "the reference": _reference(run, checkpoint),
    }


def _reference(run: Run, checkpoint: str) -> str:
    if (run.adapter_folder(checkpoint) / MOVING_FILE).is_file():
        return f"one that moved in {run.folder}"
    weights = run.folder / "reference" / "adapter_model.safetensors"
    if not weights.is_file():
        return _NO_REFERENCE
    return f"a starting adapter ({file_sha256(weights)[:12]})"
