"""Each failure is planted in a small real run on the bundled model, and seen; a healthy run has none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, TrainingArguments
from typer.testing import CliRunner

from lora_dpo import Config, diagnose, train
from lora_dpo.cli import app
from lora_dpo.config import LoraConfig
from lora_dpo.data import load_preferences, tokenise
from lora_dpo.data.preferences import Kind
from lora_dpo.diagnostics import Diagnosis, Effort, diagnose_data, diagnose_policy, read_margins
from lora_dpo.objectives import build
from lora_dpo.policy import load_policy
from lora_dpo.trainer import PreferenceTrainer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "lora_dpo" / "quickstart" / "data"
EFFORT = Effort(rows=48, samples=12, sample_tokens=80, batch_size=16)

Row = dict[str, Any]
Plant = Callable[[Row, int], Row]


def bundled(name: str, count: int) -> list[Row]:
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def said(row: Row, side: str) -> str:
    return str(row[side][0]["content"])


def saying(row: Row, **sides: str) -> Row:
    spoken = {s: [{"role": "assistant", "content": text}] for s, text in sides.items()}
    return {**row, **spoken}


@pytest.fixture(scope="module")
def tokenizer(quickstart_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(quickstart_model)


@pytest.fixture(scope="module")
def policy(quickstart_model: Path) -> PeftModel:
    torch.manual_seed(0)
    return load_policy(str(quickstart_model), lora=LoraConfig(rank=8))


@pytest.fixture
def fresh(policy: PeftModel) -> Iterator[PeftModel]:
    start = copy.deepcopy({n: p.data for n, p in policy.named_parameters() if p.requires_grad})
    yield policy
    for name, parameter in policy.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])


def run(
    policy: PeftModel,
    tokenizer: Any,
    folder: Path,
    rows: list[Row],
    held_out: list[Row],
    objective: dict[str, Any],
    **settings: Any,
) -> Diagnosis:
    """Train on the rows, evaluate on the others, and look."""
    bound = build(objective)
    train_rows, held = (
        tokenise(load_preferences(part, kind=bound.data), tokenizer, max_length=256)
        for part in (rows, held_out)
    )
    defaults: dict[str, Any] = {
        "max_steps": 24, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 48,
        "learning_rate": 1e-3, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 8,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 0,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    trainer = PreferenceTrainer(
        policy, objective=bound, args=args, train_data=train_rows, eval_data=held
    )
    trainer.write_metrics_to(folder / "metrics.jsonl")
    trainer.train()
    return diagnose_policy(
        trainer.model,
        tokenizer,
        trainer.objective,
        held,
        history=trainer.state.log_history,
        margins=read_margins(folder),
        effort=EFFORT,
    )


def states(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.name: finding.state for finding in diagnosis.findings}


DPO = {"name": "dpo", "beta": 0.5}


def test_a_healthy_run_has_none(fresh: PeftModel, tokenizer: Any, tmp_path: Path) -> None:
    found = run(fresh, tokenizer, tmp_path, bundled("train", 384), bundled("heldout", 48), DPO)
    assert set(states(found).values()) == {"not found"}, str(found)
    assert len(found.findings) == 6


def test_length_bias_is_seen(fresh: PeftModel, tokenizer: Any, tmp_path: Path) -> None:
    def longer(row: Row) -> Row:
        return saying(row, chosen=f"{said(row, 'rejected')} {said(row, 'chosen')}")

    rows, held = ([longer(r) for r in bundled(n, k)] for n, k in (("train", 192), ("heldout", 48)))
    found = run(fresh, tokenizer, tmp_path, rows, held, DPO)
    finding = found["length bias"]
    assert finding.found, str(found)
    assert finding.measured["accuracy_of_length_alone"] == 1.0
    assert finding.measured["wanted_minus_unwanted_tokens"] > 20


def test_displacement_is_seen_and_an_sft_term_mends_it(
    fresh: PeftModel, tokenizer: Any, tmp_path: Path
) -> None:
    # both are the model's own story but for one word: what they share goes down with the unwanted one
    def one_word(row: Row) -> Row:
        words = said(row, "chosen").split()
        spoilt = [*words]
        spoilt[len(words) // 2] = "grumpy"
        return saying(row, chosen=" ".join(words), rejected=" ".join(spoilt))

    rows, held = ([one_word(r) for r in bundled(n, k)] for n, k in (("train", 64), ("heldout", 32)))
    trained = {n: p.data.clone() for n, p in fresh.named_parameters() if p.requires_grad}
    settings = {"learning_rate": 4e-3, "max_steps": 16, "eval_strategy": "no"}
    found = run(
        fresh, tokenizer, tmp_path / "a", rows, held, {"name": "dpo", "beta": 0.1}, **settings
    )
    finding = found["likelihood displacement"]
    assert finding.found, str(found)
    assert finding.measured["unwanted_logratio_nats"] < finding.measured["wanted_logratio_nats"] < 0
    assert finding.measured["token_similarity"] > 0.9
    for name, value in trained.items():
        dict(fresh.named_parameters())[name].data.copy_(value)
    remedy = {"name": "dpo", "beta": 0.05, "nll_weight": 1.0}
    assert any("objective.nll_weight" in line for line in finding.remedies)
    mended = run(fresh, tokenizer, tmp_path / "b", rows, held, remedy, **settings)
    assert not mended["likelihood displacement"].found, str(mended)


def test_over_optimisation_is_seen(fresh: PeftModel, tokenizer: Any, tmp_path: Path) -> None:
    rows, held = bundled("train", 16), bundled("heldout", 48)
    settings = {"learning_rate": 1e-2, "max_steps": 24, "lr_scheduler_type": "constant"}
    found = run(fresh, tokenizer, tmp_path, rows, held, {"name": "dpo", "beta": 0.05}, **settings)
    finding = found["over-optimisation"]
    assert finding.found, str(found)
    assert finding.measured["last_held_out_loss"] > finding.measured["least_held_out_loss"]


def test_label_noise_is_seen_with_the_rows(
    fresh: PeftModel, tokenizer: Any, tmp_path: Path
) -> None:
    flipped = set(
        range(1, 640, 5)
    )  # a fifth; one epoch, since a second one would learn them by heart
    rows = [
        {**r, "chosen": r["rejected"], "rejected": r["chosen"]} if i in flipped else r
        for i, r in enumerate(bundled("train", 640))
    ]
    found = run(fresh, tokenizer, tmp_path, rows, bundled("heldout", 16), DPO, max_steps=40)
    finding = found["label noise"]
    assert finding.found, str(found)
    assert 0.1 < finding.measured["estimated_rate"] < 0.3
    named = [int(row.rpartition(":")[2]) - 1 for row in finding.rows]
    right = sum(i in flipped for i in named)
    assert right >= 0.8 * len(named) and len(named) >= 10


def test_a_policy_that_does_not_learn_is_seen(
    fresh: PeftModel, tokenizer: Any, tmp_path: Path
) -> None:
    rows, held = bundled("train", 64), bundled("heldout", 48)
    found = run(fresh, tokenizer, tmp_path, rows, held, DPO, learning_rate=1e-7, max_steps=8)
    assert found["not learning"].found, str(found)
    assert not found["label noise"].found


def test_answers_that_the_reference_would_not_write_are_seen_before_and_in_a_run(
    fresh: PeftModel, tokenizer: Any, tmp_path: Path
) -> None:
    def shouted(row: Row) -> Row:
        return saying(row, **{s: said(row, s).upper() for s in ("chosen", "rejected")})

    def look(rows: list[Row], kind: Kind = "paired") -> Diagnosis:
        data = tokenise(load_preferences(rows, kind=kind), tokenizer, max_length=512)
        return diagnose_data(fresh, tokenizer, data, effort=EFFORT)

    healthy, planted = look(bundled("train", 48)), look([shouted(r) for r in bundled("train", 48)])
    assert set(states(healthy).values()) == {"not found"}, str(healthy)
    assert planted["reference mismatch"].found, str(planted)
    loud = [shouted(r) for r in bundled("train", 48)]
    trained = run(fresh, tokenizer, tmp_path, loud, loud[:16], DPO, max_steps=2)
    assert trained["reference mismatch"].found, str(trained)
    alike = look([saying(r, rejected=said(r, "chosen") + " Yes.") for r in bundled("train", 48)])
    assert alike["similar pairs"].found, str(alike)
    unpaired = look(bundled("train", 48), "unpaired")
    assert states(unpaired)["similar pairs"] == "not measured"
    assert states(unpaired)["reference mismatch"] == "not found"


@pytest.mark.parametrize("name", ["kto", "simpo"])
def test_unpaired_and_reference_free_runs_are_looked_at_too(
    name: str, fresh: PeftModel, tokenizer: Any, tmp_path: Path
) -> None:
    rows, held = bundled("train", 64), bundled("heldout", 16)
    found = run(fresh, tokenizer, tmp_path, rows, held, {"name": name}, max_steps=6)
    measured = {n for n, state in states(found).items() if state != "not measured"}
    expected = {"length bias", "likelihood displacement", "over-optimisation"}
    assert measured >= expected | {"reference mismatch", "not learning"}, str(found)


def test_a_run_prints_and_keeps_its_diagnosis_and_the_command_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    changes = [f"output.dir={tmp_path / 'run'}", "train.max_steps=2", "data.eval_max_rows=24"]
    changes += ["data.eval=null", "data.eval_fraction=0.02"]
    with caplog.at_level("INFO", logger="lora_dpo"):
        done = train(Config.load("configs/quickstart.yaml", changes))
    assert "diagnosis of run" in caplog.text and "not learning" in caplog.text
    kept = Diagnosis.read(done.folder / "diagnostics.json")
    again = diagnose(done)
    assert states(again) == states(kept)
    for finding in kept.findings:
        for key, value in finding.measured.items():
            assert again[finding.name].measured[key] == pytest.approx(
                value, rel=1e-3, abs=1e-4, nan_ok=True
            )
    shown = CliRunner().invoke(app, ["diagnose", str(done.folder), "--rows", "8", "--samples", "2"])
    assert shown.exit_code == 0 and "likelihood displacement" in shown.output
    data, base = DATA / "heldout.jsonl", ROOT / "lora_dpo" / "quickstart" / "model"
    words = ["diagnose", "--data", str(data), "--model", str(base), "--max-length", "256"]
    before = CliRunner().invoke(app, [*words, "--rows", "8", "--samples", "2"])
    assert before.exit_code == 0 and "similar pairs" in before.output
    for wrong in (["diagnose"], ["diagnose", "--data", str(data)], ["diagnose", "x", *words[1:]]):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 1 and "give the folder of a run, or --data" in refused.output


def test_a_diagnosis_that_fails_does_not_cost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("lora_dpo.run.diagnose_policy", broken)
    changes = [f"output.dir={tmp_path / 'run'}", "train.max_steps=1"]
    changes += ["data.eval=null", "data.eval_fraction=0.01"]
    with caplog.at_level("WARNING", logger="lora_dpo"):
        done = train(Config.load("configs/quickstart.yaml", changes))
    assert (done.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "diagnosis failed (planted)" in caplog.text
