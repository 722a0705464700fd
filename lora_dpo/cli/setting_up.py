"""Commands for before a run: is the machine ready, does it fit, which objective."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.cli.shared import Overrides, app, quiet_libraries, show, user_errors

PANEL = "Before a run"


@app.command(rich_help_panel=PANEL, epilog="Example: lora-dpo doctor --json")
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, GPU, 4-bit kernels, disk, memory and known traps; exit 1 if one blocks."""
    with user_errors():
        from lora_dpo.checkup import doctor as run_checks

        found = run_checks()
        show(found, json_)
    if found.blocks:
        raise typer.Exit(1)


@app.command(
    rich_help_panel=PANEL, epilog="Example: lora-dpo plan configs/mistral-7b-dpo.yaml --gpu rtx3060"
)
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for train.")],
    gpu: Annotated[
        str | None, typer.Option(help="A card or its memory, as rtx4090 or 12GiB; else this one's.")
    ] = None,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a run fits a card, before any weight loads: bytes by part, time, remedies."""
    with user_errors():
        from lora_dpo.config import Config

        checked = Config.load(config, set_ or [])
        quiet_libraries()
        from lora_dpo.planning import plan as make_plan

        found = make_plan(checked, gpu=gpu)
        show(found, json_)


@app.command(rich_help_panel=PANEL, epilog="Example: lora-dpo objectives dpo")
def objectives(
    name: Annotated[str | None, typer.Argument(help="One objective.")] = None,
    markdown: Annotated[bool, typer.Option(help="The table in Markdown.")] = False,
) -> None:
    """Print the table of objectives, or one objective's formula, hyperparameters and source."""
    with user_errors():
        from lora_dpo import objectives as table
        from lora_dpo.describe import describe_objective, describe_table, markdown_table

        if name:
            print(describe_objective(table.get(name)))
        else:
            print(markdown_table() if markdown else describe_table())
