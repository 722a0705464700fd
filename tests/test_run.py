"""Whole runs through the command and through Python, and every bad input that a user can give."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lora_dpo
from lora_dpo.checkpoints import list_checkpoints
from lora_dpo.cli import app
from lora_dpo.config import Config
from lora_dpo.errors import OutputError, TrainingError
from lora_dpo.finished import evaluate, generate
from lora_dpo.handing import export
from lora_dpo.policy import bases
from lora_dpo.restarting import check_start, found_in, started
from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.store import MANIFEST


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory, pairs: list[dict[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def _values(tiny_model: Path, preferences: Path, out: Path) -> dict[str, Any]:
    return {
        "objective": {"name": "dpo", "beta": 0.2},
        "model": {"base": str(tiny_model)},
        "lora": {"rank": 4},
        "data": {"train": str(preferences), "eval_fraction": 0.25, "max_length": 128},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "use_cpu": True,
        },
        "output": {"dir": str(out)},
    }


@pytest.fixture(scope="module")
def values(tiny_model: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _values(tiny_model, preferences, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def run(values: dict[str, Any]) -> Run:
    return train(values)


def test_a_run_leaves_all_that_is_needed_to_read_and_repeat_it(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "run.json", "data.json", "metrics.jsonl", "adapter"} <= names
    again = Run.open(run.folder)
    assert again.config == run.config
    assert again.results == json.loads(json.dumps(run.results))
    assert again.results["reference"] == "the base model with its adapters disabled"
    assert again.results["versions"]["torch"] == torch.__version__
    assert again.results["rows"] == {"train": 12, "held_out": 4}
    losses = [entry["loss"] for entry in again.history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.6


def test_an_evaluation_from_disk_gives_the_figures_of_the_run(run: Run) -> None:
    found = evaluate(run.folder)
    stored = run.results["held_out"]["mean_low_high"]
    for name, estimate in found.estimates.items():
        assert [estimate.mean, estimate.low, estimate.high] == pytest.approx(stored[name], abs=1e-4)


def test_a_run_on_unpaired_rows_is_evaluated_from_disk(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Its rows carry completions of other prompts, which count in the fingerprint of the data."""
    kto = train({**values, "objective": "kto", "output": {"dir": str(tmp_path / "kto")}})
    stored = kto.results["held_out"]["mean_low_high"]
    for name, estimate in evaluate(kto.folder).estimates.items():
        assert estimate.mean == pytest.approx(stored[name][0], rel=1e-4, abs=1e-4)


def test_checkpoints_final_and_best_can_be_named(run: Run) -> None:
    newest = max(int(p.name.split("-")[1]) for p in run.folder.glob("checkpoint-*"))
    final, last = evaluate(run), evaluate(run, checkpoint=str(newest))
    assert last["loss"].mean == pytest.approx(final["loss"].mean, abs=1e-6)
    best = evaluate(run, checkpoint="best")
    assert best["loss"].mean <= final["loss"].mean + 1e-6


def test_generations_stand_side_by_side_and_the_reference_is_the_base(
    run: Run, tiny_model: Path
) -> None:
    (found,) = generate(run, ["Question 3"], max_new_tokens=8)
    base = run.load_policy()
    tokenizer = run.tokenizer()
    ids = torch.tensor([tokenizer("Question 3")["input_ids"]])
    with lora_dpo.reference(base):
        out = base.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert found.reference == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.policy != found.reference
    assert generate(run, ["Question 3"], max_new_tokens=8, temperature=1.0, seed=3) == generate(
        run, ["Question 3"], max_new_tokens=8, temperature=1.0, seed=3
    )


