"""The command ``lora-dpo``: each subcommand hands on to the Python function of the same name.

Nothing heavy is imported before a subcommand runs. Exit codes: 0 done, 1 a mistake that the user
can correct (one message, no traceback), 2 wrong usage.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

# Before torch is imported: threads that wait by spinning make a CPU run many times slower as soon
# as anything else runs beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
# Likewise: rows of all lengths leave holes in memory that is cut into fixed pieces.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preference tuning of 4-bit models with LoRA on one GPU.",
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, as objective.beta=0.05.")
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, its output.dir.")]
Checkpoint = Annotated[str, typer.Option(help="final, best, or the step of a checkpoint.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/ holds commented ones.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint.")] = False,
) -> None:
    """Train a policy on preferences against its reference."""
    with _user_errors():
        from lora_dpo.config import Config

        checked = Config.load(config, set_ or [])
        _quiet_libraries()
        from lora_dpo.run import train as run_training

        run_training(checked, resume=resume)


@app.command(epilog="Example: lora-dpo plan configs/mistral-7b-dpo.yaml --gpu rtx3060")
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for train.")],
    gpu: Annotated[
        str | None, typer.Option(help="A card or its memory, as rtx4090 or 12GiB; else this one's.")
    ] = None,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether a run fits a card, before any weight loads: bytes by part, time, remedies."""
    with _user_errors():
        from lora_dpo.config import Config

        checked = Config.load(config, set_ or [])
        _quiet_libraries()
        import json

        from lora_dpo.planning import plan as make_plan

        found = make_plan(checked, gpu=gpu)
        print(json.dumps(found.to_dict(), indent=2) if json_ else found)


@app.command(name="eval")
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Other preferences than the held-out rows.")
    ] = None,
    checkpoint: Checkpoint = "final",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print held-out metrics with 95 % intervals, clustered by prompt."""
    with _user_errors():
        _quiet_libraries()
        import json

        from lora_dpo.run import evaluate as run_evaluation

        found = run_evaluation(run, data=data, checkpoint=checkpoint)
        print(json.dumps(found.to_dict(), indent=2) if json_ else found)


@app.command()
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
    with _user_errors():
        from lora_dpo.errors import ConfigError

        if (run is None) is (data is None and model is None) or (
            run is None and not (data and model)
        ):
            raise ConfigError(
                "diagnose: give the folder of a run, or --data FILE with --model BASE."
            )
        _quiet_libraries()
        from lora_dpo.diagnostics import Effort
        from lora_dpo.run import diagnose as diagnose_run
        from lora_dpo.run import diagnose_preferences

        effort = Effort(rows=rows, samples=samples)
        if run is not None:
            print(diagnose_run(run, checkpoint=checkpoint, effort=effort))
        else:
            assert data is not None and model is not None
            print(diagnose_preferences(data, model, effort=effort, max_length=max_length))


@app.command(
    epilog="Example: lora-dpo inspect prefs.jsonl --model mistralai/Mistral-7B-v0.1 --html look.html"
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
        str, typer.Option(help="What the objective needs: auto, paired or unpaired.")
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
    _one_of("--kind", kind, ("auto", "paired", "unpaired"))
    with _user_errors():
        from lora_dpo.config import data_settings

        settings = data_settings(set_ or [])
        _quiet_libraries(sys.stderr if json_ else None)
        import json

        from lora_dpo.inspecting import inspect_preferences

        options: Any = {"max_length": max_length, "kind": None if kind == "auto" else kind}
        found = inspect_preferences(
            data, model, held_out=eval_, rows=rows, ids=ids, readiness=readiness,
            **{**options, **settings},
        )  # fmt: skip
        if html is not None:
            found.write_html(html)
        if json_:
            print(json.dumps(found.to_dict(), indent=2))
        else:
            found.print()


@app.command(epilog="Example: lora-dpo doctor --json")
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, GPU, 4-bit kernels, disk, memory and known traps; exit 1 if one blocks."""
    with _user_errors():
        import json

        from lora_dpo.checkup import doctor as run_checks

        found = run_checks()
        if json_:
            print(json.dumps(found.to_dict(), indent=2))
        else:
            found.print()
    if found.blocks:
        raise typer.Exit(1)


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")],
    checkpoint: Checkpoint = "final",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: int = 0,
) -> None:
    """Complete prompts with policy and reference, side by side."""
    with _user_errors():
        _quiet_libraries()
        from lora_dpo.run import generate as run_generation

        for found in run_generation(
            run,
            prompt,
            checkpoint=checkpoint,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        ):
            print(found, end="\n\n")


@app.command()
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
    _one_of("--base", base, ("trained", "original"))
    _one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    with _user_errors():
        _quiet_libraries()
        from lora_dpo.run import export as run_export

        options: Any = {"base": base, "dtype": dtype}
        proof = run_export(
            run, to, merge=merge, checkpoint=checkpoint, overwrite=overwrite, **options
        )
        print(f"{proof}\nmerged model: {to}" if proof else f"adapter: {to}")


@app.command()
def objectives(
    name: Annotated[str | None, typer.Argument(help="One objective.")] = None,
    markdown: Annotated[bool, typer.Option(help="The table in Markdown.")] = False,
) -> None:
    """Print the table of objectives, or one objective's formula, hyperparameters and source."""
    with _user_errors():
        from lora_dpo import objectives as table
        from lora_dpo.describe import describe_objective, describe_table, markdown_table

        if name:
            print(describe_objective(table.get(name)))
        else:
            print(markdown_table() if markdown else describe_table())


@app.command()
def quickstart(
    to: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("quickstart-run"),
) -> None:
    """Run the main job on the bundled small model, offline, in a few minutes."""
    with _user_errors():
        _quiet_libraries()
        from lora_dpo.quickstart.main import run_quickstart

        run_quickstart(to)


def main() -> None:
    """Run the command."""
    app()


@contextmanager
def _user_errors() -> Iterator[None]:
    from lora_dpo.errors import LoraDpoError

    try:
        yield
    except LoraDpoError as error:
        from lora_dpo.showing import visible

        # a message may hold a piece of the data
        lines = [visible(line) for line in str(error).split("\n")]
        print("error: " + "\n".join(lines), file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a folder that may not be written to
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def _one_of(option: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise typer.BadParameter(f"{option} {value}: expected one of {', '.join(legal)}.")


def _quiet_libraries(stream: TextIO | None = None) -> None:
    """Our own lines on the console; of the libraries only what a user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=stream or sys.stdout)
    logging.getLogger("lora_dpo").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    if not sys.stderr.isatty():
        theirs.disable_progress_bar()


Command = Callable[..., None]

if __name__ == "__main__":
    main()
