"""What the commands share: the app, common options, errors as one message, quiet libraries."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

# Before torch is imported: threads that wait by spinning make a CPU run many times slower as soon
# as anything else runs beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preference tuning of 4-bit models with LoRA on one GPU.",
)


def finite(value: float | None) -> float | None:
    """Refuse ``nan`` and ``inf``, which the command line reads as numbers."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


# What torch and numpy both take as a seed; more than anyone draws.
SEEDS: dict[str, int] = {"min": 0, "max": 2**32 - 1}
MOST_TOKENS, MOST_SAMPLES = 2**20, 10_000

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, as objective.beta=0.05.")
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, its output.dir.")]
Checkpoint = Annotated[str, typer.Option(help="final, best, or the step of a checkpoint.")]


@contextmanager
def user_errors() -> Iterator[None]:
    from lora_dpo.errors import LoraDpoError

    try:
        yield
    except LoraDpoError as error:
        from lora_dpo.showing import visible

        # a message may hold a piece of the data
        lines = [visible(line) for line in str(error).split("\n")]
        number = os.environ.get("RANK", "0")  # of several processes
        where = f"process {number}: " if number != "0" else ""
        print(f"{where}error: " + "\n".join(lines), file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a folder that may not be written to
        from lora_dpo.showing import visible

        print(f"error: {visible(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None


def one_of(option: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise typer.BadParameter(f"{option} {value}: expected one of {', '.join(legal)}.")


def quiet_libraries(stream: TextIO | None = None) -> None:
    """Our own lines on the console; of the libraries only what a user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lora_dpo.showing import Lines

    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lora_dpo").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    if not sys.stderr.isatty():
        theirs.disable_progress_bar()


def show(found: Any, as_json: bool) -> None:
    """Print a result for people, or as JSON for programs."""
    if as_json:
        import json

        print(json.dumps(found.to_dict(), indent=2))
    elif hasattr(found, "print"):
        found.print()
    else:
        print(found)