def test_a_merged_export_has_its_proof_in_the_card_and_no_path_of_this_machine(
    run: Run, tmp_path: Path
) -> None:
    proof = export(run, tmp_path / "merged", merge=True).proof
    assert proof is not None and proof.kl < 1e-8
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "KL(policy || exported)" in card
    assert "dpo(beta=0.2" in card
    assert str(tmp_path.parent) not in card
    assert export(run, tmp_path / "adapter").proof is None
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_an_adapter_is_started_from_and_is_then_the_reference(
    run: Run, values: dict[str, Any], tmp_path: Path
) -> None:
    values = {**values, "lora": {}, "output": {"dir": str(tmp_path / "second")}}
    config = Config.parse(values)
    second = train(config.replace("model.adapter", str(run.folder / "adapter")))
    assert second.results["reference"].startswith("the starting adapter, frozen")
    assert (second.folder / "reference" / "adapter_model.safetensors").is_file()
    first_loss = next(entry["loss"] for entry in second.history if "loss" in entry)
    assert first_loss == pytest.approx(0.693147, abs=1e-4)
    stored = second.results["held_out"]["mean_low_high"]["loss"][0]
    assert evaluate(second)["loss"].mean == pytest.approx(stored, abs=1e-4)


def test_the_command_does_what_python_does(
    run: Run, values: dict[str, Any], tmp_path: Path
) -> None:
    """A real subprocess; the same config gives the same numbers."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lora_dpo", "train", str(path), "--set", f"output.dir={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "self-check: policy = reference" in done.stdout
    assert "Warning" not in done.stderr
    assert not re.search(r"[\r\x1b\x08]", done.stdout + done.stderr)  # a pipe gets plain lines
    assert Run.open(out).results["held_out"] == run.results["held_out"]


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_to_the_same_end(
    run: Run, values: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL in mid-run, then --resume: the adapter equals the uninterrupted one byte for byte."""
    out = tmp_path / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    sets = ["--set", f"output.dir={out}", "--set", "train.save_steps=1"]
    command = [sys.executable, "-m", "lora_dpo", "train", str(path), *sets]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-2" / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (out / "adapter").exists()
    train(Config.load(path, [s for s in sets if s != "--set"]), resume=True)
    mine, whole = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (out, run.folder)
    )
    assert mine == whole


# ---- bad input: one message, exit code 1, no traceback, before weights load, nothing written ----


@pytest.fixture
def command(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``lora-dpo train`` on the good config with changes; weights must not load."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(bases.AutoModelForCausalLM, "from_pretrained", refuse)

    def invoke(*sets: str, rows: str | None = None, arguments: tuple[str, ...] = ()) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        given = [f"output.dir={tmp_path / 'out'}", *sets]
        if rows is not None:
            (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
            given.append(f"data.train={tmp_path / 'rows.jsonl'}")
        options = [word for text in given for word in ("--set", text)]
        before = sorted(tmp_path.iterdir())
        found = CliRunner().invoke(app, ["train", str(path), *options, *arguments])
        assert found.exit_code == 1, found.output
        assert found.exception is None or isinstance(found.exception, SystemExit)
        assert "Traceback" not in found.output
        assert "error: " in found.output
        assert sorted(tmp_path.iterdir()) == before
        return str(found.output)

    return invoke


PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def test_unknown_keys_and_wrong_values_are_told_together(command: Any) -> None:
    told = command("train.learning_rat=1", "objective.beta=-1", "lora.rank=abc", "data.nope=1")
    assert "Did you mean 'learning_rate'?" in told
    assert "objective.beta: got -1" in told
    assert "lora.rank: got 'abc'" in told
    assert "data.nope: unknown key" in told


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", "rows.jsonl"),
        (PAIR + "{broken\n", "rows.jsonl:2"),
        ('{"prompt": "a", "chosen": "b"}\n', "rejected"),
        (PAIR + '{"prompt": "a", "chosen": 3, "rejected": "c"}\n', "rows.jsonl:2"),
        (PAIR + '{"prompt": "a", "chosen": "", "rejected": "c"}\n', "rows.jsonl:2"),
        (PAIR + '{"prompt": "a", "completion": "b", "label": true}\n', "rows.jsonl"),
        ('{"prompt": "a", "completion": "b", "label": true}\n', "unpaired"),
    ],
)
def test_data_that_cannot_be_used_is_told_with_file_and_line(
    command: Any, rows: str, told: str
) -> None:
    assert told in command(rows=rows)


