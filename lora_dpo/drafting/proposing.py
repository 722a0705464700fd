"""What a draft proposes: objective by the data, length by the rows, batch by the planner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dpo import objectives
from lora_dpo.config import Config
from lora_dpo.config.reading import override
from lora_dpo.data import Preferences
from lora_dpo.drafting.fitting import Choice, first_that_fits
from lora_dpo.drafting.writing import Draft, commented
from lora_dpo.errors import ConfigError
from lora_dpo.planning import card_of, question_of
from lora_dpo.policy import check_base
from lora_dpo.positions import longest_of_its_own
from lora_dpo.preparing import load_rows, load_tokenizer, tokenise_rows
from lora_dpo.run_folder import bound_objective
from lora_dpo.stepping import fitted

OBJECTIVES = {"paired": "dpo", "unpaired": "kto", "demonstrations": "sft_demonstrations"}
SFT_RATE, RATE = 2e-4, 5e-5
SMALL_MODEL = 1e8  # weights; below, rates of a 7B model hardly move it
LONGEST = 1 << 20


def init_config(
    model: str | Path,
    data: str | Path,
    *,
    objective: str | None = None,
    held_out: str | Path | None = None,
    gpu: str | None = None,
    overrides: Sequence[str] = (),
) -> Draft:
    """Draft a commented config for a model, data and a card; nothing is written, no weight loads.

    Args:
        model: the base, a folder or a hub id.
        data: preferences or instruction data: a file, a folder or a hub id.
        objective: a name of the table, or ``sft``; by the kind of the data if left out.
        held_out: a file of held-out rows; some are split off by prompt if left out.
        gpu: a known card or an amount of memory, as ``rtx4090`` or ``12GiB``; the card of this
            machine if left out, and no limit where there is none.
        overrides: ``key=value`` texts that stand in place of what would be proposed.

    Raises:
        LoraDpoError: a model, data or setting that cannot be used, or that fits at no setting.
    """
    fixed = override({}, overrides)
    if gpu:
        card_of(gpu)  # a slip is told before data are read
    name = OBJECTIVES["demonstrations"] if objective == "sft" else objective
    values = _first_values(str(model), str(data), held_out)
    if name is not None:
        values["objective"]["name"] = name
    name = _merged({}, fixed).get("objective", {}).get("name", name)
    if "adapter" in fixed.get("model", {}):
        del values["lora"]  # an adapter brings its own
    config = Config.parse(_merged(values, fixed))
    base = check_base(config.model)
    positions = getattr(base.get_text_config(), "max_position_embeddings", None) or LONGEST
    if (own := longest_of_its_own(base)) is not None:
        positions = min(positions, own[1])
    if "max_length" not in fixed.get("data", {}):
        config = config.replace("data.max_length", positions)
    read = load_rows(config, config.data.train, objectives.get(name).data if name else None)
    name = name or OBJECTIVES[read.kind]
    values["objective"] = _objective(name)
    values["output"]["dir"] += f"-{name}"
    notes = [f"objective: {name}, for {read.kind} rows"]
    if held_out is not None:
        held = load_rows(config, config.data.eval, objectives.get(name).data)
        notes.append(f"held out: {len(held)} rows; {held.shape}")
    tokenizer = load_tokenizer(config)
    tokens = tokenise_rows(read, config, tokenizer)
    found = Config.parse(_merged(values, fixed))
    rows = list(fitted(bound_objective(found), tokens, None)[0].rows)  # as training will
    question = question_of(found, rows, gpu=gpu)
    tied = bool(getattr(base.get_text_config(), "tie_word_embeddings", False))
    choice = first_that_fits(question, fixed, positions, len(read), movable=not tied)
    notes = [
        f"data: {read.report.read} rows read, {len(rows)} usable; {read.shape}",
        _form(read, bool(tokenizer.chat_template)),
        *notes,
        f"is the base ready for these answers? lora-dpo inspect {data} --model {model}",
    ]
    if "learning_rate" not in fixed.get("train", {}):
        small = choice.plan.bytes.linears < SMALL_MODEL
        rate = SFT_RATE if name.startswith("sft") else RATE
        values["train"]["learning_rate"] = min(1e-3, 10 * rate) if small else rate
    return _draft(_merged(values, fixed), choice, notes, tokens.summary.before.max)


def _first_values(model: str, data: str, held_out: Any) -> dict[str, Any]:
    """Return the settings that need no look at the data, in the order of the shipped YAMLs."""
    if held_out is None:
        splits: dict[str, Any] = {"eval": None, "eval_fraction": 0.05, "eval_max_rows": 500}
    else:
        splits = {"eval": str(held_out)}
    return {
        "objective": {"name": "dpo"},
        "model": {"base": model, "quantisation": "nf4", "compute_dtype": "auto",
                  "embeddings_on_cpu": False},
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"},
        "data": {"train": data, **splits, "max_length": 1024, "overflow": "drop"},
        "train": {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8,
            "per_device_eval_batch_size": 4, "max_tokens_per_batch": None, "num_train_epochs": 1,
            "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
            "max_grad_norm": 1.0, "optim": "adamw_torch", "gradient_checkpointing": True,
            "logging_steps": 10, "eval_steps": 0.25, "save_steps": 0.25, "report_to": "none",
            "seed": 0,
        },
        "output": {"dir": f"runs/{Path(model).name}"},
    }  # fmt: skip


def _objective(name: str) -> dict[str, Any]:
    """Return an objective with its hyperparameters; class weights are left to be balanced."""
    known = objectives.get(name).hyperparameters
    kept = {key: h.default for key, h in known.items() if not key.endswith("desirable_weight")}
    return {"name": name, **kept}


def _merged(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return proposals with what the user has fixed in their place."""
    merged = {section: dict(settings) for section, settings in values.items()}
    for section, settings in fixed.items():
        given = {"name": settings} if isinstance(settings, str) else settings
        if not isinstance(given, Mapping):
            raise ConfigError(f"--set {section}: expected a key of it, as {section}.key=value.")
        merged[section] = {**merged.get(section, {}), **given}
    return merged


