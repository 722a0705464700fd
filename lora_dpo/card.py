"""The model card that goes with an export: what it is, made from what, and how far it was proven."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_dpo import objectives
from lora_dpo.before_and_after import at_the_reference
from lora_dpo.config import Config

if TYPE_CHECKING:
    from lora_dpo.policy import Folded
    from lora_dpo.proving import Proof

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Of the section ``train``, what may be told to everybody: numbers, and names out of fixed lists.
# All else may hold a path or a name of somebody's machine or account.
_PUBLIC = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
)


def model_card(
    config: Config,
    results: dict[str, Any],
    *,
    proof: Proof | None = None,
    adapter: Folded | None = None,
    notes: Sequence[str] = (),
    base_id: str | None = None,
    licence: str | None = None,
    checkpoint: str | None = None,
) -> str:
    """Return the card in Markdown. Local folders are named by their last part only.

    Args:
        config: of the run.
        results: ``Run.results``.
        proof: of merged weights; without one the card is an adapter's.
        adapter: what became of the adapter when it was written.
        notes: sentences on how to load it and what refuses it.
        base_id: hub id of the base, where the config names a folder.
        licence: of the base, as its own card names it.
        checkpoint: the one that this is, as ``checkpoint-100``; None is the end of the run, whose
            held-out figures are told only then.
    """
    base = base_id or public_name(config.model.base)
    single = objectives.build(config.objective.to_dict()).data == "demonstrations"
    taught = "demonstrations" if single else "preferences"
    parts = [
        f"---\n{yaml.safe_dump(_header(config, proof, base_id, licence), sort_keys=False)}---",
        f"# {Path(base).name}, tuned on {taught} with {config.objective.name}",
        _facts(config, results, base, checkpoint),
        _metrics(config, results) if checkpoint is None else "",
    ]
    if proof is not None:
        parts.append(f"## Proof of the merge\n\n{proof}")
    if adapter is not None:
        parts.append(f"## The adapter\n\n{adapter}")
    if notes:
        parts.append("## How to use it\n\n" + "\n".join(f"- {note}" for note in notes))
    parts.append("Made with lora_dpo.")
    return "\n\n".join(part for part in parts if part) + "\n"


def hub_id(name: str) -> str | None:
    """Return a name if it is a hub id: of that form, and no folder of this machine."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def public_name(path: str) -> str:
    """A hub id as it is; a path of somebody's machine by its last part."""
    return path if hub_id(path) else Path(path).name


def base_licence(base: str, revision: str | None = None) -> str | None:
    """Return the licence that the base's own card names; None where it names none that can be read."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            base,
            "README.md",
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        text = Path(path).read_text(encoding="utf-8") if path else ""
        _, front, _ = text.split("---\n", 2) if text.startswith("---\n") else ("", "", "")
        found = (yaml.safe_load(front) or {}).get("license")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None  # a card that is not there, or no card: nothing is known
    return found if isinstance(found, str) else None


def _header(
    config: Config, proof: Proof | None, base_id: str | None, licence: str | None
) -> dict[str, Any]:
    header: dict[str, Any] = {
        "library_name": "transformers" if proof else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora_dpo", config.objective.name],
    }
    if base := base_id or hub_id(config.model.base):
        header["base_model"] = base
        header["base_model_relation"] = "finetune" if proof else "adapter"
    if licence:
        header["license"] = licence
    if data := [found for source in config.data.train if (found := hub_id(source.path))]:
        header["datasets"] = data
    return header


def _facts(config: Config, results: dict[str, Any], base: str, checkpoint: str | None) -> str:
    sources = ", ".join(public_name(source.path) for source in config.data.train)
    rows = results.get("rows", {})
    prints = [
        f"{name} {digest[:16]}"
        for name, key in (("trained on", "train_rows"), ("held out", "held_out_rows"))
        if (digest := results.get(key))
    ]
    weights = results.get("weights", config.model.quantisation)
    lines = [
        f"base: {base}; while training: {weights}",
        f"reference: {results.get('reference', 'the base model with its adapters disabled')}",
        f"objective: {results.get('objective', config.objective.name)}",
        f"data: {sources}"
        + (f"; {rows['train']} rows trained on, {rows['held_out']} held out" if rows else ""),
        f"fingerprints (sha256) of the tokens: {', '.join(prints)}" if prints else "",
        f"LoRA: rank {config.lora.rank}, alpha {config.lora.alpha:g}, dropout {config.lora.dropout:g}, "
        f"targets {_listed(config.lora.targets)}, rsLoRA {_yes(config.lora.rslora)}, "
        f"DoRA {_yes(config.lora.dora)}"
        if config.model.adapter is None
        else f"LoRA: went on from the adapter {public_name(config.model.adapter)}",
        _steps(results, checkpoint),
        f"settings: {settings}" if (settings := _settings(config.train.further)) else "",
        f"versions: {_versions(results['versions'])}" if results.get("versions") else "",
    ]
    return "## How it was made\n\n" + "\n".join(f"- {line}" for line in lines if line)


def _steps(results: dict[str, Any], checkpoint: str | None) -> str:
    if checkpoint is not None:
        whole = f" of {results['steps']}" if "steps" in results else ""
        return f"training: step {checkpoint.removeprefix('checkpoint-')}{whole}, a checkpoint"
    return f"training: {results['steps']} steps" if "steps" in results else ""


def _metrics(config: Config, results: dict[str, Any]) -> str:
    found = results.get("held_out", {}).get("mean_low_high")
    if not found:
        return ""
    rows = [
        f"| {name} | {_before(config, name, found)} | {mean:.4g} | {low:.4g} to {high:.4g} |"
        for name, (mean, low, high) in found.items()
    ]
    head = "| metric | reference | policy | 95 % interval |\n|---|---|---|---|\n"
    return "## Held-out pairs, before and after\n\n" + head + "\n".join(rows)


def _before(config: Config, name: str, found: Mapping[str, Sequence[float]]) -> str:
    moves = config.train.reference_update != "none"
    value = at_the_reference(name, found, objective=config.objective.name, moves=moves)
    return "" if value is None else f"{value:.4g}"


def _versions(values: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in values.items() if "not installed" not in value
    )


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(values[key])}" for key in _PUBLIC if key in values)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(targets: Any) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
