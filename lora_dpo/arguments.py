"""The ``train`` section: any field of ``transformers.TrainingArguments``, checked, with our defaults.

``per_device_train_batch_size`` is the rows of a micro-batch and its product with
``gradient_accumulation_steps`` the rows of an optimiser step, as users know them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lora_dpo.config.plain import given
from lora_dpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Fields of TrainingArguments that would be ignored here, or would change the mathematics unseen.
REFUSED = {
    "output_dir": "set output.dir",
    "overwrite_output_dir": "a run never overwrites another; choose another output.dir",
    "bf16": "set model.compute_dtype: bfloat16",
    "fp16": "set model.compute_dtype: float16",
    "bf16_full_eval": "evaluation uses model.compute_dtype",
    "fp16_full_eval": "evaluation uses model.compute_dtype",
    "label_smoothing_factor": "it smooths token labels, which preferences lack; set objective.label_smoothing",
    "label_names": "a batch of preferences has no labels",
    "remove_unused_columns": "the columns of a row are fixed by the tokenisation",
    "prediction_loss_only": "metrics are always computed",
    "batch_eval_metrics": "metrics are computed over the whole evaluation",
    "include_for_metrics": "metrics are computed from log-probs alone",
    "auto_find_batch_size": "it would change the rows of a step; set per_device_train_batch_size",
    "logging_nan_inf_filter": "a loss that is not a number always stops the run",
    "use_cache": "training uses no cache",
    "use_liger_kernel": "it replaces layers of the reference too, without a check; not supported",
    "neftune_noise_alpha": "noise in the policy alone moves the log-ratio; not supported",
    "save_only_model": "a checkpoint without optimiser and random state could not be resumed from",
    "dataloader_pin_memory": "rows are made into tensors a micro-batch at a time",
    "deepspeed": "start with accelerate launch --config_file configs/accelerate/zero2.yaml",
    **dict.fromkeys(
        ("fsdp", "parallelism_config"),
        "policy and reference share one set of weights here; start several processes with torchrun, and "
        "deal the base out among them with train.shard_base",
    ),
    "accelerator_config": "which process runs which rows is the trainer's to say",
    "average_tokens_across_devices": "a step is the mean over its rows in all processes",
    "ddp_find_unused_parameters": "every adapter gets gradient in every step",
    "ddp_broadcast_buffers": "nothing changes the buffers of the base",
    "save_on_each_node": "the first process alone writes; several machines share output.dir",
    "train_sampling_strategy": "rows are shuffled with train.seed",
    "length_column_name": "rows are shuffled with train.seed",
    "include_num_input_tokens_seen": "tokens per second are always logged",
    "resume_from_checkpoint": "give --resume to the command, or resume=True to train()",
    "restore_callback_states_from_checkpoint": "a resumed run restores all it needs",
    "ignore_data_skip": "a resumed run continues with the rows that it has not seen",
    "do_train": "the command says what is done",
    "do_eval": "the command says what is done",
    "do_predict": "the command says what is done",
    "local_rank": "set by the launcher",
    "push_to_hub": "training sends nothing anywhere; export RUN --to FOLDER --push OWNER/NAME does",
    "hub_token": "no secret belongs in a config; set HF_TOKEN in the environment",
    "hub_model_id": "give export RUN --push OWNER/NAME",
    "hub_private_repo": "give export RUN --push OWNER/NAME --private",
    **dict.fromkeys(
        ("hub_strategy", "hub_always_push", "hub_revision"), "only a finished export is pushed"
    ),
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C always save a checkpoint",
}

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 2,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "save_total_limit": 3,
    "gradient_checkpointing": True,
    "seed": 0,
    "report_to": "none",
    "disable_tqdm": False,  # the library turns it on where its own messages are off
}

# What a held-out evaluation reports, and a best model can be chosen by.
METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
)

_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}
_BELOW = {"seed": 2**32, "warmup_steps": 10**9, "logging_steps": 10**9, "save_steps": 10**9}
_BELOW |= {"eval_steps": 10**9, "learning_rate": 10**3, "num_train_epochs": 10**6}
_BELOW |= {"per_device_train_batch_size": 10**6, "per_device_eval_batch_size": 10**6}
_BELOW |= {"gradient_accumulation_steps": 10**6, "max_steps": 10**9, "dataloader_num_workers": 1024}
_ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")


def argument_problems(values: Mapping[str, Any], ours: set[str]) -> list[str]:
    """Return a sentence for every key of the ``train`` section that cannot stand.

    Args:
        values: the section without our own keys.
        ours: our own keys, which a typing error may have meant.
    """
    from lora_dpo.config.foreign import answer_to_option

    problems = []
    known = _field_types()
    for key, value in values.items():
        if not isinstance(key, str):
            problems.append(f"train: the key {key!r} is no text; expected the name of a setting.")
        elif key in REFUSED:
            problems.append(f"train.{key}: not a setting here; {REFUSED[key]}.")
        elif key not in known and (answer := answer_to_option(f"train.{key}")):
            problems.append(f"train.{key}: {answer}.")
        elif key not in known:
            legal = (set(known) - set(REFUSED)) | ours
            problems.append(
                f"train.{key}: unknown key; expected {', '.join(sorted(ours))} or a field of "
                f"transformers.TrainingArguments.{nearest(key, legal)}"
            )
        else:
            problems += _value_problems(key, value, known[key])
    return problems


def argument_fields() -> set[str]:
    """Return the fields of ``TrainingArguments`` that are settings here."""
    return set(_field_types()) - set(REFUSED)


def asks(values: Mapping[str, Any], name: str) -> bool:
    """Return whether a switch of the ``train`` section is on.

    Args:
        values: the section without our own keys, checked.
        name: of the switch.
    """
    return bool(_converted(values.get(name, False), bool))


def build_arguments(
    values: Mapping[str, Any], *, output_dir: str, evaluates: bool
) -> TrainingArguments:
    """Return ``TrainingArguments`` with our defaults under the given values.

    Args:
        values: the ``train`` section without our own keys.
        output_dir: folder of the run.
        evaluates: whether there are held-out rows; without them nothing asks for an evaluation.

    Raises:
        ConfigError: values that are legal one by one but not together.
    """
    import torch
    from transformers import TrainingArguments

    from lora_dpo.ranks import launched_processes, under_deepspeed

    strategy = "steps" if evaluates else "no"
    known = _field_types()
    values = {key: _converted(value, known[key]) for key, value in values.items()}
    merged = {**DEFAULTS, "eval_strategy": strategy, **values}
    strategy = merged["eval_strategy"]
    if not evaluates and strategy != "no":
        raise ConfigError(
            f"train.eval_strategy: got '{getattr(strategy, 'value', strategy)}', but there are no held-out rows; "
            "set data.eval or data.eval_fraction."
        )
    if evaluates and merged["eval_strategy"] != "no":
        merged.setdefault("metric_for_best_model", "eval_loss")
        merged.setdefault("greater_is_better", "loss" not in str(merged["metric_for_best_model"]))
    merged["report_to"] = merged["report_to"] or "none"
    if launched_processes() > 1 and not torch.accelerator.is_available():
        # else accelerate takes each process for the only one
        merged |= {"ddp_backend": "gloo"} if under_deepspeed() else {}
        merged.setdefault("use_cpu", not under_deepspeed())
    if merged["eval_strategy"] != "steps":
        merged["eval_steps"] = values.get("eval_steps")
    fields = {key: merged[key] for key in merged if key not in _CHECKPOINTING}
    fields.update(checkpointing_fields(merged))
    try:
        return TrainingArguments(output_dir=output_dir, **fields)
    except Exception as error:
        # Settings that contradict each other: the library checks them with whatever it has at hand.
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"train: {reason or type(error).__name__}") from None


def checkpointing_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return activation checkpointing under the name that the installed transformers has."""
    asked = values.get("activation_checkpointing", values.get("gradient_checkpointing"))
    options = values.get(
        "activation_checkpointing_kwargs", values.get("gradient_checkpointing_kwargs")
    )
    new = "activation_checkpointing" in _field_types_of_installed()
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: bool(asked), f"{name}_kwargs": {"use_reentrant": False, **(options or {})}}


