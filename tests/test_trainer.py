"""Laws of a training run: batches, metrics, checkpoints, interruption, faults."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from lora_dpo import objectives
from lora_dpo.callbacks import JsonlCallback
from lora_dpo.checkpoints import STATE, latest_checkpoint, list_checkpoints
from lora_dpo.config import LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import DataError, OutputError, TrainingError
from lora_dpo.evaluation import evaluate_policy
from lora_dpo.policy import load_policy
from lora_dpo.stepping import Batches
from lora_dpo.store import MANIFEST
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter

UNREPEATABLE = {"tokens_per_second", "memory/peak_gib"}


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    return tokenise(
        load_preferences(pairs), AutoTokenizer.from_pretrained(tiny_model), max_length=128
    )


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(output_dir=str(folder), **{**values, **changes})


def _policy(tiny_model: Path, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(11)
    return load_policy(tiny_model, lora=LoraConfig(rank=4, dropout=dropout))


def _weights(policy: Any) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for n, p in policy.named_parameters() if ".default." in n]
    )


def _logs(trainer: PreferenceTrainer) -> list[dict[str, float]]:
    return [
        _repeatable(entry)
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def _repeatable(entry: dict[str, float]) -> dict[str, float]:
    return {
        k: v
        for k, v in entry.items()
        if k not in UNREPEATABLE and "runtime" not in k and "per_second" not in k
    }


def test_one_by_eight_equals_eight_by_one_along_a_trajectory(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    """16 pairs of unequal lengths, steps of 6 (so the last is a partial one), two epochs."""
    trajectories = []
    for micro, accumulate in ((6, 1), (1, 6), (4, 1.5)):
        arguments = _arguments(tmp_path, num_train_epochs=2, optim="sgd", learning_rate=0.05)
        arguments.per_device_train_batch_size = micro
        arguments.gradient_accumulation_steps = accumulate  # type: ignore[assignment]
        if accumulate == 1.5:  # micro-batches of 4 and 2
            arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = 6, 1
        trainer = PreferenceTrainer(_policy(tiny_model), args=arguments, train_data=rows)
        trainer.memory.batches = Batches(micro)
        trainer.train()
        trajectories.append((_weights(trainer.model), [e["loss"] for e in _logs(trainer)]))
    (weights, losses), *others = trajectories
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    for other_weights, other_losses in others:
        torch.testing.assert_close(other_weights, weights, rtol=1e-3, atol=1e-5)
        assert other_losses == pytest.approx(losses, abs=1e-5)


def test_the_logged_metrics_are_means_over_every_pair_since_the_last_line(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    """With a learning rate of almost 0 the policy stays put: the log equals an evaluation."""
    policy = _policy(tiny_model)
    move_adapter(policy, std=0.05)
    arguments = _arguments(tmp_path, learning_rate=1e-12, logging_steps=4, optim="sgd")
    trainer = PreferenceTrainer(policy, args=arguments, train_data=rows, reference_is="base")
    trainer.train()
    (log,) = _logs(trainer)
    expected = evaluate_policy(policy, rows, trainer.objective, pad_id=0)
    for name, estimate in expected.estimates.items():
        assert log[name] == pytest.approx(estimate.mean, rel=1e-4, abs=1e-5)
    assert {
        "rewards/chosen",
        "rewards/margins",
        "logps/chosen",
        "logratios/rejected",
        "grad_norm",
    } <= set(log)
    assert log["rewards/margins"] == pytest.approx(
        log["rewards/chosen"] - log["rewards/rejected"], abs=1e-5
    )


def test_a_fresh_policy_logs_accuracy_one_half_because_ties_count_half(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    trainer = PreferenceTrainer(_policy(tiny_model), args=_arguments(tmp_path), train_data=rows)
    trainer.train()
    first = _logs(trainer)[0]
    assert first["rewards/accuracies"] == 0.5
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_the_trainers_evaluation_is_the_standalone_one(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    policy = _policy(tiny_model)
    move_adapter(policy)
    trainer = PreferenceTrainer(
        policy, args=_arguments(tmp_path), train_data=rows, eval_data=rows, reference_is="base"
    )
    metrics = trainer.evaluate()
    expected = evaluate_policy(policy, rows, trainer.objective, pad_id=0, batch_size=3)
    for name, estimate in expected.estimates.items():
        assert metrics[f"eval_{name}"] == pytest.approx(estimate.mean, rel=1e-5, abs=1e-6)


def test_evaluation_does_not_move_the_random_numbers_of_training(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    runs = []
    for strategy in ({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 1}):
        arguments = _arguments(tmp_path, **strategy)
        policy = _policy(tiny_model, dropout=0.3)
        trainer = PreferenceTrainer(policy, args=arguments, train_data=rows, eval_data=rows)
        trainer.train()
        runs.append(_weights(trainer.model))
    assert torch.equal(*runs)


class _Kill(TrainerCallback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def _resumable(
    tiny_model: Path, rows: Tokenised, folder: Path, callbacks: Any = (), **changes: Any
) -> PreferenceTrainer:
    values = {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 2,
        "num_train_epochs": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        **changes,
    }
    return PreferenceTrainer(
        _policy(tiny_model, dropout=0.2),
        args=_arguments(folder, **values),
        train_data=rows,
        eval_data=rows,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, number: int
) -> None:
    whole = _resumable(tiny_model, rows, tmp_path / "whole")
    whole.train()
    broken = _resumable(tiny_model, rows, tmp_path / "broken", [_Kill(4, number)])
    with pytest.raises(TrainingError, match="stopped at step 5 of 8; a checkpoint is saved"):
        broken.train()
    assert list_checkpoints(tmp_path / "broken")[-1].name == "checkpoint-5"
    resumed = _resumable(tiny_model, rows, tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(_weights(resumed.model), _weights(whole.model))
    assert _logs(resumed) == _logs(whole)
    ends = [run.state.log_history[-1]["train_loss"] for run in (resumed, whole)]
    assert ends[0] == ends[1]  # over the run, not over the steps of its last process
    losses = [entry["loss"] for entry in _logs(whole) if "loss" in entry]
    assert ends[1] == pytest.approx(sum(losses) / len(losses))  # lines of as many rows each


@pytest.mark.parametrize(
    ("schedule", "at"), [("linear", 16), ("reduce_lr_on_plateau", 4), ("greedy", 4)]
)
def test_a_kill_between_an_epochs_last_checkpoint_and_its_evaluation_loses_neither(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, schedule: str, at: int
) -> None:
    """Saved by steps, evaluated by epochs of 4: the library would go on with the next epoch.

    Two of the schedules look at evaluations: they have all of them, each once.
    """

    class Killed(TrainerCallback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step == self.at:
                raise ZeroDivisionError

    how: dict[str, Any] = {"save_steps": 4, "eval_strategy": "epoch", "eval_steps": None}
    how |= {"num_train_epochs": 4, "lr_scheduler_type": schedule, "learning_rate": 0.3}
    if schedule != "linear":
        how["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.5, "threshold": 0.9}
    whole = _resumable(tiny_model, rows, tmp_path / "whole", **how)
    whole.train()
    with pytest.raises(ZeroDivisionError):
        _resumable(tiny_model, rows, tmp_path / "broken", [Killed(at)], **how).train()
    resumed = _resumable(tiny_model, rows, tmp_path / "broken", **how)
    resumed.train(resume_from_checkpoint=True)
    assert [line["step"] for line in _logs(whole) if "eval_loss" in line] == [4, 8, 12, 16]
    rates = [line["learning_rate"] for line in _logs(whole) if "loss" in line]
    assert len(set(rates)) > 1  # the schedule has done something
    best = [(run.state.best_metric, run.state.best_global_step) for run in (resumed, whole)]
    assert best[0] == best[1] and best[1][1] > 0
    lines = [[_repeatable(line) for line in run.state.log_history] for run in (resumed, whole)]
    assert lines[0] == lines[1]  # the run's end among them, in the same order
    assert torch.equal(_weights(resumed.model), _weights(whole.model))


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_is_resumed_behind_its_last_step_does_no_further_one(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, best: bool
) -> None:
    """In mid-epoch, where the library would do one more; and nothing is logged twice."""
    settings = {"max_steps": 6, "eval_on_start": True, "load_best_model_at_end": best}
    runs = []
    for resumes in (None, True):
        trainer = _resumable(tiny_model, rows, tmp_path, learning_rate=0.3, **settings)
        output = trainer.train(resume_from_checkpoint=resumes)
        if trainer.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
        logs = [_repeatable(entry) for entry in trainer.state.log_history]
        runs.append(
            (_weights(trainer.model), logs, trainer.state.global_step, output.training_loss)
        )
    (weights, logs, *numbers), (again, more, *same) = runs
    assert torch.equal(weights, again) and more == logs and same == numbers
    assert sum("eval_loss" in line for line in logs) == 3 + best
    assert numbers[0] == 6 and "train_loss" in logs[-1 - best]


def test_the_log_is_a_file_and_a_checkpoint_holds_its_last_lines_alone(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training and of evaluation as many each; a resumed run goes on in the file, lines as before."""
    monkeypatch.setattr(JsonlCallback, "KEPT", 1)
    lines = {}
    for name, callbacks in (("whole", []), ("broken", [_Kill(5, signal.SIGTERM)])):
        every = {"logging_steps": 1, "eval_steps": 2, "save_steps": 2}
        trainer = _resumable(tiny_model, rows, tmp_path / name, callbacks, **every)
        trainer.write_metrics_to(tmp_path / name / "metrics.jsonl")
        if callbacks:
            with pytest.raises(TrainingError, match="stopped at step 6 of 8"):
                trainer.train()
            trainer = _resumable(tiny_model, rows, tmp_path / name, **every)
            trainer.write_metrics_to(tmp_path / name / "metrics.jsonl")
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        kept = json.loads((tmp_path / name / "checkpoint-8" / "trainer_state.json").read_text())
        assert 2 <= len(kept["log_history"]) <= 4  # of 12 lines
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [_repeatable(json.loads(line)) for line in text.splitlines()]
    assert len(lines["whole"]) == 8 + 4 + 1
    assert lines["broken"] == lines["whole"]


