"""Questions on a terminal for what ``init`` was not given."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from lora_dpo.errors import ConfigError, OutputError


@dataclass(frozen=True)
class Wishes:
    """What a draft is made from; None where nothing was said."""

    model: Any
    data: Any
    objective: str | None = None
    held_out: str | None = None
    gpu: str | None = None
    to: Any = None


def completed(wishes: Wishes, *, overwrite: bool, asks: bool = True) -> Wishes:
    """Return the wishes with model, data and target filled in, by asking where there is a terminal.

    Raises:
        ConfigError: something is missing, and nobody can be asked.
        OutputError: the target is there already.
    """
    missing = [f"--{name}" for name in ("model", "data") if getattr(wishes, name) is None]
    if missing and not (asks and sys.stdin.isatty()):
        why = "there is no terminal to ask on" if asks else "nothing is asked with --json"
        raise ConfigError(
            f"init: {' and '.join(missing)} missing, and {why}; give --model BASE --data FILE."
        )
    if missing:
        wishes = _asked(wishes)
    target = wishes.to or Path(f"{Path(wishes.model).name}.yaml")
    if target.exists() and not overwrite:  # told before data are read
        raise OutputError(f"{target}: exists already; choose another name, or give --overwrite.")
    return replace(wishes, to=target)


def _asked(wishes: Wishes) -> Wishes:
    def ask(given: str | None, text: str, otherwise: str | None = None) -> str | None:
        if given is not None:
            return given
        if otherwise is None:
            return str(typer.prompt(text)).strip()
        found = str(typer.prompt(f"{text} [{otherwise}]", default="", show_default=False)).strip()
        return found or None

    model = ask(wishes.model, "Base model, a folder or a hub id")
    data = ask(wishes.data, "Preferences or instruction data, a file or a hub id")
    held_out = ask(wishes.held_out, "Held-out rows", "split some off")
    objective = ask(wishes.objective, "Objective, or sft", "by the data")
    gpu = ask(wishes.gpu, "Card, as rtx4090 or 12GiB", "this machine's")
    to = wishes.to or Path(ask(None, "Write to", f"{Path(str(model)).name}.yaml") or "")
    return Wishes(model, data, objective, held_out, gpu, to if to != Path() else None)
