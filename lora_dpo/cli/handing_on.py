"""Commands for handing a run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_dpo.cli.shared import Checkpoint, RunFolder, app, one_of, quiet_libraries, user_errors

PANEL = "Handing on"


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo export runs/mistral-7b-dpo --merge --to out/merged",
)
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="The new folder.")],
    merge: Annotated[bool, typer.Option(help="Merge the adapter into plain weights.")] = False,
    base: Annotated[
        str, typer.Option(help="Merge into weights as trained, or original.")
    ] = "trained",
    checkpoint: Checkpoint = "final",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Write the adapter alone, or the merged model with a proof that it is the policy."""
    one_of("--base", base, ("trained", "original"))
    one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    with user_errors():
        quiet_libraries()
        from lora_dpo.run import export as run_export

        options: Any = {"base": base, "dtype": dtype}
        proof = run_export(
            run, to, merge=merge, checkpoint=checkpoint, overwrite=overwrite, **options
        )
        print(f"{proof}\nmerged model: {to}" if proof else f"adapter: {to}")
