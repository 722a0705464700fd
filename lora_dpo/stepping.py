"""How the library is made to see one batch an optimiser step: its arguments, and the rows of one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from lora_dpo.arguments import REFUSED
from lora_dpo.data import (
    Tokenised,
    flat_tokens,
    label_counts,
    load_preferences,
    require_scores,
    tokenise,
    with_mismatched,
)
from lora_dpo.data.preferences import Kind
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.heads import base_dtype
from lora_dpo.lines import add_lines, keep_lines_until
from lora_dpo.objectives import BoundObjective
from lora_dpo.ranks import forget_preparation, refuse_launch, whole_steps

logger = logging.getLogger("lora_dpo")

# Refused from Python too: each would act on the policy and not on its reference, or on nothing.
_NOISY = (
    "neftune_noise_alpha",
    "label_smoothing_factor",
    "auto_find_batch_size",
    "use_liger_kernel",
    "save_only_model",
)


def tokenised(data: Any, tokenizer: Any, max_length: int, kind: Kind) -> Tokenised:
    """Return tokenised rows of the kind that the objective takes."""
    if isinstance(data, Tokenised):
        rows: Tokenised = data
    elif tokenizer is None:
        raise DataError("PreferenceTrainer: data that is not tokenised needs tokenizer=...")
    else:
        rows = tokenise(load_preferences(data, kind=kind), tokenizer, max_length=max_length)
    if rows.kind != kind:
        raise DataError(
            f"PreferenceTrainer: the data are {rows.kind}, and the objective takes {kind} rows; choose "
            f"another objective, or load the data with kind={kind!r}, which reads pairs as such rows "
            "where it can."
        )
    return rows


def one_batch_a_step(args: TrainingArguments, policy: PeftModel) -> TrainingArguments:
    """Return a copy whose batch is a whole step, with the mixed precision of the policy."""
    refused = [key for key in _NOISY if getattr(args, key, None)]
    if refused:
        raise ConfigError([f"args.{key}: not a setting here; {REFUSED[key]}." for key in refused])
    refuse_launch(args)
    batching: Any = args.accelerator_config
    if batching.split_batches or batching.dispatch_batches or not batching.use_seedable_sampler:
        raise ConfigError(
            f"args.accelerator_config: {REFUSED['accelerator_config']}; leave it out."
        )
    args = copy.copy(args)
    args._n_gpu = min(args._n_gpu, 1)  # more cards are more processes, never DataParallel
    args.ddp_find_unused_parameters = False  # every adapter gets gradient in every step
    args.ddp_broadcast_buffers = False  # the base's, which nothing changes
    if args.data_seed is None:
        args.data_seed = args.seed  # not what random numbers a process has come to
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.save_total_limit = None  # ours runs after the manifest is written
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False
    args.label_names = []
    args.dataloader_pin_memory = (
        False  # rows travel as lists; tensors are made a micro-batch at a time
    )
    half = base_dtype(policy) == torch.float16
    if half and args.device.type == "cuda":
        # for the gradient scaler alone; forward() chooses the arithmetic itself
        args.fp16, args.mixed_precision = True, "fp16"
    return args


class WholeSteps(Trainer):
    """The library's trainer, in which every process reads all rows of a step and of an evaluation."""

    model: Any  # which the library types more loosely

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train what an evaluation may have been made with before."""
        forget_preparation(self.model)
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return batches of all rows of a step."""
        return whole_steps(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return batches of as many rows as all processes run at a time."""
        return whole_steps(super().get_eval_dataloader(*args, **kwargs))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; predictions are those of all rows already."""
        self.gather_function = lambda found: found
        return super().evaluation_loop(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the library's formula assumes one dense batch and no shared work."""
        return 0


@dataclass(frozen=True)
class Batches:
    """How rows become steps: rows and, if set, tokens of a micro-batch; micro-batches of a step."""

    micro_batch: int
    accumulated: int = 1
    max_tokens: int | None = None


def batches_of(args: TrainingArguments, max_tokens: int | None) -> Batches:
    """Return what the user's arguments say."""
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return Batches(rows, times, max_tokens)


def rows_a_step(args: TrainingArguments) -> int:
    """Return the rows of an optimiser step in all processes, as the user's arguments say."""
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return int(rows * times * args.world_size)


_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # newer, older name


def recomputes(args: TrainingArguments) -> bool:
    """Whether activations are recomputed in backward."""
    return any(getattr(args, name, False) for name in _CHECKPOINTING)


def leave_checkpointing(args: TrainingArguments) -> None:
    """Keep the library from wrapping layers that recompute themselves."""
    for name in _CHECKPOINTING:
        if hasattr(args, name):
            setattr(args, name, False)


def fitted(
    bound: BoundObjective, train: Tokenised, held_out: Tokenised | None
) -> tuple[Tokenised, Tokenised | None]:
    """Return the rows with what the objective reads of them beside tokens and labels.

    Raises:
        DataError: rows without a score that the objective reads, or with one prompt alone where
            another row's completion is needed.
    """
    sets = [train] if held_out is None else [train, held_out]
    if "scores" in bound.needs:
        for data in sets:
            require_scores(data)
    if "mismatched" in bound.needs:
        sets = [with_mismatched(data) for data in sets]
    return sets[0], sets[1] if len(sets) > 1 else None


def balanced(bound: BoundObjective, train: Tokenised) -> BoundObjective:
    """Return the objective with weights that make up for unequal classes, and say so."""
    if bound.data != "unpaired":
        return bound
    wanted, unwanted = label_counts(train)
    weighed = bound.balanced(wanted, unwanted)
    text = f"labels: {wanted} wanted, {unwanted} unwanted"
    if weighed is not bound:
        values = weighed.hyperparameters
        text += (
            f"; desirable_weight {values['desirable_weight']:.4g}, undesirable_weight "
            f"{values['undesirable_weight']:.4g}: the rarer class weighs most/fewest, so that "
            "both weigh the same (set objective.desirable_weight to choose)"
        )
    logger.info(text)
    if not wanted or not unwanted:
        missing = "unwanted" if wanted else "wanted"
        logger.warning(
            "labels: no row is %s, so nothing tells good answers from bad ones, and %s pushes all of them "
            "the same way. Give rows of both kinds%s.",
            missing,
            bound.name,
            ", or fine-tune on these with lora-dpo sft" if wanted else "",
        )
    return weighed


class RowMargins:
    """Reward margins of training rows as they were seen, for ``row_margins.jsonl``."""

    MOST = 100  # steps that wait in memory, however seldom a line is logged

    def __init__(self) -> None:
        self.path: Path | None = None
        self._kept: list[tuple[int, list[tuple[str, int]], torch.Tensor]] = []

    def begin(self, step: int) -> None:
        """Leave of an older file what the checkpoint of this step had seen."""
        if self.path is not None:
            keep_lines_until(self.path, step)

    def add(self, step: int, rows: Sequence[Mapping[str, Any]], margins: torch.Tensor) -> None:
        """Keep the margins of a step on the device."""
        if self.path is not None:
            self._kept.append((step, [(row["file"], row["row"]) for row in rows], margins))
        if len(self._kept) >= self.MOST:
            self.write()

    def write(self) -> None:
        """Append what was kept."""
        if self.path is None or not self._kept:
            return
        lines = []
        for step, places, margins in self._kept:
            values = [round(value, 5) for value in margins.tolist()]
            rows = [[*place, value] for place, value in zip(places, values, strict=True)]
            lines.append({"step": step, "rows": rows})
        add_lines(self.path, lines)
        self._kept = []


def step_of(checkpoint: str | bool | None) -> int:
    """Return the step of a checkpoint's folder; 0 without one."""
    return int(Path(checkpoint).name.rpartition("-")[2]) if isinstance(checkpoint, str) else 0


@dataclass(frozen=True)
class Rows:
    """Rows on their way through the library, which would walk through every token of a list."""

    rows: list[dict[str, Any]]


def keep_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The library's collator: rows are padded later, a micro-batch at a time."""
    return {"rows": Rows(rows)}


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a step, the longest first (it fits or not), those of one prompt together."""
    longest: dict[str, int] = {}
    for row in rows:
        key = row["prompt_key"]
        longest[key] = max(longest.get(key, 0), row_length(row))
    return sorted(
        rows, key=lambda row: (-longest[row["prompt_key"]], row["prompt_key"], -row_length(row))
    )


def row_length(row: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence of a row, one with a mismatched completion among them."""
    answers = [*answers_of(row), row.get("mismatched_ids") or ()]
    return len(row["prompt_ids"]) + max(map(len, answers))


def longest_row(rows: Any) -> int:
    """Return the tokens of the longest sequence of a data set's rows; none of them becomes a list.

    Args:
        rows: of a ``Tokenised``.
    """
    longest = 0
    answers = [name for name in rows.column_names if name.endswith("_ids") and name != "prompt_ids"]
    for table in rows.with_format("arrow").iter(batch_size=4096):
        prompts = pc.list_value_length(table["prompt_ids"])
        for name in answers:
            both = pc.max(pc.add(prompts, pc.list_value_length(table[name])))
            longest = max(longest, both.as_py() or 0)
    return longest


def laid_tokens(row: Mapping[str, Any]) -> int:
    """Tokens that a row takes in a flat batch, mismatched completion included."""
    tokens = flat_tokens(row["prompt_ids"], answers_of(row))
    other = row.get("mismatched_ids")
    return max(tokens, flat_tokens(row["prompt_ids"], [other])) if other else tokens


def batch_tokens(rows: Sequence[Mapping[str, Any]], flat: bool) -> int:
    """Tokens of a micro-batch, as it is laid out: each row's own, or all as long as the longest."""
    if flat:
        return sum(map(laid_tokens, rows))
    return max(map(row_length, rows)) * sum(len(answers_of(row)) for row in rows)


def row_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of all sequences of a row."""
    answers = answers_of(row)
    return len(row["prompt_ids"]) * len(answers) + sum(map(len, answers))


def counted_tokens(row: Mapping[str, Any]) -> int:
    """Completion tokens by which a row counts in a mean over tokens."""
    return len(answers_of(row)[0])


def answers_of(row: Mapping[str, Any]) -> list[Sequence[int]]:
    """Return the completions of a row that are trained on."""
    if "chosen_ids" in row:
        return [row["chosen_ids"], row["rejected_ids"]]
    return [row["completion_ids"]]
