"""How the library is made to see one batch an optimiser step: its arguments, and the rows of one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from lora_dpo.arguments import REFUSED
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.objectives import BoundObjective

# Refused from Python too: each would act on the policy and not on its reference, or on nothing.
_NOISY = (
    "neftune_noise_alpha",
    "label_smoothing_factor",
    "auto_find_batch_size",
    "use_liger_kernel",
    "save_only_model",
)


def refuse_objective(bound: BoundObjective) -> None:
    if bound.data != "paired":
        raise ConfigError(
            f"objective {bound.name!r}: needs unpaired data, which is not trained on yet."
        )
    if bound.couples_rows:
        raise ConfigError(
            f"objective {bound.name!r}: couples the rows of a batch, and a step is split into "
            "micro-batches here; such objectives are not trained yet."
        )


def tokenised(data: Any, tokenizer: Any, max_length: int) -> Tokenised:
    if isinstance(data, Tokenised):
        return data
    if tokenizer is None:
        raise DataError("PreferenceTrainer: data that is not tokenised needs tokenizer=...")
    return tokenise(load_preferences(data, kind="paired"), tokenizer, max_length=max_length)


def one_batch_a_step(args: TrainingArguments, policy: PeftModel) -> TrainingArguments:
    """Return a copy whose batch is a whole step, with the mixed precision of the policy."""
    refused = [key for key in _NOISY if getattr(args, key, None)]
    if refused:
        raise ConfigError([f"args.{key}: not a setting here; {REFUSED[key]}." for key in refused])
    args = copy.copy(args)
    args._n_gpu = min(args._n_gpu, 1)  # more cards are more processes, never DataParallel
    args.ddp_find_unused_parameters = False  # every adapter gets gradient in every step
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.save_total_limit = None  # ours runs after the manifest is written
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False
    args.label_names = []
    args.dataloader_pin_memory = (
        False  # rows travel as lists; tensors are made a micro-batch at a time
    )
    half = policy.get_input_embeddings().weight.dtype == torch.float16
    if half and args.device.type == "cuda":
        # for the gradient scaler alone; forward() chooses the arithmetic itself
        args.fp16, args.mixed_precision = True, "fp16"
    return args


@dataclass(frozen=True)
class Rows:
    """Rows on their way through the library, which would walk through every token of a list."""

    rows: list[dict[str, Any]]


def keep_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The library's collator: rows are padded later, a micro-batch at a time."""
    return {"rows": Rows(rows)}


def row_length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def row_tokens(row: dict[str, Any]) -> int:
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def is_finite(value: float) -> bool:
    return abs(value) != float("inf") and value == value
