"""Command lines, run in this process: a mistake is one message and an exit code, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from typer.testing import CliRunner

from lora_dpo.cli import app
from lora_dpo.restarting import BEFORE_TRAINING
from tests.campaign.configs import KEYS
from tests.campaign.judging import READ, REFUSED, hold
from tests.campaign.texts import NASTY, texts

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "lora_dpo" / "quickstart"
TARGETS = ("made", "made.yaml", "made.html", "made.jsonl")


@dataclass(frozen=True)
class Line:
    """The words behind ``lora-dpo``."""

    words: tuple[str, ...]


def prepare(folder: Path) -> None:
    """Fill a folder with what command lines name: data, configs, a model without weights, runs without any."""
    model = folder / "model"
    model.mkdir()
    for path in (BUNDLED / "model").iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, model / path.name)
    rows = (BUNDLED / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (folder / "good.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "bad.jsonl").write_text('{"prompt": 1}\n{"pro\n', encoding="utf-8")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "bad.yaml").write_text("model: [\n", encoding="utf-8")
    config: dict[str, Any] = {
        "model": {"base": "model"},
        "data": {"train": "good.jsonl", "eval_fraction": 0, "max_length": 256},
        "train": {"max_steps": 1, "use_cpu": True},
        "output": {"dir": "made", "diagnose": False, "samples": 0},
    }
    (folder / "good.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name, text in (("run", yaml.safe_dump(config)), ("broken-run", "model: 3\n")):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(text, encoding="utf-8")
    (folder / "broken-run" / "run.json").write_text("{", encoding="utf-8")
    (folder / "metrics-run").mkdir()
    (folder / "metrics-run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "metrics-run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"st', "utf-8")
    (folder / "metrics-run" / "run.json").write_text(json.dumps({"steps": 3}), encoding="utf-8")


_plain = [
    text
    for text in NASTY
    if "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
]
_words = st.sampled_from(_plain) | texts.filter(
    lambda t: "\x00" not in t and not any("\ud800" <= c <= "\udfff" for c in t) and len(t) < 3000
)


def _mostly(good: list[str], bad: list[str]) -> st.SearchStrategy[str]:
    """Draw what is right more often than not, so that a line gets past its first word."""
    right, wrong = st.sampled_from(good), st.sampled_from(bad) | _words
    return st.integers(0, 9).flatmap(lambda drawn: right if drawn < 8 else wrong)


_data = _mostly(["good.jsonl"], ["bad.jsonl", "empty.jsonl", "nothing.jsonl", ".", "model"])
_model = _mostly(["model"], ["nowhere", "./nowhere", "run", "good.jsonl"])
_config = _mostly(["good.yaml"], ["bad.yaml", "nothing.yaml", ".", "good.jsonl"])
_run = _mostly(["run", "metrics-run"], ["broken-run", "nothing", "model", "good.yaml"])
_number = _mostly(
    ["1", "2", "3", "64"], ["0", "-1", "1.5", "nan", "inf", "1e400", "9" * 30, "x", "", "true"]
)
_card = _mostly(["2GiB", "rtx4090"], ["0GiB", "nanGiB", "-1GiB", "rtx", "1e400GiB"])
_target = st.sampled_from([*TARGETS, "good.jsonl", "model", "nothing/there"])
_set = st.one_of(
    st.builds(lambda k, v: f"{k}={v}", st.sampled_from(KEYS), _number | _words),
    st.sampled_from(
        ["data=3", "data=null", "data=[1]", "data={1: 2}", "data.rows=1", "data.ids=true", "data.train=x",
         "data.max_length=" + "[" * 2000, "data.columns={prompt: x}", "train.x=&a [*a]", "=", "a", "a=",
         "model=3", "model.base.x=1", "data.template_arguments={1: 2, a: 1}", "data.overflow=error"]
    ),
    _words,
)  # fmt: skip
_checkpoint = st.sampled_from(["final", "best", "3", "-1", "../..", "checkpoint-x", ""])


def _command(name: str, *positional: Any, **options: Any) -> st.SearchStrategy[tuple[str, ...]]:
    """Return lines of a command: its arguments, and some of its options."""

    @st.composite
    def lines(draw: Any) -> tuple[str, ...]:
        words = [name, *(draw(part) for part in positional)]
        for option, value in options.items():
            if draw(st.integers(0, 3)):
                continue
            words.append("--" + option.strip("_").replace("_", "-"))
            words += [draw(value)] if value is not None else []
        if draw(st.integers(0, 30)) == 0:
            words.append(draw(_words))
        return tuple(words)

    return lines()


_many: dict[str, Any] = {"json": None}
COMMANDS = {
    "train": _command("train", _config, set_=_set, resume=None),
    "sft": _command("sft", _config, set_=_set, resume=None),
    "plan": _command("plan", _config, set_=_set, gpu=_card, **_many),
    "inspect": _command(
        "inspect", _data, st.just("--no-readiness"), st.just("--model"), _model, rows=_number,
        max_length=_number, kind=st.sampled_from(["paired", "unpaired", "x"]), eval_=_data, set_=_set,
        html=_target, ids=None, **_many,
    ),
    "init": _command(
        "init", st.just("--model"), _model, st.just("--data"), _data, st.just("--to"), _target,
        st.just("--yes"), objective=_words, gpu=_card, set_=_set, eval_=_data, **_many,
    ),
    "objectives": _command("objectives", _mostly(["dpo", "kto"], ["dpoo", "mixture", "sft"]), markdown=None),
    "diagnose": _command(
        "diagnose", _run, data=_data, model=_model, max_length=_number, samples=_number, rows=_number,
        checkpoint=_checkpoint,
    ),
    "eval": _command("eval", _run, data=_data, checkpoint=_checkpoint, **_many),
    "generate": _command(
        "generate", _run, st.just("--prompt"), _words, checkpoint=_checkpoint, max_new_tokens=_number,
        temperature=_number, seed=_number,
    ),
    "compare": _command(
        "compare", _run, prompts=_mostly(["prompts.txt", "good.jsonl"], ["bad.txt", "bad.jsonl"]), samples=_number,
        limit=_number, max_new_tokens=_number, seed=_number, html=_target, **_many,
    ),
    "score": _command(
        "score", _run, data=_data, prompts=_data, best_of=_number, limit=_number, to=_target, seed=_number,
        checkpoint=_checkpoint, **_many,
    ),
    "sample": _command(
        "sample", _run, st.just("--prompts"), _data, st.just("--to"), _target, k=_number,
        by=_words | st.sampled_from(["judge.py:score", "reward:run", "os:system", "judge:nowhere"]),
        pairs=st.sampled_from(["all", "x"]), min_margin=_number, temperature=_number, seed=_number,
        limit=_number, batch_size=_number, **_many,
    ),
    "export": _command(
        "export", _run, st.just("--to"), _target, checkpoint=_checkpoint, gguf=_words, dtype=_words,
        merge=None, base=_words, overwrite=None, **_many,
    ),
    "report": _command("report", _run, to=_target, overwrite=None, **_many),
    "smoke": _command("smoke", _run, of=_run, base=_model, tolerance=_number, **_many),
    "label": _command(
        "label", st.sampled_from(["bad.jsonl", "empty.jsonl", "nothing.jsonl", "good.yaml"]),
        st.just("--no-browser"), to=_target, mode=_words, seed=_number, port=_number,
    ),
    "nothing": st.lists(_words, max_size=3).map(tuple),
}  # fmt: skip


@st.composite
def lines(draw: Any) -> Line:
    """Draw a command line."""
    return Line(tuple(draw(COMMANDS[draw(st.sampled_from(sorted(COMMANDS)))])))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, and without a network."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def judge(case: Line, folder: Path) -> str:
    """Run a command in a prepared folder; hold that it did what it says, or left nothing."""
    before = set(_files(folder))
    for logger in (logging.getLogger(), logging.getLogger("lora_dpo")):
        logger.handlers.clear()  # that of an earlier case writes to a stream that is closed
    with inside(folder):
        found = CliRunner().invoke(app, list(case.words))
    made = set(_files(folder)) - before
    try:
        error = found.exception
        if error is not None and not isinstance(error, SystemExit):
            raise error
        hold(found.exit_code in (0, 1, 2), f"exit code {found.exit_code}")
        text = found.stderr
        hold("Traceback (most recent" not in found.output, f"a traceback: {found.output[-500:]}")
        hold(
            "--- Logging error" not in found.output,
            f"a log line that failed: {found.output[-500:]}",
        )
        if found.exit_code == 0:
            return READ
        if found.exit_code == 1:
            starts = [line for line in text.splitlines() if line.startswith("error: ")]
            told = len(starts) == 1 or case.words[0] == "smoke"
            hold(told, f"{len(starts)} messages: {text[-500:]}")
        left = {path.name for path in made if path.parts[0] in TARGETS or len(path.parts) == 1}
        hold(left <= BEFORE_TRAINING | {"made"}, f"left behind: {sorted(left)}")
        return REFUSED if found.exit_code == 1 else "wrong usage"
    finally:
        for path in sorted(made, reverse=True):
            whole = folder / path
            shutil.rmtree(whole) if whole.is_dir() else whole.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path.relative_to(folder) for path in folder.rglob("*"))
