"""Commands for handing a run on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_dpo.cli.shared import (
    Checkpoint,
    RunFolder,
    app,
    finite,
    one_of,
    quiet_libraries,
    show,
    user_errors,
)

PANEL = "Handing on"
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo export runs/mistral-7b-dpo --merge --to out/merged",
)
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="The new folder.")],
    merge: Annotated[bool, typer.Option(help="Merge the adapter into plain weights.")] = False,
    base: Annotated[
        str,
        typer.Option(
            help="Merge into weights as trained, or original (if they are rounded again)."
        ),
    ] = "trained",
    measure_both: Annotated[
        bool, typer.Option("--measure-both", help="Measure a merge into the other base too.")
    ] = False,
    checkpoint: Checkpoint = "final",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    gguf: Annotated[
        str | None, typer.Option(help="Write GGUF too: f32, f16, bf16, q8_0, q4_0.")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="A checkout of llama.cpp, for other models and kinds of GGUF."),
    ] = None,
    base_id: Annotated[
        str | None, typer.Option(help="Hub id of the base, where the run names a folder.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Send the folder to this repository on the hub, owner/name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
    json_: Json = False,
) -> None:
    """Write the adapter alone, or the merged model with a proof that it is the policy."""
    one_of("--base", base, ("trained", "original"))
    one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    with user_errors():
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.handing import export as run_export

        options: Any = {"base": base, "dtype": dtype}
        found = run_export(
            run,
            to,
            merge=merge,
            checkpoint=checkpoint,
            overwrite=overwrite,
            measure_both=measure_both,
            gguf=gguf,
            llama_cpp=llama_cpp,
            base_id=base_id,
            push_to=push,
            private=private,
            **options,
        )
        show(found, json_)


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo smoke http://127.0.0.1:8000 --of out/merged",
)
def smoke(
    target: Annotated[str, typer.Argument(help="An exported folder, or a server's address.")],
    of: Annotated[
        Path | None, typer.Option(help="The exported folder that says what to expect of a server.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of an adapter: a folder or a hub id.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    api_key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the server's API key.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Nats that a likely first token may differ by."),
    ] = None,
    json_: Json = False,
) -> None:
    """Ask an export, or what serves it, fixed prompts: is it the trained policy? Exit 1 if not."""
    with user_errors():
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.handing import smoke as run_smoke

        found = run_smoke(
            target,
            of=of,
            base=base,
            model=model,
            api_key_variable=api_key_variable,
            tolerance=tolerance,
        )
        show(found, json_)
    if not found.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL, epilog="Example: lora-dpo push out/merged my-name/my-model")
def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Send to a repository that holds files already.")
    ] = False,
    json_: Json = False,
) -> None:
    """Put an exported folder on the hub, and check that it arrived as it is here."""
    with user_errors():
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.handing import push as run_push

        show(run_push(folder, repo_id, private=private, overwrite=overwrite), json_)
