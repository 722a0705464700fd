"""What a resumed run goes on from: the same weights, all of its log, its counts, none but its own files."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from lora_dpo import objectives
from lora_dpo.callbacks import JsonlCallback
from lora_dpo.checkpoints import list_checkpoints, rotate, seal_checkpoint
from lora_dpo.config import Config, LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import ModelError, OutputError, TrainingError
from lora_dpo.policy import load_policy, weights_identity
from lora_dpo.restarting import storage_faults
from lora_dpo.run import train
from lora_dpo.stepping import longest_row, row_length
from lora_dpo.store import write_json
from lora_dpo.surroundings import ENVIRONMENT, as_it_began
from lora_dpo.trainer import PreferenceTrainer


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenise(load_preferences(pairs[:8]), tokenizer, max_length=128)


def _policy(model: Path, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(3)
    return load_policy(model, lora=LoraConfig(rank=2, dropout=dropout))


def _trainer(
    policy: PeftModel, rows: Tokenised, folder: Path, objective: str = "dpo", **changes: Any
) -> PreferenceTrainer:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(folder), **{**values, **changes})
    bound = objectives.get(objective).bind()
    trainer = PreferenceTrainer(policy, objective=bound, args=args, train_data=rows)
    trainer.write_metrics_to(folder / "metrics.jsonl")
    return trainer


# ---- the same weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_a_base_that_differs_in_one_weight_is_another_with_a_reference_and_without(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, objective: str
) -> None:
    """A change that moves no log-prob by what arithmetic moves it: the bytes tell."""
    _trainer(_policy(tiny_model), rows, tmp_path, objective).train()
    changed = _policy(tiny_model)
    weight = next(p for p in changed.parameters() if p.is_floating_point() and not p.requires_grad)
    weight.data.view(-1)[0] += 1e-3
    with pytest.raises(TrainingError, match="is not the one that this run began with"):
        _trainer(changed, rows, tmp_path, objective).train(resume_from_checkpoint=True)


def test_training_leaves_the_hash_of_base_and_reference_as_it_is(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    trainer = _trainer(_policy(tiny_model), rows, tmp_path)
    before = weights_identity(trainer.model)
    trainer.train()
    assert weights_identity(trainer.model) == before == weights_identity(_policy(tiny_model))


def test_a_base_that_was_replaced_under_its_path_is_refused_before_weights_load(
    tiny_model: Path,
    pairs: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:8]))
    config = {
        "model": {"base": str(base)},
        "data": {"train": str(data), "max_length": 128},
        "objective": {"name": "simpo"},
        "lora": {"rank": 2},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "save_steps": 1,
        },
        "output": {"dir": str(tmp_path / "run"), "diagnose": False},
    }
    config["train"] |= {"use_cpu": True}  # type: ignore[operator]
    train(config, stop_after=2)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr("lora_dpo.run.load_policy", lambda *a, **k: pytest.fail("weights loaded"))
    with pytest.raises(ModelError, match=r"model.base .* \(model.safetensors differ\)"):
        train(config, resume=True)


def test_a_resume_takes_the_commit_of_the_hub_that_the_run_began_with(tmp_path: Path) -> None:
    sections = {"model": {"base": "owner/name"}, "data": {"train": "x.jsonl"}}
    config = Config.parse({**sections, "output": {"dir": "run"}})
    assert as_it_began(config, tmp_path) == config
    write_json(tmp_path / ENVIRONMENT, {"base": {"commit": "abc"}, "sessions": []})
    assert as_it_began(config, tmp_path).model.revision == "abc"
    pinned = config.replace("model.revision", "mine")
    assert as_it_began(pinned, tmp_path) == pinned


# ---- the log ------------------------------------------------------------------------------------


def test_a_damaged_log_keeps_every_line_that_can_be_read_and_stays_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint holds the last lines alone; the older ones are in the file or nowhere."""
    path = tmp_path / "metrics.jsonl"
    entries: list[dict[str, Any]] = []
    for step in range(1, 11):
        entries.append({"loss": 1 / step, "step": step})
        entries += [{"eval_loss": 2 / step, "step": step}] if step % 5 == 0 else []
    lines = [json.dumps(entry) + "\n" for entry in entries]
    path.write_text("".join(lines))
    callback = JsonlCallback(path)
    mark = {"bytes": path.stat().st_size, "sha256": "of what was written"}
    lines[2] = lines[2].replace("{", "\x1b", 1)  # a bit of the third line
    path.write_text("".join(lines) + json.dumps({"loss": 9.0, "step": 11}) + "\n")
    damaged = path.read_bytes()
    held = [e for e in entries if e["step"] >= 8 or "eval_loss" in e]

    class State:
        is_world_process_zero, global_step, log_history = True, 10, held

    callback.resume(mark)
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        callback.on_train_begin(None, State())  # type: ignore[arg-type]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        entry for entry in entries if entry != {"loss": 1 / 3, "step": 3}
    ]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged
    assert "5 last lines" not in caplog.text and "last 5 lines" in caplog.text
    assert "6 older ones that can be read" in caplog.text