_CHECKPOINTING = {
    f"{name}{suffix}"
    for name in ("activation_checkpointing", "gradient_checkpointing")
    for suffix in ("", "_kwargs")
}


@lru_cache(maxsize=1)
def _field_types_of_installed() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def _field_types() -> dict[str, Any]:
    names = ("activation_checkpointing", "gradient_checkpointing")  # the name changed in 5.23
    flags = {name: bool for name in names}
    return {
        **_field_types_of_installed(),
        **flags,
        **{f"{name}_kwargs": dict[str, Any] | None for name in names},
    }


def _value_problems(key: str, value: Any, annotation: Any) -> list[str]:
    where = f"train.{key}: got {given(value)}"
    try:
        checked = _converted(value, annotation)
    except ValidationError as error:
        messages = dict.fromkeys(problem["msg"] for problem in error.errors())
        return [f"{where}; {' or '.join(m[0].lower() + m[1:] for m in messages)}."]
    if checked is None:
        return []
    if key == "report_to":
        known = ["none", "all", *sorted(_trackers())]
        unknown = [name for name in _listed(checked) if name not in known]
        return [f"{where}; expected {', '.join(known)}.{nearest(n, known)}" for n in unknown]
    if key in _AT_LEAST and not checked >= _AT_LEAST[key]:
        return [f"{where}; expected at least {_AT_LEAST[key]}."]
    if key in _ABOVE_ZERO and not checked > 0:
        return [f"{where}; expected a number above 0."]
    if key in _BELOW and not checked < _BELOW[key]:
        return [f"{where}; expected a number below {_BELOW[key]}."]
    if key == "max_steps" and checked != -1 and checked < 1:
        return [f"{where}; expected at least 1, or -1 to go by num_train_epochs."]
    if key == "metric_for_best_model" and checked.removeprefix("eval_") not in METRICS:
        return [f"{where}; expected one of {', '.join(METRICS)}.{nearest(checked, METRICS)}"]
    return []


def _listed(asked: str | list[str]) -> list[str]:
    return [asked] if isinstance(asked, str) else asked


def _trackers() -> Mapping[str, Any]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    trackers: Mapping[str, Any] = INTEGRATION_TO_CALLBACK
    return trackers


def _converted(value: Any, annotation: Any) -> Any:
    """Return the value in its field's type: YAML reads 1e-4 as text, for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schemas of foreign types; the verdict is what counts
        kind = _narrowed(annotation)
        if value is False and isinstance(kind, type) and issubclass(kind, Enum):
            value = "no"  # YAML reads an unquoted no as False
        return TypeAdapter(kind, config=_ADAPTER).validate_python(value)


def _narrowed(annotation: Any) -> Any:
    """Return the enumeration of a field typed ``Enumeration | str``, whose other strings fail later."""
    enums = [a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, Enum)]
    return enums[0] if len(enums) == 1 else annotation


_ADAPTER: Any = {"arbitrary_types_allowed": True, "allow_inf_nan": False}