def test_a_resume_from_another_reference_or_other_facts_is_refused(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    _resumable(tiny_model, rows, tmp_path).train()
    other = _resumable(tiny_model, rows, tmp_path)
    other.facts = {"objective": "dpo(beta=0.5, label_smoothing=0)"}
    with pytest.raises(TrainingError, match=r"saved by another run \(objective: "):
        other.train(resume_from_checkpoint=True)
    moved = _policy(tiny_model)
    for parameter in moved.get_base_model().lm_head.parameters():
        parameter.data *= 1.05
    changed = PreferenceTrainer(moved, args=_arguments(tmp_path), train_data=rows)
    with pytest.raises(TrainingError, match="is not the one that this run began with"):
        changed.train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_passed_over_and_none_is_an_error(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    _resumable(tiny_model, rows, tmp_path).train()
    newest = list_checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-8"
    adapter = newest / "adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(data)
    folder, _, damaged = latest_checkpoint(tmp_path)
    assert folder.name == "checkpoint-6"
    assert "adapter_model.safetensors" in damaged[0]
    for checkpoint in list_checkpoints(tmp_path):
        (checkpoint / MANIFEST).unlink()
    with pytest.raises(OutputError, match="nothing to resume from"):
        latest_checkpoint(tmp_path)


def test_a_damaged_best_checkpoint_is_told_and_the_last_step_kept(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    class Damage(TrainerCallback):
        """Once it is saved, and no longer the newest."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            best = state.best_model_checkpoint
            if state.global_step == state.max_steps - 1 and best:
                path = Path(best) / "adapter_model.safetensors"
                path.write_bytes(path.read_bytes()[:-1])

    arguments = {"load_best_model_at_end": True, "learning_rate": 3.0, "save_steps": 1}
    trainer = _resumable(tiny_model, rows, tmp_path, [Damage()], eval_steps=1, **arguments)
    with pytest.raises(OutputError, match=r"the best checkpoint.*is damaged.*not what was written"):
        trainer.train()
    assert trainer.state.best_global_step < 8
    assert latest_checkpoint(tmp_path)[0].name == "checkpoint-8"


def test_the_best_checkpoints_adapter_comes_with_what_its_objective_remembered(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """BCO's running mean moves in every step; a figure of the best adapter needs its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = tokenise(load_preferences(pairs, kind="unpaired"), tokenizer, max_length=128)
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best_of = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    settings = {**every, **best_of, "greater_is_better": True, "learning_rate": 3.0}  # an early one
    trainer = PreferenceTrainer(
        _policy(tiny_model),
        objective="bco",
        args=_arguments(tmp_path, **settings),
        train_data=rows,
        eval_data=rows,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    last = latest_checkpoint(tmp_path)[0]
    kept, of_the_last = (json.loads((f / STATE).read_text())["objective"] for f in (best, last))
    assert best != last and kept != of_the_last
    assert trainer.states == kept


def test_rotation_keeps_the_newest_and_the_best_and_no_pickle_of_arguments(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    trainer = _resumable(
        tiny_model,
        rows,
        tmp_path,
        save_steps=1,
        eval_steps=1,
        save_total_limit=2,
        learning_rate=3.0,
    )
    trainer.train()
    kept = [folder.name for folder in list_checkpoints(tmp_path)]
    assert f"checkpoint-{trainer.state.max_steps}" in kept
    assert Path(trainer.state.best_model_checkpoint).name in kept
    assert len(kept) <= 3
    assert not list(tmp_path.rglob("training_args.bin"))


def test_a_loss_that_is_not_finite_stops_with_the_rows_named_and_nothing_updated(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    trainer = PreferenceTrainer(_policy(tiny_model), args=_arguments(tmp_path), train_data=rows)
    before = _weights(trainer.model).clone()
    bad = trainer.train_dataset[3]["row"]
    plain = trainer._stats

    def poisoned(model: Any, part: Any, *rest: Any) -> Any:
        stats = plain(model, part, *rest)
        hit = [i for i, row in enumerate(part) if row["row"] == bad]
        for i in hit:
            stats.policy_chosen_logps.data[i] = float("nan")
        return stats

    trainer.self_check = list  # type: ignore[method-assign]  # it would meet the poison first
    trainer._stats = poisoned  # type: ignore[method-assign]
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 16
    with pytest.raises(
        TrainingError,
        match=rf"chosen under the policy is not a finite number; rows <memory>:{bad}\b",
    ):
        trainer.train()
    assert torch.equal(_weights(trainer.model), before)


def test_weights_that_hardly_move_are_warned_about(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate, warned in ((1e-20, True), (1e-3, False)):
        caplog.clear()
        arguments = _arguments(tmp_path, learning_rate=rate, num_train_epochs=4)
        PreferenceTrainer(_policy(tiny_model), args=arguments, train_data=rows).train()
        assert ("adapter weights have moved" in caplog.text) is warned


def test_the_self_check_says_what_the_reference_is_and_catches_a_wrong_one(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    trainer = PreferenceTrainer(_policy(tiny_model), args=_arguments(tmp_path), train_data=rows)
    lines = "\n".join(trainer.self_check())
    assert "reference: the base model with its adapters disabled" in lines
    assert "log-ratio 0), loss 0.6931 = its start value 0.6931" in lines
    plain = trainer._stats

    def wrong(model: Any, part: Any) -> Any:
        stats = plain(model, part)
        stats.reference_chosen_logps.data += 1.0
        return stats

    trainer._stats = wrong  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="The reference is wrong"):
        trainer.self_check()


def test_an_objective_without_reference_trains_without_running_it(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    bound = objectives.get("dpo_reference_free").bind(beta=0.2)
    trainer = PreferenceTrainer(
        _policy(tiny_model), objective=bound, args=_arguments(tmp_path), train_data=rows
    )
    assert "reads no reference" in trainer.self_check()[-1]
    trainer.train()
    logs = _logs(trainer)
    assert "logratios/chosen" not in logs[0]
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_raw_rows_need_a_tokenizer_and_then_train(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="needs tokenizer"):
        PreferenceTrainer(_policy(tiny_model), args=_arguments(tmp_path), train_data=pairs)
    trainer = PreferenceTrainer(
        _policy(tiny_model),
        args=_arguments(tmp_path, max_steps=1),
        train_data=pairs,
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
    )
    path = tmp_path / "metrics.jsonl"
    trainer.write_metrics_to(path)
    trainer.train()
    assert json.loads(path.read_text().splitlines()[0])["loss"] == pytest.approx(0.693147, abs=1e-5)
