"""The pages of ``docs/`` as what can be run: their blocks, and a folder that looks like a checkout."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from lora_dpo.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# All that differs from a checkout: so few rows of the bundled data, and these settings.
ROWS = {"train.jsonl": 32, "heldout.jsonl": 12, "eval_prompts.jsonl": 6}
SETTINGS = {
    "train.per_device_train_batch_size": 4,
    "train.max_steps": 4,
}
# A diagnosis and samples take longer than such a run. The shared run has both.
QUICK = {"output.diagnose": False, "output.samples": 0}
OF_A_PAGE = {"howto/watch.md": {"output.diagnose": False}}
# What the pages call their run; the command is the one that makes it.
RUN = Path("runs/quickstart")
TRAINING = "lora-dpo train configs/quickstart.yaml"
# Made by docs/_make: no page of these is written by hand.
GENERATED = {"objectives", "api", "notebooks", "_build", "_make", "_static", "tables"}

_MARK = re.compile(r"^<!-- (not-run|file): (.+?) -->$")
_FENCE = re.compile(r"^(`{3,}|:{3,})\s*(\S*).*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what it is, what it holds, and what the comment above it says."""

    page: str
    line: int
    kind: str
    text: str
    not_run: str = ""
    file: str = ""

    @property
    def where(self) -> str:
        return f"docs/{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line behind a prompt, and what the page shows of its output."""

    line: str
    shown: str

    @property
    def error(self) -> str:
        """The message that it is expected to end with; empty where it is expected to work."""
        place = self.shown.find("error: ")
        return self.shown[place:] if place >= 0 else ""


def pages() -> list[str]:
    """Return the pages that are written by hand, by path below ``docs``."""
    found = (path.relative_to(DOCS) for path in DOCS.rglob("*.md"))
    return sorted(str(path) for path in found if path.parts[0] not in GENERATED)


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found: list[Block] = []
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    marks: dict[str, str] = {}
    at = 0
    while at < len(lines):
        line = lines[at]
        if mark := _MARK.match(line):
            marks[mark[1]] = mark[2]
        elif fence := _FENCE.match(line):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence[1])
            text = "\n".join(lines[at + 1 : end]) + "\n"
            found.append(
                Block(page, at + 1, fence[2], text, marks.get("not-run", ""), marks.get("file", ""))
            )
            marks, at = {}, end
        elif line.strip():
            marks = {}
        at += 1
    return found


def commands(block: Block) -> list[Command]:
    """Return the commands of a console block, continued lines joined."""
    text = block.text.replace("\\\n", " ")
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"{block.where}: output before the first command"
    found = []
    for part in parts[1:]:
        line, _, shown = part.partition("\n")
        found.append(Command(" ".join(line.split()), shown))
    return found


def make_checkout(folder: Path, settings: Mapping[str, Any] = QUICK) -> None:
    """Fill a folder so that paths of a checkout are there, with little data and short training.

    Args:
        folder: what is filled.
        settings: of the quickstart's config, beside SETTINGS.
    """
    bundled, there = ROOT / "lora_dpo" / "quickstart", folder / "lora_dpo" / "quickstart"
    (there / "data").mkdir(parents=True)
    for name, count in ROWS.items():
        rows = (bundled / "data" / name).read_text(encoding="utf-8").splitlines()[:count]
        (there / "data" / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.symlink(bundled / "model", there / "model")
    os.symlink(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for path in (folder / "configs").glob("quickstart*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in {**SETTINGS, **settings}.items():
            section, name = key.split(".")
            config[section][name] = value
        path.write_text(yaml.safe_dump(config), encoding="utf-8")


class Reader:
    """Goes through a page as its reader would, in a folder made by ``make_checkout``."""

    def __init__(self, run: Path) -> None:
        self.run = run  # a finished run of TRAINING, for pages that begin with one
        self.names: dict[str, Any] = {"__name__": "page"}

    def read(self, page: str) -> None:
        """Run every block of a page; the current folder is the checkout."""
        found = blocks(page)
        shown = [c for block in found if block.kind == "console" for c in commands(block)]
        trains = any(command.line == TRAINING for command in shown)
        if not trains and any(str(RUN) in block.text for block in found):
            shutil.copytree(self.run, RUN)
        for block in found:
            if block.file:
                Path(block.file).parent.mkdir(parents=True, exist_ok=True)
                Path(block.file).write_text(block.text, encoding="utf-8")
            if block.not_run:
                continue
            if block.kind == "console":
                for command in commands(block):
                    self._command(block, command)
            elif block.kind == "python" and not block.file:
                code = compile("\n" * block.line + block.text, str(DOCS / page), "exec")
                exec(code, self.names)

    def _command(self, block: Block, command: Command) -> None:
        if command.line == TRAINING and not command.error:
            shutil.copytree(self.run, RUN)
            return
        code, output = call(command.line)
        told = f"{block.where}: {command.line}\n{output}"
        if command.error:
            assert code == 1, told
            place = output.find("error: ")
            assert _quotes(command.error, output[place:]), told
        else:
            assert code == 0, told


def _quotes(shown: str, real: str) -> bool:
    """Whether a page shows a message: lines may be wrapped, and ``...`` stands for what differs."""
    parts = (re.escape(part) for part in " ".join(shown.split()).split("..."))
    return re.fullmatch(".+?".join(parts), " ".join(real.split())) is not None


def call(line: str) -> tuple[int, str]:
    """Run a command of a page in this process; return its exit code and all its output."""
    program, *words = shlex.split(line, comments=True)
    if program == "lora-dpo":
        found = CliRunner().invoke(app, words)
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return found.exit_code, found.output
    if program == "cat":
        return 0, "".join(Path(word).read_text(encoding="utf-8") for word in words)
    assert program == "python", f"{line}: neither lora-dpo nor python; mark the block as not-run"
    before = sys.argv
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before
    return 0, ""


def lines_of(path: Path) -> list[Any]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
