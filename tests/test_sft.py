"""Supervised fine-tuning: its loss is transformers' own, and its adapter is the next run's reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from typer.testing import CliRunner

import lora_dpo
from lora_dpo.cli import app
from lora_dpo.config import Config, LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.diagnostics import Effort
from lora_dpo.errors import ConfigError, DataError, ModelError
from lora_dpo.evaluation import evaluate_policy
from lora_dpo.finetuning import sft
from lora_dpo.finished import diagnose
from lora_dpo.handing import export
from lora_dpo.objectives import get
from lora_dpo.policy import load_policy
from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.stepping import Rows
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter

SFT = get("sft_demonstrations").bind()


@pytest.fixture(scope="module")
def answers() -> list[dict[str, str]]:
    """Twelve answers of very unequal lengths, two to one prompt each."""
    return [
        {"prompt": f"Question {i // 2}?", "completion": " yes" * (1 + (i * 5) % 7) + f" {i}."}
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def rows(tiny_model: Path, answers: list[dict[str, str]]) -> Tokenised:
    read = load_preferences(answers, kind="demonstrations")
    return tokenise(read, AutoTokenizer.from_pretrained(tiny_model), max_length=128)


def _cross_entropy(policy: Any, rows: Tokenised) -> torch.Tensor:
    """Return the mean over answers' tokens, each row alone through transformers with its labels."""
    total, tokens = torch.zeros(()), 0
    for row in rows.rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        labels = ids.clone()
        labels[0, : len(row["prompt_ids"])] = -100  # not trained, in transformers' own sign
        count = len(row["completion_ids"])
        total = total + policy(input_ids=ids, labels=labels).loss * count
        tokens += count
    return total / tokens


def test_the_loss_and_its_gradient_are_transformers_cross_entropy_over_the_answers_tokens(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    policy = load_policy(tiny_model, lora=LoraConfig(rank=4))
    move_adapter(policy)
    policy.eval()
    loss = _cross_entropy(policy, rows)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    ours = evaluate_policy(policy, rows, SFT, batch_size=5)
    assert ours["loss"].mean == pytest.approx(loss.item(), rel=1e-5)
    lengths = [len(row["completion_ids"]) for row in rows.rows]
    assert max(lengths) > 3 * min(lengths)  # a mean over rows would be another number
    trainer = _trainer(policy, rows, tmp_path, micro=12, times=1)
    trainer.training_step(trainer.model, {"rows": Rows(list(trainer.train_dataset))})
    assert expected
    for name, parameter in policy.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def _trainer(
    policy: Any, rows: Tokenised, folder: Path, *, micro: int, times: int, **options: Any
) -> PreferenceTrainer:
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=micro, max_steps=3,
        gradient_accumulation_steps=times, learning_rate=0.1, optim="sgd", logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, seed=5,
    )  # fmt: skip
    return PreferenceTrainer(policy, objective=SFT, args=args, train_data=rows, **options)


def _trained(tiny_model: Path, rows: Tokenised, folder: Path, **how: Any) -> tuple[Any, str]:
    torch.manual_seed(11)
    policy = load_policy(tiny_model, lora=LoraConfig(rank=4))
    trainer = _trainer(policy, rows, folder, **how)
    trainer.train()
    weights = [p.detach().flatten() for p in policy.parameters() if p.requires_grad]
    return torch.cat(weights), trainer.engine


