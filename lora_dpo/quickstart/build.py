"""Builds what the quickstart ships: `python -m lora_dpo.quickstart.build all --to DIR`.

`model` writes DIR/model, `preferences` draws the pairs of DIR/data from that model, `all` does
both. Each folder gets a BUILD.json which states how it was made and what was measured.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_dpo.quickstart import HERE

STEPS = 2500
"""Training steps; about 13 minutes on two cores."""


def versions() -> dict[str, str]:
    """The versions that the built files depend on."""
    found = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"python": platform.python_version(), **found}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes and prints the facts of one build."""
    text = json.dumps(facts | {"versions": versions()}, indent=2)
    (folder / "BUILD.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the quickstart's model and preferences.")
    parser.add_argument("what", nargs="?", choices=["model", "preferences", "all"], default="all")
    parser.add_argument("--to", type=Path, default=HERE, help="folder that gets model/ and data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the model")
    chosen = parser.parse_args(arguments)
    if chosen.what in ("model", "all"):
        from lora_dpo.quickstart.base_model import build_model

        folder = chosen.to / "model"
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder, build_model(folder, chosen.seed, chosen.steps))
    if chosen.what in ("preferences", "all"):
        from lora_dpo.quickstart.pairs import build_preferences

        folder = chosen.to / "data"
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder, build_preferences(chosen.to / "model", folder, chosen.seed))


if __name__ == "__main__":
    main()