def test_nothing_is_cut_off_or_appended_through_a_link(tmp_path: Path) -> None:
    """A checkpoint from elsewhere can say that nothing was logged yet, and the log lead anywhere."""
    target = tmp_path / "mine.txt"
    target.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(target)
    callback = JsonlCallback(tmp_path / "run" / "metrics.jsonl")
    callback.resume(
        {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    )

    class State:
        is_world_process_zero, global_step, log_history = True, 0, ()

    with pytest.raises(OutputError, match="is a link"):
        callback.on_train_begin(None, State())  # type: ignore[arg-type]
    assert target.read_text() == "kept"


# ---- checkpoints --------------------------------------------------------------------------------


def _sealed(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    seal_checkpoint(folder, {})
    return folder


def test_rotation_reads_back_the_checkpoint_just_written_and_leaves_later_ones_alone(
    tmp_path: Path,
) -> None:
    """Behind a damaged one of step 12 the run was resumed from 8, and was stopped at 9."""
    for step in (4, 8, 12):
        _sealed(tmp_path, step)
    (tmp_path / "checkpoint-12" / "weights").write_text("damaged")
    new = _sealed(tmp_path, 9)
    rotate(new, keep=1, best=None)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-12",
    ]
    (new / "weights").write_text("damaged")
    _sealed(tmp_path, 5)
    with pytest.raises(OutputError, match=r"checkpoint-9.*not what was written"):
        rotate(new, keep=1, best=None)


def test_a_link_is_no_checkpoint_and_nothing_is_deleted_through_it(tmp_path: Path) -> None:
    elsewhere = _sealed(tmp_path / "elsewhere", 1)
    run = tmp_path / "run"
    new = _sealed(run, 2)
    (run / "checkpoint-1").symlink_to(elsewhere)
    rotate(new, keep=1, best=None)
    assert list_checkpoints(run) == [new]
    assert (elsewhere / "manifest.json").is_file()


def test_counts_of_steps_left_out_go_on_from_the_checkpoint(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    """How many came one behind the other, too: a resumed run stops where an unbroken one does."""
    counts = {"skipped": 7, "in_a_row": 3, "overflows": 2}

    class Counted(TrainerCallback):
        def on_step_end(self, *args: Any, **kw: Any) -> None:
            trainer.steps.resume(counts)

    trainer = _trainer(_policy(tiny_model), rows, tmp_path, max_steps=2)
    trainer.add_callback(Counted())
    trainer.train()
    again = _trainer(_policy(tiny_model), rows, tmp_path, max_steps=2)
    again._check_resume(True)
    assert again.steps.state() == counts


@pytest.mark.parametrize(("dropout", "told"), [(0.5, True), (0.0, False)])
def test_another_micro_batch_is_told_where_dropout_draws(
    tiny_model: Path,
    rows: Tokenised,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dropout: float,
    told: bool,
) -> None:
    _trainer(_policy(tiny_model, dropout), rows, tmp_path, max_steps=2).train()
    smaller = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    again = _trainer(_policy(tiny_model, dropout), rows, tmp_path, **smaller)
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        again._check_resume(True)
    assert ("a micro-batch had 2 rows and has 1 now" in caplog.text) == told


def test_a_file_elsewhere_that_cannot_be_read_is_not_told_as_a_full_run_folder(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    place = tmp_path / "base" / "model.safetensors"
    with pytest.raises(OutputError, match=r"base/model\.safetensors: cannot be used"):
        _fails(run, PermissionError(errno.EACCES, "Permission denied", str(place)))
    full = OSError(errno.ENOSPC, "No space left on device", str(run / "metrics.jsonl"))
    with pytest.raises(OutputError, match=r"run: could not be written .* MiB are free there"):
        _fails(run, full)


def _fails(run: Path, error: Exception) -> None:
    with storage_faults(run):
        raise error


def test_the_longest_row_is_read_off_the_columns(rows: Tokenised) -> None:
    """The same as row by row, of a selection in another order too."""
    some = rows.rows.select([5, 2, 3])
    for part in (rows.rows, some):
        assert longest_row(part) == max(map(row_length, part))
