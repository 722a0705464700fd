"""Commands for before a run: is the machine ready, does it fit, which objective."""

from __future__ import annotations

import sys
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
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo init --model mistralai/Mistral-7B-v0.1 --data prefs.jsonl "
    "--gpu rtx4090 --to my.yaml",
)
def init(
    model: Annotated[str | None, typer.Option(help="The base: a folder or a hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Preferences or instruction data: a file or a hub id.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="A name of the table, or sft; by the data's kind if left out."),
    ] = None,
    eval_: Annotated[
        str | None, typer.Option("--eval", help="Held-out rows; else some are split off.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A card or its memory, as rtx4090 or 12GiB; else this one's.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The YAML file to write.")] = None,
    set_: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a commented config for your model, data and card, fitted by the planner.

    Without --model and --data it asks for what is missing; with --json it asks nothing.
    """
    with user_errors():
        from lora_dpo.cli.asking import Wishes, completed

        given = Wishes(model, data, objective, eval_, gpu, to)
        wishes = completed(given, overwrite=overwrite, asks=not json_)
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.drafting import init_config

        draft = init_config(
            wishes.model, wishes.data, objective=wishes.objective, held_out=wishes.held_out,
            gpu=wishes.gpu, overrides=set_ or [],
        )  # fmt: skip
        show(draft, json_)
        if (
            not (yes or json_)
            and sys.stdin.isatty()
            and not typer.confirm(f"Write {wishes.to}?", True)
        ):
            raise typer.Exit(0)
        written = draft.write(wishes.to, overwrite=overwrite)
        if not json_:
            command = "sft" if draft.config.objective.name.startswith("sft") else "train"
            print(f"written: {written}; start with: lora-dpo {command} {written}")


@app.command(
    rich_help_panel=PANEL, epilog="Example: lora-dpo plan configs/mistral-7b-dpo.yaml --gpu rtx3060"
)
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for train.")],
    gpu: Annotated[
        str | None, typer.Option(help="A card or its memory, as rtx4090 or 12GiB; else this one's.")
    ] = None,
    cards: Annotated[int, typer.Option(min=1, help="So many of them, for train.shard_base.")] = 1,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a run fits a card, before any weight loads: bytes by part, time, remedies."""
    with user_errors():
        from lora_dpo.config import Config

        checked = Config.load(config, set_ or [])
        quiet_libraries()
        from lora_dpo.planning import plan as make_plan

        found = make_plan(checked, gpu=gpu, cards=cards)
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
