"""Commands for looking: at data before a run, and at what became of it."""

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
    RunFolder,
    app,
    finite,
    one_of,
    quiet_libraries,
    show,
    user_errors,
)

PANEL = "Looking"


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo inspect prefs.jsonl --model mistralai/Mistral-7B-v0.1 --html look.html",
)
def inspect(
    data: Annotated[str, typer.Argument(help="Preferences: a file, a folder or a hub id.")],
    model: Annotated[str, typer.Option(help="The base that would be trained.")],
    eval_: Annotated[
        str | None, typer.Option("--eval", help="Held-out preferences, to look for leaks.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows shown token by token.")] = 3,
    ids: Annotated[bool, typer.Option(help="Show token ids.")] = False,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
    kind: Annotated[
        str,
        typer.Option(
            help="What the objective needs: auto, paired, unpaired or demonstrations (sft)."
        ),
    ] = "auto",
    readiness: Annotated[
        bool, typer.Option(help="Load the base in 4 bits and ask what it makes of the answers.")
    ] = True,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of data, as data.columns.prompt=question."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See data as the model will: format, counts, tokens, lengths, and whether the base is ready."""
    one_of("--kind", kind, ("auto", "paired", "unpaired", "demonstrations"))
    with user_errors():
        from lora_dpo.config import data_settings

        settings = data_settings(set_ or [])
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.inspecting import inspect_preferences

        options: Any = {"max_length": max_length, "kind": None if kind == "auto" else kind}
        found = inspect_preferences(
            data, model, held_out=eval_, rows=rows, ids=ids, readiness=readiness,
            **{**options, **settings},
        )  # fmt: skip
        if html is not None:
            found.write_html(html)
        show(found, json_)


@app.command(rich_help_panel=PANEL, epilog="Example: lora-dpo diagnose runs/mistral-7b-dpo")
def diagnose(
    run: Annotated[Path | None, typer.Argument(help="The folder of a run.")] = None,
    data: Annotated[str | None, typer.Option(help="Preferences, before any training.")] = None,
    model: Annotated[str | None, typer.Option(help="The base that would be trained.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a row, with --data.")] = 1024,
    checkpoint: Checkpoint = "final",
    samples: Annotated[int, typer.Option(min=0, help="Of each model; 0 draws none.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Rows looked at, at most.")] = 200,
) -> None:
    """Look for DPO's known failures in a run, or in data before any training."""
    with user_errors():
        from lora_dpo.errors import ConfigError

        if (run is None) is (data is None and model is None) or (
            run is None and not (data and model)
        ):
            raise ConfigError(
                "diagnose: give the folder of a run, or --data FILE with --model BASE."
            )
        quiet_libraries()
        from lora_dpo.diagnostics import Effort
        from lora_dpo.finished import diagnose as diagnose_run
        from lora_dpo.finished import diagnose_preferences

        effort = Effort(rows=rows, samples=samples)
        if run is not None:
            diagnose_run(run, checkpoint=checkpoint, effort=effort).print()
        else:
            assert data is not None and model is not None
            diagnose_preferences(data, model, effort=effort, max_length=max_length).print()


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo eval runs/mistral-7b-dpo --checkpoint best",
    name="eval",
)
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Other preferences than the held-out rows.")
    ] = None,
    checkpoint: Checkpoint = "final",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print held-out metrics with 95 % intervals, clustered by prompt."""
    with user_errors():
        quiet_libraries()
        from lora_dpo.finished import evaluate as run_evaluation

        found = run_evaluation(run, data=data, checkpoint=checkpoint)
        show(found, json_)


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo generate runs/mistral-7b-dpo --prompt 'Why is the sky blue?'",
)
def generate(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    checkpoint: Checkpoint = "final",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS)] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="0: the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(**SEEDS)] = 0,
) -> None:
    """Complete prompts with policy and reference, side by side."""
    with user_errors():
        quiet_libraries()
        from lora_dpo.finished import generate as run_generation

        for found in run_generation(
            run,
            prompt,
            checkpoint=checkpoint,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        ):
            found.print()
            print()


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo report runs/dpo runs/simpo --to out/report.html",
)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, their output.dir.")],
    to: Annotated[Path | None, typer.Option(help="Write the page to this HTML file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put runs on one page: settings, curves, before and after, findings, samples, data, exports."""
    with user_errors():
        from lora_dpo.reporting import report as make_report

        found = make_report(runs, to=to, overwrite=overwrite)
        show(found, json_)
        if to is not None and not json_:
            print(f"page: {to}")


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo compare runs/a runs/b --prompts prompts.txt --html compare.html",
)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that share their base.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="One a line (.txt), a column prompt, or preferences; else held-out ones."
        ),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="The folder of a model, or http(s)://host/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    judge_key: Annotated[
        str | None, typer.Option(help="The environment variable that holds its key.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Answers a prompt of each model.")
    ] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS)] = 128,
    checkpoint: Checkpoint = "final",
    seed: Annotated[int, typer.Option(**SEEDS)] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare policies with their reference on the same prompts: lengths, KL, win rates, answers."""
    with user_errors():
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.comparing import compare as run_comparison

        found = run_comparison(
            list(runs), prompts, judge=judge, judge_model=judge_model, judge_key=judge_key,
            samples=samples, limit=limit, max_new_tokens=max_new_tokens, seed=seed,
            checkpoint=checkpoint,
        )  # fmt: skip
        if html is not None:
            found.write_html(html)
        show(found, json_)


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: lora-dpo score runs/mistral-7b-dpo --data pairs.jsonl --to scores.jsonl",
)
def score(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Pairs, or prompts with completions; a line is scored each.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts to draw samples for, with --best-of.")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_SAMPLES, help="Samples a prompt, ranked by their reward."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many prompts, with --best-of.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Write JSON lines to this new file.")] = None,
    checkpoint: Checkpoint = "final",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a sample, with --best-of; 128 if left out.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the samples; 0 if left out.", **SEEDS)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score completions by a run's implicit reward, or rank n samples a prompt by it."""
    with user_errors():
        from lora_dpo.errors import ConfigError

        if (data is None) is (prompts is None) or (prompts is None) is not (best_of is None):
            raise ConfigError("score: give --data FILE, or --prompts FILE with --best-of N.")
        sampling = {"--limit": limit, "--max-new-tokens": max_new_tokens, "--seed": seed}
        given = [name for name, value in sampling.items() if value is not None]
        if data is not None and given:
            raise ConfigError(f"score: {', '.join(given)} belongs to --best-of; leave it out.")
        quiet_libraries(sys.stderr if json_ else None)
        from lora_dpo.prompts import read_prompts
        from lora_dpo.run_folder import Run
        from lora_dpo.scoring import best_of as rank_samples
        from lora_dpo.scoring import score_run
        from lora_dpo.store import refuse_existing

        if to is not None:
            refuse_existing(to)
        opened = Run.open(run)
        found: Any
        if data is not None:
            found = score_run(opened, data, checkpoint=checkpoint)
        else:
            found = rank_samples(
                opened, None, read_prompts(opened, prompts, limit=limit), n=best_of or 1,
                max_new_tokens=max_new_tokens or 128, seed=seed or 0, checkpoint=checkpoint,
            )  # fmt: skip
        if to is not None:
            found.write(to)
        show(found, json_)