def test_a_missing_file_a_model_that_is_none_and_missing_hardware_are_told(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "missing.jsonl" in command(f"data.train={tmp_path}/missing.jsonl")
    assert "no causal language model" in command(f"model.base={tmp_path}")

    def broken() -> Any:
        raise ImportError("no kernel for this machine")

    monkeypatch.setattr(bases, "import_bitsandbytes", broken)
    assert "bitsandbytes does not work on this machine" in command()


def test_sides_that_become_identical_by_truncation_are_told(command: Any) -> None:
    rows = '{"prompt": "abc", "chosen": "same start yes", "rejected": "same start no"}\n' * 2
    told = command("data.max_length=8", "data.overflow=truncate-completion", rows=rows)
    assert "rows.jsonl:1" in told and "identical" in told


def test_an_output_folder_in_use_and_a_resume_of_nothing_are_told(
    command: Any, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert "already and is not empty" in command()
    assert "no run there to resume" in command(arguments=("--resume",))
    assert "a run that has ended (6 steps)" in command(f"output.dir={run.folder}")


def test_a_run_that_has_ended_is_left_as_it_is_by_a_resume(
    run: Run, values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", "lora_dpo"):
        again = train(values, resume=True)
    assert again.results == json.loads(json.dumps(run.results))
    assert "a run that has ended (6 steps); nothing is left to do" in caplog.text
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before


def test_a_checkpoint_that_is_not_whole_is_not_evaluated(run: Run) -> None:
    (newest, *_) = reversed(list_checkpoints(run.folder))
    sealed = (newest / MANIFEST).read_bytes()
    step = newest.name.removeprefix("checkpoint-")
    assert run.adapter_folder(step) == newest
    for damage in (b"", sealed.replace(b'"bytes": ', b'"bytes": 1', 1)):
        (newest / MANIFEST).write_bytes(damage)
        with pytest.raises(OutputError):
            run.adapter_folder(step)
    (newest / MANIFEST).write_bytes(sealed)


def test_a_folder_that_another_run_has_taken_meanwhile_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """Between the first look at the folder and its lock lies the reading of the data."""
    config = Config.parse({**values, "output": {"dir": str(tmp_path / "run")}})
    found = check_start(tmp_path / "run", config, resume=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    taken = pytest.raises(OutputError, match="another process has written here")
    with taken, started(tmp_path / "run", config, found):
        raise AssertionError("started")
    assert found_in(tmp_path / "run").state == "begun"


def test_a_reference_of_a_start_that_failed_is_no_part_of_the_next_one(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """It would be taken for the frozen starting adapter of a run that has none."""
    config = Config.parse({**values, "output": {"dir": str(tmp_path / "run")}})
    (tmp_path / "run" / "reference").mkdir(parents=True)
    found = check_start(tmp_path / "run", config, resume=False)
    with started(tmp_path / "run", config, found):
        assert not (tmp_path / "run" / "reference").exists()


def test_a_resume_with_another_config_is_refused_and_the_run_kept(
    run: Run, values: dict[str, Any]
) -> None:
    before = (run.folder / "config.yaml").read_bytes()
    other = Config.parse(values).replace("objective.beta", 0.7)
    with pytest.raises(TrainingError, match=r"saved by another run \(objective: "):
        train(other, resume=True)
    assert (run.folder / "config.yaml").read_bytes() == before


def test_wrong_usage_exits_with_2() -> None:
    assert CliRunner().invoke(app, ["train"]).exit_code == 2
    assert CliRunner().invoke(app, ["export", "x", "--to", "y", "--base", "z"]).exit_code == 2
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2


def test_commands_on_a_folder_that_is_no_run_say_so(tmp_path: Path) -> None:
    for arguments in (
        ["eval"],
        ["export", "--to", str(tmp_path / "x")],
        ["generate", "--prompt", "a"],
    ):
        found = CliRunner().invoke(app, [arguments[0], str(tmp_path), *arguments[1:]])
        assert found.exit_code == 1
        assert "no run there" in found.output


def test_the_environment_of_the_tests_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
