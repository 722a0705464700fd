"""Commands for training."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.cli.shared import (
    Overrides,
    RunFolder,
    app,
    quiet_libraries,
    show,
    user_errors,
)

PANEL = "Training"

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file; configs/ holds commented ones.")]
Resume = Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint.")]


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo train configs/mistral-7b-dpo.yaml --set objective.beta=0.05",
)
def train(
    config: ConfigFile,
    set_: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a policy on preferences against its reference."""
    with user_errors():
        from lora_dpo.config import Config

        checked = Config.load(config, set_ or [])
        quiet_libraries()
        from lora_dpo.run import train as run_training

        run_training(checked, resume=resume)


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo sft configs/quickstart-sft.yaml; then lora-dpo train "
    "configs/quickstart.yaml --set model.adapter=runs/quickstart-sft",
)
def sft(
    config: ConfigFile,
    set_: Overrides = None,
    resume: Resume = False,
) -> None:
    """Fine-tune on the chosen side of preferences or on instruction data, to start train from."""
    with user_errors():
        from lora_dpo.config import Config

        checked = Config.load(config, set_ or [])
        quiet_libraries()
        from lora_dpo.finetuning import sft as run_sft

        run_sft(checked, resume=resume)


@app.command(
    rich_help_panel=PANEL, epilog="Example: lora-dpo reproduce runs/mistral-7b-dpo --to runs/again"
)
def reproduce(
    run: RunFolder,
    to: Annotated[Path | None, typer.Option(help="The new folder; RUN-again if left out.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="How far a figure may be off; 0 asks for the same bits.")
    ] = 0.0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a run again from its own folder and compare every figure and byte. Exit 1 if they differ."""
    with user_errors():
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.reproducing import reproduce as run_again

        with redirect_stdout(sys.stderr) if json_ else nullcontext():  # training tells its steps
            found = run_again(run, to=to, tolerance=tolerance)
        show(found, json_)
    if not found.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL, epilog="Example: lora-dpo quickstart --to quickstart-run")
def quickstart(
    to: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("quickstart-run"),
) -> None:
    """Run the main job on the bundled small model, offline, in a few minutes."""
    with user_errors():
        quiet_libraries()
        from lora_dpo.quickstart.main import run_quickstart

        run_quickstart(to)