def _form(read: Preferences, has_template: bool) -> str:
    if read.rows[0].is_chat:
        return "the rows are chats, rendered by the chat template of the tokenizer"
    if has_template:
        return (
            "the rows are texts, to which no template is applied, though the tokenizer has one: give "
            "messages if the model is to be talked to"
        )
    return "the rows are texts, to which no template is applied"


def _draft(values: dict[str, Any], choice: Choice, notes: Sequence[str], longest: int) -> Draft:
    values["data"]["max_length"] = choice.max_length
    for where, value in choice.settings.items():
        section, _, key = where.partition(".")
        values[section][key] = value
    train, name = values["train"], values["objective"]["name"]
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    reasons = {
        "data.max_length": f": holds {_percent(choice.kept)} of the rows whole; the longest has "
        f"{longest}",
        "data.eval": "; null splits some off by prompt" * (values["data"].get("eval") is None),
        "train.gradient_accumulation_steps": f": {rows} rows in all",
        "train.learning_rate": " on a small model; 7B models take a tenth"
        if choice.plan.bytes.linears < SMALL_MODEL
        else "; full fine-tuning would take a hundredth",
    }
    header = [f"{name} on {Path(values['model']['base']).name}, drafted by lora-dpo init", *notes]
    header += [
        line for line in choice.plan.lines() if line.startswith(("plan: peak", "plan: fits"))
    ]
    text = commented(values, header=header, reasons=reasons)
    return Draft(Config.parse(values), text, choice.plan, tuple(notes))


def _percent(share: float) -> str:
    """Return a share, rounded down: 99.97 % is not all."""
    return f"{math.floor(1000 * share) / 10:g} %"
