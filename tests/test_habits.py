"""What Python users count on: examples in every help, completion, pickles, types, a quiet import."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import lora_dpo
from lora_dpo.cli import app
from lora_dpo.config import Config

ROOT = Path(__file__).parents[1]
HELDOUT = ROOT / "lora_dpo" / "quickstart" / "data" / "heldout.jsonl"
MODEL = ROOT / "lora_dpo" / "quickstart" / "model"
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_it(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"Example: lora-dpo {name}" in " ".join(shown.output.split())


def test_a_shell_completes_commands() -> None:
    """By the protocol of typer's own bash completion."""
    asked = {
        "_LORA_DPO_COMPLETE": "complete_bash",
        "COMP_WORDS": "lora-dpo ex",
        "COMP_CWORD": "1",
    }
    code = "from lora_dpo.cli import app; app(prog_name='lora-dpo')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["export"], done.stderr


def test_importing_every_public_name_touches_neither_the_gpu_nor_the_network() -> None:
    code = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        print("touched", event, args[:2]); sys.stdout.flush()
sys.addaudithook(watch)
import lora_dpo
for name in lora_dpo.__all__:
    getattr(lora_dpo, name)
import torch
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "touched" not in done.stdout and "lora_dpo" not in done.stderr


@pytest.mark.parametrize("name", [n for n in lora_dpo.__all__ if n != "objectives"])
def test_every_public_name_is_documented_and_typed(name: str) -> None:
    thing = getattr(lora_dpo, name)
    assert (inspect.getdoc(thing) or "").strip().endswith((".", ":", "`", ")", "]", "```")), name
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        given = [p.annotation for p in signature.parameters.values()] + [
            signature.return_annotation
        ]
        assert inspect.Signature.empty not in given, name


def _results() -> dict[str, Any]:
    config = Config.load(ROOT / "configs" / "quickstart.yaml")
    look = lora_dpo.inspect_preferences(HELDOUT, MODEL, max_length=256, readiness=False)
    return {
        "config": config,
        "objective": lora_dpo.objectives.get("kto").bind(beta=0.2),
        "plan": lora_dpo.plan(config, gpu="2GiB"),
        "inspection": look,
        "checkup": lora_dpo.doctor(),
        "preferences": lora_dpo.load_preferences(HELDOUT),
    }


def test_results_survive_pickling_and_are_shown() -> None:
    for name, thing in _results().items():
        again = pickle.loads(pickle.dumps(thing))
        assert again == thing, name
        assert len(repr(thing)) < 2000, f"{name}: {repr(thing)[:80]}"
        assert str(again) == str(thing), name
        if name not in ("config", "objective", "preferences"):
            assert thing._repr_html_().startswith("<div"), name


def test_all_errors_are_one_tree() -> None:
    from lora_dpo import errors

    raised = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, Exception)]
    assert len(raised) > 5
    for error in raised:
        assert issubclass(error, lora_dpo.LoraDpoError)
        assert str(pickle.loads(pickle.dumps(error("where: what")))) == "where: what"
