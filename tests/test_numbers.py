"""Numbers that are none, and data of the smallest and the oddest sizes."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM, TrainerCallback
from typer.testing import CliRunner

from lora_dpo.arguments import build_arguments
from lora_dpo.cli import app
from lora_dpo.config import Config
from lora_dpo.errors import ConfigError, DataError, TrainingError
from lora_dpo.nonfinite import IN_A_ROW, SCALED_IN_A_ROW, Steps
from lora_dpo.passes import Step
from lora_dpo.preparing import load_tokenizer, prepare_data
from lora_dpo.run import _build_trainer, train
from lora_dpo.run_folder import bound_objective
from lora_dpo.stats import PairStats
from tests.conftest import byte_tokenizer

BAD = "Z"  # the byte whose embedding is no number in the broken model


@pytest.fixture(scope="module")
def broken_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one token at which it gives no number."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder)(BAD).input_ids[-1]
    weights["model.embed_tokens.weight"][token] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _rows(count: int, bad: tuple[int, ...] = ()) -> list[dict[str, str]]:
    return [
        {"prompt": f"Q{i}", "chosen": " yes" + BAD * (i in bad), "rejected": " no!"}
        for i in range(count)
    ]


def _values(model: Path, rows: Any, folder: Path, **settings: Any) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": {"base": str(model)},
        "lora": {"rank": 2},
        "data": {"train": str(data), "eval_fraction": 0, "max_length": 64} | settings.pop("data", {}),
        "train": {
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1,
            "use_cpu": True, "warmup_steps": 0, "lr_scheduler_type": "constant",
        } | settings.pop("train", {}),
        "output": {"dir": str(folder / "run"), "diagnose": False, "samples": 0},
    } | settings  # fmt: skip


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a row whose own arithmetic overflows, which no weight of the base tells of beforehand."""
    monkeypatch.setattr(Steps, "foresee", lambda *_: None)


@pytest.mark.usefixtures("unforeseen")
def test_a_row_without_a_number_stops_the_run_by_name(broken_model: Path, tmp_path: Path) -> None:
    values = _values(broken_model, _rows(8, bad=(5,)), tmp_path)
    with pytest.raises(
        TrainingError, match=r"log-prob of chosen under the policy.*rows\.jsonl:6\. "
    ):
        train(values)


def test_skipping_leaves_the_step_out_counts_it_and_trains_on(
    broken_model: Path, tmp_path: Path
) -> None:
    values = _values(broken_model, _rows(8, bad=(5,)), tmp_path, train={"on_nonfinite": "skip"})
    run = train(values)
    lines = [line for line in run.history if "learning_rate" in line]
    assert len(lines) == 8 and lines[-1]["skipped_steps"] == 1
    assert sum("loss" in line for line in lines) == 7
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    notes = (run.folder / "notes.jsonl").read_text(encoding="utf-8")
    assert "rows.jsonl:6" in notes and "no update was made (1 skipped so far)" in notes


