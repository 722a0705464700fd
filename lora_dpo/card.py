"""The model card that goes with an export: what it is, made from what, and how far it was proven."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_dpo.config import Config

if TYPE_CHECKING:
    from lora_dpo.proving import Proof


def model_card(config: Config, results: dict[str, Any], *, proof: Proof | None) -> str:
    """Return the card in Markdown. Local folders are named by their last part only."""
    base = _public(config.model.base)
    header = {"library_name": "transformers" if proof else "peft", "tags": ["lora_dpo", "dpo"]}
    if base == config.model.base:
        header["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {base}, tuned on preferences with {config.objective.name}",
        _facts(config, results, base),
        _metrics(results),
    ]
    if proof is not None:
        parts.append(f"## Proof of the merge\n\n{proof}")
    parts.append("Made with lora_dpo.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(config: Config, results: dict[str, Any], base: str) -> str:
    sources = ", ".join(_public(source.path) for source in config.data.train)
    rows = results.get("rows", {})
    lines = [
        f"- base: {base}; while training: {results.get('weights', config.model.quantisation)}",
        f"- reference: {results.get('reference', 'unknown')}",
        f"- objective: {results.get('objective', config.objective.name)}",
        f"- data: {sources}; {rows.get('train', '?')} rows trained on, {rows.get('held_out', '?')} held out",
        f"- LoRA: rank {config.lora.rank}, alpha {config.lora.alpha:g}, dropout {config.lora.dropout:g}, "
        f"targets {config.lora.targets}, rsLoRA {config.lora.rslora}, DoRA {config.lora.dora}",
        f"- training: {results.get('steps', '?')} steps, settings {config.train.further or 'by default'}",
        f"- versions: {results.get('versions', {})}",
    ]
    return "## How it was made\n\n" + "\n".join(lines)


def _metrics(results: dict[str, Any]) -> str:
    found = results.get("held_out", {}).get("mean_low_high")
    if not found:
        return ""
    rows = [
        f"| {name} | {mean:.4g} | {low:.4g} to {high:.4g} |"
        for name, (mean, low, high) in found.items()
    ]
    return "## Held-out pairs\n\n| metric | mean | 95 % interval |\n|---|---|---|\n" + "\n".join(
        rows
    )


def _public(path: str) -> str:
    """A hub id as it is; a path of somebody's machine by its last part."""
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path
