"""Commands for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.cli.shared import Overrides, app, quiet_libraries, user_errors

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


@app.command(rich_help_panel=PANEL, epilog="Example: lora-dpo quickstart --to quickstart-run")
def quickstart(
    to: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("quickstart-run"),
) -> None:
    """Run the main job on the bundled small model, offline, in a few minutes."""
    with user_errors():
        quiet_libraries()
        from lora_dpo.quickstart.main import run_quickstart

        run_quickstart(to)