def test_a_skipped_step_is_as_if_it_had_not_been(broken_model: Path, tmp_path: Path) -> None:
    """Neither weights nor moments differ from those before it, whatever step it was."""
    seen: list[tuple[bool, Any]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            self.before = _state(kw["model"], kw["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            same = all(
                torch.equal(a, b)
                for a, b in zip(self.before, _state(kw["model"], kw["optimizer"]), strict=False)
            )
            seen.append((same, state.global_step))

    values = _values(broken_model, _rows(8, bad=(5,)), tmp_path, train={"on_nonfinite": "skip"})
    values["train"] |= {"learning_rate": 1e-2, "weight_decay": 0.1}
    config = Config.parse(values)
    objective = bound_objective(config)
    arguments = build_arguments(config.train.further, output_dir=config.output.dir, evaluates=False)
    data = prepare_data(config, load_tokenizer(config), objective.data)
    trainer = _build_trainer(config, objective, arguments, data, {})
    trainer.add_callback(Look())
    trainer.train()
    unmoved = [step for same, step in seen if same]
    assert len(unmoved) == 1 and trainer.steps.skipped == 1


def _state(model: Any, optimizer: Any) -> list[Any]:
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    moments = [
        value.detach().clone()
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return [*weights, *moments]


def test_too_many_steps_in_a_row_stop_a_run_that_skips(broken_model: Path, tmp_path: Path) -> None:
    rows = _rows(12, bad=tuple(range(2, 12)))
    values = _values(broken_model, rows, tmp_path, train={"on_nonfinite": "skip"})
    with pytest.raises(TrainingError, match=f"the {IN_A_ROW}th such step in a row"):
        train(values)


@pytest.mark.usefixtures("unforeseen")
@pytest.mark.parametrize(("kept", "bad"), [(True, 5), (False, 0)])
def test_a_row_that_the_reference_gives_no_number_is_named_before_the_first_step(
    broken_model: Path, tmp_path: Path, kept: bool, bad: int
) -> None:
    """Any row where its log-probs are kept; else the first ones, and a step names the others."""
    settings = (
        {"cache_reference": True, "reference_cache_dir": str(tmp_path / "store")} if kept else {}
    )
    values = _values(broken_model, _rows(8, bad=(bad,)), tmp_path, train=settings)
    told = rf"rows\.jsonl:{bad + 1}: the log-prob of an answer under the reference is nan"
    with pytest.raises(TrainingError, match=told):
        train(values)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("objective", ["dpo", "simpo", "kto"])
def test_rows_with_a_token_that_the_base_cannot_read_are_named_before_the_first_step(
    broken_model: Path, tmp_path: Path, objective: str
) -> None:
    """All of them, wherever the token stands, though the reference runs in every step alone."""
    rows = _rows(8, bad=(5,))
    rows[2]["prompt"] += BAD
    rows[6]["rejected"] += BAD
    values = _values(broken_model, rows, tmp_path, objective={"name": objective})
    told = r"rows\.jsonl:3, .*rows\.jsonl:6, .*rows\.jsonl:7: holds a token .* \(token \d+: its embedding"
    with pytest.raises(TrainingError, match=told):
        train(values)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("said", [True, False])
def test_a_token_that_the_head_masks_is_named_where_it_is_to_be_said(
    tmp_path: Path, said: bool
) -> None:
    """Its log-prob is -inf; in a prompt it is no fault, and the run trains."""
    config = PhiConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = PhiForCausalLM(config), byte_tokenizer()
    model.lm_head.bias.data[tokenizer(BAD).input_ids[-1]] = -torch.inf
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = _rows(8, bad=(5,) if said else ())
    rows[2]["prompt"] += BAD
    values = _values(tmp_path / "model", rows, tmp_path, objective={"name": "ipo"})
    if said:
        with pytest.raises(TrainingError, match=r"rows\.jsonl:6: holds .*the head masks it"):
            train(values)
    else:
        losses = [line["loss"] for line in train(values).history if "loss" in line]
        assert len(losses) == 8 and all(map(math.isfinite, losses))


def _step(loss: float, logp: float = -1.0) -> Step:
    one = torch.tensor([logp])
    stats = PairStats(one, one, torch.tensor([3]), torch.tensor([3]), one, one)
    return Step(stats, torch.tensor([loss]))


def _trainer(scaler: Any, skipped: bool = False) -> Any:
    accelerator = SimpleNamespace(
        scaler=scaler, optimizer_step_was_skipped=skipped, num_processes=1
    )
    state = SimpleNamespace(global_step=3)
    advice = SimpleNamespace(tell=lambda *told: None)
    return SimpleNamespace(accelerator=accelerator, state=state, advice=advice)


ROWS = [{"file": "f.jsonl", "row": 7}]


def test_an_overflow_that_the_gradient_scaler_finds_is_its_own_and_no_fault() -> None:
    """A real scaler, on the CPU: it skips the step, makes its scale smaller, and the next one counts."""
    model = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    model.weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
    steps = Steps("stop")
    assert steps.updates(_trainer(scaler), model, ROWS, _step(0.7))
    before = model.weight.detach().clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and scaler.get_scale() == 2.0**15
    assert steps.updates(_trainer(scaler, skipped=True), model, ROWS, _step(0.7))
    assert steps.line({"loss": 0.7, "grad_norm": float("inf")}, {"loss": 0.7}) == {
        "loss": 0.7, "skipped_steps": 1,
    }  # fmt: skip


def test_a_loss_that_is_no_number_is_skipped_under_a_scaler_too() -> None:
    """It insists on gradients, so they are made such that it skips them itself."""
    model = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    steps, before = Steps("skip"), model.weight.detach().clone()
    assert not steps.updates(_trainer(scaler), model, ROWS, _step(float("nan")))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and not optimizer.state
    assert steps.updates(_trainer(scaler, skipped=True), model, ROWS, _step(0.7))
    assert steps.skipped == 1  # not counted again as the scaler's


def test_an_overflow_without_end_stops() -> None:
    steps, model = Steps("skip"), torch.nn.Linear(2, 1)
    trainer = _trainer(torch.amp.GradScaler("cpu"), skipped=True)
    for _ in range(SCALED_IN_A_ROW - 1):
        assert steps.updates(trainer, model, ROWS, _step(0.7))
    with pytest.raises(TrainingError, match="overflows in float16 however it is scaled"):
        steps.updates(trainer, model, ROWS, _step(0.7))


def test_a_log_prob_without_a_number_counts_where_the_loss_hides_it() -> None:
    """DPO's loss is 0 where the reference gives chosen no probability, and its gradient is nothing."""
    with pytest.raises(
        TrainingError, match=r"under the policy is not a finite number; rows f\.jsonl:7"
    ):
        Steps("stop").updates(_trainer(None), torch.nn.Linear(1, 1), ROWS, _step(0.0, -torch.inf))


def test_a_row_that_spoils_the_losses_of_others_is_named_alone() -> None:
    """Rows share a mean, a sort or a baseline: one without a number leaves many losses without one."""
    logps = torch.full((16,), -1.0)
    logps[13] = torch.nan
    lengths, reference = torch.full((16,), 3), torch.full((16,), -1.0)
    stats = PairStats(logps, logps, lengths, lengths, reference, reference)
    losses = torch.full((16,), torch.nan)
    rows = [{"file": "f.jsonl", "row": i} for i in range(16)]
    with pytest.raises(TrainingError, match=r"is not a finite number; rows f\.jsonl:13\. "):
        Steps("stop").updates(_trainer(None), torch.nn.Linear(1, 1), rows, Step(stats, losses))


# ---- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "steps"),
    [
        (1, {}, 1),  # one row
        (
            3,
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
            1,
        ),  # larger than the data
        (
            5,
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
            2,
        ),  # a short last step
    ],
)
def test_few_rows_are_trained_on_all_of_them(
    tiny_model: Path, tmp_path: Path, rows: int, settings: dict[str, Any], steps: int
) -> None:
    values = _values(tiny_model, _rows(rows), tmp_path, train=settings)
    values["data"]["eval_fraction"] = 0.05 if rows == 1 else 0
    run = train(values)
    assert run.results["steps"] == steps and run.results["rows"]["train"] == rows
    seen = {
        row
        for line in (run.folder / "row_margins.jsonl").read_text("utf-8").splitlines()
        for _, row, _ in json.loads(line)["rows"]
    }
    assert seen == set(range(1, rows + 1))


def _told(values: dict[str, Any], folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    found = CliRunner().invoke(app, ["train", str(path)])
    assert found.exit_code == 1 and isinstance(found.exception, SystemExit), found.output
    assert found.stderr.count("error: ") == 1
    assert not (folder / "run").exists()
    return found.stderr


def test_data_of_which_nothing_is_left_are_one_error_before_anything_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    same = [{"prompt": f"Q{i}", "chosen": " a", "rejected": " a"} for i in range(3)]
    told = _told(_values(tiny_model, same, tmp_path), tmp_path)
    assert "no rows are left" in told and "3  dropped: chosen and rejected are identical" in told
    long = [{"prompt": "Q", "chosen": " a" * 200, "rejected": " b" * 200}]
    told = _told(_values(tiny_model, long, tmp_path), tmp_path)
    assert "no rows are left after tokenising" in told and "The shortest row has 402 tokens" in told
    told = _told(_values(tiny_model, long, tmp_path, data={"max_length": 4096}), tmp_path)
    assert "the model has 128 positions" in told
    told = _told(
        _values(tiny_model, _rows(2), tmp_path, train={"gradient_accumulation_steps": 0}), tmp_path
    )
    assert "train.gradient_accumulation_steps: got 0; expected at least 1" in told


def test_rows_that_stand_in_both_files_are_told(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(_rows(3)[1]) + "\n", encoding="utf-8")
    values = _values(
        tiny_model, _rows(3), tmp_path, data={"eval": str(held)}, train={"max_steps": 1}
    )
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        train(values)
    assert (
        "1 prompts stand in data.train and in data.eval (1 whole rows stand in both)" in caplog.text
    )
    assert f"{tmp_path / 'rows.jsonl'}:2 and {held}:1" in caplog.text


@pytest.mark.parametrize(("label", "missing"), [(True, "unwanted"), (False, "wanted")])
def test_labels_of_one_class_are_warned_about(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, label: bool, missing: str
) -> None:
    rows = [{"prompt": f"Q{i}", "completion": " yes", "label": label} for i in range(4)]
    values = _values(tiny_model, rows, tmp_path, objective="kto", train={"max_steps": 1})
    with caplog.at_level(logging.WARNING, "lora_dpo"):
        run = train(values)
    assert f"no row is {missing}" in caplog.text and "kto pushes all of them" in caplog.text
    losses = [line["loss"] for line in run.history if "loss" in line]
    assert all(0 < loss < 10 for loss in losses)


def test_settings_of_what_is_done_are_checked(tiny_model: Path, tmp_path: Path) -> None:
    values = _values(tiny_model, _rows(2), tmp_path, train={"on_nonfinite": "ignore"})
    with pytest.raises(ConfigError, match=r"train\.on_nonfinite: got 'ignore'"):
        train(values)


def test_a_file_without_rows_is_told(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file is empty"):
        train(_values(tiny_model, [], tmp_path))
