"""What is checked before weights load and before anything is written or replaced."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dpo.config import Config
from lora_dpo.data import Tokenised
from lora_dpo.errors import ConfigError, OutputError
from lora_dpo.policy import adapter_folder
from lora_dpo.positions import check_positions, longest_of_its_own
from lora_dpo.smoking import SMOKE_FILE
from lora_dpo.stepping import longest_row
from lora_dpo.store import fingerprint

# Settings that may differ between a checkpoint and the run that resumes from it.
_FREE_KEYS = {
    "output",
    "train.report_to",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.run_name",
    "train.cache_reference",
    "train.reference_cache_dir",
    "train.shard_base",
    "train.on_nonfinite",
    # their product with the number of processes stands beside, as rows_a_step; no more depends on them but
    # what dropout draws, of which a resumed run tells
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "data.cache_dir",
}


# A file that `export` alone writes. An adapter's config is no sign of one: every run has its own.
_OF_AN_EXPORT = ("export_proof.json", SMOKE_FILE)


def check_target(run: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a target that would cost a run or a folder that no export wrote."""
    here, there = run.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"{target}: is, holds or lies inside the run {run}; choose another.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise OutputError(
            f"{target}: exists already and is not empty; choose another, or overwrite it."
        )
    if not is_export(target):
        raise OutputError(f"{target}: holds something else than an export; it is not overwritten.")


def is_export(folder: Path) -> bool:
    """Return whether a folder is one that ``export`` wrote."""
    return any((folder / name).is_file() for name in _OF_AN_EXPORT)


def check_context(config: Config, base: Any) -> None:
    """Hold that rows fit the model's positions, and that the adapter to start from is there."""
    if config.model.adapter is not None:
        adapter_folder(config.model.adapter)
    longest = getattr(base.get_text_config(), "max_position_embeddings", None)
    if longest and config.data.max_length > longest:
        raise ConfigError(
            f"data.max_length: got {config.data.max_length}, but the model has {longest} positions; "
            f"set data.max_length to at most {longest}."
        )


def check_lengths(base: Any, *sets: Tokenised | None) -> None:
    """Hold that no row of these sets would change the positions of the rows beside it.

    Args:
        base: the config of the model.
        sets: tokenised rows.
    """
    if longest_of_its_own(base) is not None:
        check_positions(base, max(longest_row(rows.rows) for rows in sets if rows))


@contextmanager
def settings_of_the_library() -> Iterator[None]:
    """Errors of transformers about its own settings are the user's to correct."""
    try:
        yield
    except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())[:500]}") from error


@contextmanager
def only_numbers() -> Iterator[None]:
    """A checkpoint's files of the optimiser and the like hold numbers; what else is in one is refused."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise OutputError(
            f"the checkpoint: a file in it holds more than numbers, and was not loaded ({reason}). Resume "
            "from another one, or start afresh in another output.dir."
        ) from None


def check_scaler(checkpoint: Path, scaler: Any) -> None:
    """Refuse a checkpoint with the state of a gradient scaler where none is used.

    Raises:
        OutputError: says what goes on from it.
    """
    if (checkpoint / "scaler.pt").is_file() and scaler is None:
        raise OutputError(
            f"{checkpoint}: was written in float16 with a scale for gradients, and this run computes "
            "without one; resume on a card and with a model.compute_dtype as before."
        )


def checkpoint_facts(config: Config) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it must share, a fingerprint a section."""
    values = config.to_dict()
    for key in _FREE_KEYS:
        section, _, name = key.partition(".")
        values[section].pop(name, None) if name else values.pop(section)
    return {section: fingerprint(part)[:16] for section, part in values.items()}


def check_trackers(asked: str | Sequence[str] | None) -> None:
    """Refuse a tracker that is not installed: the library would notice once the weights are loaded.

    Raises:
        ConfigError: names each, and the package.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = {*get_available_reporting_integrations(), *_UNLISTED}
    problems = [
        f"train.report_to: {name} is not installed; install it (pip install {_PACKAGES.get(name, name)}), "
        "or leave it out: metrics.jsonl holds every figure in any case."
        for name in ([asked] if isinstance(asked, str) else asked or ())
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)


_UNLISTED = ("flyte",)  # the library has it and does not say whether it is installed
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow"}