def test_neither_the_split_of_a_step_nor_padding_changes_the_trajectory(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    """Steps of 9 of 12 rows of unequal lengths: a partial step, and a mean of means would differ."""
    whole, engine = _trained(tiny_model, rows, tmp_path / "a", micro=9, times=1)
    assert "rows end to end without padding" in engine
    split, plain = _trained(tiny_model, rows, tmp_path / "b", micro=3, times=3, engine="plain")
    assert "end to end" not in plain
    torch.manual_seed(11)
    fresh = load_policy(tiny_model, lora=LoraConfig(rank=4))
    start = torch.cat([p.detach().flatten() for p in fresh.parameters() if p.requires_grad])
    assert (whole - start).abs().max() > 1e-2  # it has moved by far more than the tolerance
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def values(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two-stages")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {
        "objective": {"name": "dpo", "beta": 0.2},
        "model": {"base": str(tiny_model)},
        "data": {"train": str(data), "eval_fraction": 0.25, "max_length": 128},
        "train": {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2,
            "learning_rate": 2e-2, "logging_steps": 1, "use_cpu": True,
        },
        "output": {"dir": str(folder / "sft"), "diagnose": False},
    }  # fmt: skip


@pytest.fixture(scope="module")
def first(values: dict[str, Any]) -> Run:
    return sft(values)


def test_a_preference_config_serves_sft_too_and_trains_on_the_chosen_side_alone(first: Run) -> None:
    assert first.config.objective.to_dict() == {"name": "sft_demonstrations"}
    assert first.results["rows"] == {"train": 12, "held_out": 4}  # one answer of each pair
    assert first.results["reference"] == "none"
    held_out = [line["eval_loss"] for line in first.history if "eval_loss" in line]
    assert held_out[-1] < held_out[0] - 1
    found = str(diagnose(first, effort=Effort(rows=8, samples=2, sample_tokens=4)))
    assert "nan" not in found and "unwanted" not in found
    assert "reference mismatch: not measured: fine-tuning is what mends it" in found


def test_preferences_start_from_the_run_as_the_reference_and_the_merge_holds_both(
    first: Run, values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Logits of the fine-tuned policy, of the next run's reference, and of the merged model."""
    second = {**values, "model": {"base": str(tiny_model), "adapter": str(first.folder)}}
    run = train({**second, "output": {"dir": str(tmp_path / "dpo"), "diagnose": False}})
    losses = [line["loss"] for line in run.history if "loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # ln 2: policy = reference at step 0
    assert run.results["reference"].startswith("the starting adapter, frozen")
    ids = torch.tensor([[5, 60, 70, 80, 90]])
    policy, fine_tuned = run.load_policy(), first.load_policy()
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=ids).logits
        start = fine_tuned(input_ids=ids).logits
        with lora_dpo.reference(policy):
            reference = policy(input_ids=ids).logits
        end = policy(input_ids=ids).logits
    torch.testing.assert_close(reference, start, rtol=1e-5, atol=1e-5)
    assert (start - base).abs().max() > 0.05 and (end - start).abs().max() > 0.05
    proof = export(run, tmp_path / "merged", merge=True).proof
    assert proof is not None and proof.kl < 1e-8
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, end, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_is_not_there_is_told_before_anything_is_written(
    values: dict[str, Any], tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("model: {base: x}\n")
    for folder, told in ((tmp_path / "none", "Give the folder"), (unfinished, "--resume")):
        changed = {**values, "model": {**values["model"], "adapter": str(folder)}}
        changed["output"] = {"dir": str(tmp_path / "run")}
        with pytest.raises(ModelError, match=told):
            train(changed)
        assert not (tmp_path / "run").exists()


def test_the_command_trains_on_instruction_data_and_train_names_it_where_a_label_is_missing(
    values: dict[str, Any],
    answers: list[dict[str, str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, path = tmp_path / "answers.jsonl", tmp_path / "c.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    path.write_text(Config.parse(values).to_yaml())
    change = ["--set", f"data.train={data}", "--set", f"output.dir={tmp_path / 'run'}"]
    done = CliRunner().invoke(app, ["sft", str(path), *change])
    assert done.exit_code == 0, done.output
    assert "dpo is what 'lora-dpo train' makes of this config" in caplog.text
    assert "8 rows to train on, 4 held out" in caplog.text
    other = ["--set", f"output.dir={tmp_path / 'other'}"]
    refused = CliRunner().invoke(app, ["train", str(path), *change[:2], *other])
    assert refused.exit_code == 1 and "lora-dpo sft" in refused.output
    again = CliRunner().invoke(app, ["sft", str(path), *change])
    assert again.exit_code == 1 and "a run that has ended (" in again.output


def test_settings_of_a_reference_are_refused_where_none_runs(values: dict[str, Any]) -> None:
    stored = {**values, "train": {**values["train"], "cache_reference": True}}
    with pytest.raises(ConfigError, match="sft_demonstrations reads no reference"):
        sft(stored)


def test_labelled_rows_are_not_taken_for_demonstrations(tiny_model: Path, tmp_path: Path) -> None:
    labelled = [{"prompt": f"Q{i}", "completion": "A", "label": i % 2 == 0} for i in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = tokenise(load_preferences(labelled), tokenizer, max_length=64)
    policy = load_policy(tiny_model, lora=LoraConfig(rank=2))
    with pytest.raises(DataError, match="kind='demonstrations'"):
        _trainer(policy, data, tmp_path, micro=2, times=1)
