"""Commands for preferences of one's own: drawn from a policy, and judged by a person."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_dpo.cli.shared import (
    MOST_SAMPLES,
    MOST_TOKENS,
    SEEDS,
    Checkpoint,
    app,
    finite,
    one_of,
    quiet_libraries,
    show,
    user_errors,
)

PANEL = "Own preferences"


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo sample runs/mistral-7b-dpo --prompts prompts.jsonl --to samples.jsonl "
    "--by judge.py:score",
)
def sample(
    policy: Annotated[str, typer.Argument(help="A run's folder, or a base: a folder or hub id.")],
    prompts: Annotated[str, typer.Option(help="Rows with prompt: a file, a folder or a hub id.")],
    to: Annotated[Path, typer.Option(help="The file of rankings to write, as samples.jsonl.")],
    k: Annotated[
        int, typer.Option(min=2, max=MOST_SAMPLES, help="Completions of each prompt.")
    ] = 4,
    by: Annotated[
        str | None,
        typer.Option(
            help="module:function or file.py:function, reward:RUN, judge:FOLDER_OR_URL, or hand."
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="Write pairs too: best-worst, adjacent, best-rest or all."),
    ] = None,
    min_margin: Annotated[
        float | None, typer.Option(callback=finite, help="Least difference of a pair's scores.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(callback=finite, help="Above 0; 1: the policy itself.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS)] = 256,
    seed: Annotated[int, typer.Option(**SEEDS)] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many prompts.")] = None,
    checkpoint: Checkpoint = "final",
    batch_size: Annotated[int, typer.Option(min=1, help="Completions drawn at a time.")] = 32,
    judge_model: Annotated[
        str | None, typer.Option(help="The model's name at a judge's endpoint.")
    ] = None,
    judge_key: Annotated[
        str | None, typer.Option(help="The environment variable with the endpoint's key.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file; draws are kept.")] = False,
    browser: Annotated[bool, typer.Option(help="With --by hand: open the page.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw completions of each prompt from a policy, score them, and make them into preferences."""
    if pairs is not None:
        one_of("--pairs", pairs, ("best-worst", "adjacent", "best-rest", "all"))
    with user_errors():
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.sampling import sample as draw

        options: Any = {"pairs": pairs, "judge_model": judge_model, "judge_key": judge_key}
        options |= {"min_margin": min_margin, "temperature": temperature, "limit": limit}
        options |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
        options |= {"checkpoint": checkpoint, "overwrite": overwrite, "browser": browser}
        found = draw(policy, prompts, to, k=k, by=by, **options)
        show(found, json_)


@app.command(
    rich_help_panel=PANEL, epilog="Example: lora-dpo label samples.jsonl --to labels.jsonl"
)
def label(
    data: Annotated[str, typer.Argument(help="Completions: a file, a folder or a hub id.")],
    to: Annotated[Path, typer.Option(help="The file of preferences to write.")] = Path(
        "labels.jsonl"
    ),
    mode: Annotated[
        str, typer.Option(help="pairs, thumbs, or auto: pairs where there are two.")
    ] = "auto",
    all_pairs: Annotated[
        bool, typer.Option(help="Of more than two completions, ask for each with each.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides which completion stands left.", **SEEDS)] = 0,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any that is free.")
    ] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Choose between two completions, or give thumbs, on a local page: blind, saved, resumed."""
    one_of("--mode", mode, ("auto", "pairs", "thumbs"))
    with user_errors():
        from lora_dpo.labelling import label as ask

        options: Any = {"mode": None if mode == "auto" else mode}
        found = ask(data, to, all_pairs=all_pairs, seed=seed, port=port, browser=browser, **options)
        show(found, False)
