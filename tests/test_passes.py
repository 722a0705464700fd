"""Laws of an optimiser step: no number depends on how it is split, whatever couples its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, TrainingArguments

from lora_dpo import objectives
from lora_dpo.config import LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.engine import collate
from lora_dpo.errors import TrainingError
from lora_dpo.objectives import OBJECTIVES, Positive, objective
from lora_dpo.objectives.paired import scaled_logratios
from lora_dpo.policy import load_policy
from lora_dpo.reference_cache import with_reference_logps
from lora_dpo.stats import PairStats
from lora_dpo.stepping import Batches
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenise(load_preferences(pairs), tokenizer, max_length=128)


@pytest.fixture(autouse=True)
def coupled() -> Iterator[None]:
    """An objective whose rows weigh each other, with a memory: log-sum-exp about a running mean."""
    before = dict(OBJECTIVES)

    def update(state: Any, stats: PairStats, *, beta: float) -> dict[str, float]:
        return {"mean": 0.9 * state["mean"] + 0.1 * float(stats.margins.double().mean())}

    @objective(
        rewards=scaled_logratios,
        data="paired",
        reference=True,
        logps="sum",
        monotone=True,
        extremes="linear",
        couples_rows=True,
        initial_state={"mean": 0.0},
        update=update,
        paper="none",
        arxiv="none",
        equation="none",
    )
    def worst_pairs(stats: PairStats, state: Any, *, beta: Positive = 0.5) -> Tensor:
        z = -beta * (stats.margins - state["mean"])
        return torch.logsumexp(z, 0).expand(len(stats))

    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 6,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
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


def _weights(policy: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for n, p in policy.named_parameters() if "lora_" in n])


def _trained(
    tiny_model: Path, rows: Tokenised, folder: Path, bound: Any, micro: int
) -> tuple[Tensor, list[float], Any]:
    trainer = PreferenceTrainer(
        _policy(tiny_model), objective=bound, args=_arguments(folder), train_data=rows
    )
    trainer.memory.batches = Batches(micro)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _weights(trainer.model), losses, trainer.states


@pytest.mark.parametrize(
    "name", ["worst_pairs", "dpo with sft", "a mixture of all"], ids=lambda name: name
)
def test_a_step_split_into_single_pairs_is_the_whole_step_along_a_trajectory(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, name: str
) -> None:
    """16 pairs in steps of 6, 6 and 4: coupled rows, and means over tokens of unequal rows."""
    sft = objectives.get("dpo").bind(beta=0.5, nll_weight=0.7)
    bound = {
        "worst_pairs": objectives.get("worst_pairs").bind(beta=0.05),
        "dpo with sft": sft,
        "a mixture of all": objectives.mixture(
            [(0.5, objectives.get("worst_pairs").bind(beta=0.05)), (0.3, sft)]
        ),
    }[name]
    weights, losses, states = _trained(tiny_model, rows, tmp_path, bound, 6)
    assert losses[-1] < losses[0]
    for micro in (1, 4):
        other, other_losses, other_states = _trained(tiny_model, rows, tmp_path, bound, micro)
        torch.testing.assert_close(other, weights, rtol=1e-3, atol=1e-5)
        assert other_losses == pytest.approx(losses, abs=1e-5)
        for key, state in states.items():
            assert other_states[key] == pytest.approx(state, abs=1e-5)
            assert state["mean"] != 0


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("name", ["worst_pairs", "dpo"])
def test_a_token_budget_splits_a_step_and_changes_no_number(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, name: str, engine: Any
) -> None:
    bound = objectives.get(name).bind(beta=0.05)
    weights, losses, _ = _trained(tiny_model, rows, tmp_path, bound, 6)
    seen: list[tuple[int, int]] = []  # rows and tokens of a micro-batch, as it is laid out
    budget = 80 if engine == "fast" else 200
    trainer = PreferenceTrainer(
        _policy(tiny_model),
        objective=bound,
        args=_arguments(tmp_path),
        train_data=rows,
        engine=engine,
        max_tokens_per_batch=budget,
    )
    plain = trainer._stats

    def spying(model: Any, part: Any, gradient_only: bool = False) -> Any:
        if model.training:
            seen.append((len(part), collate(model, part).input_ids.numel()))
        return plain(model, part, gradient_only)

    trainer._stats = spying  # type: ignore[method-assign]
    trainer.train()
    assert all(tokens <= budget or count == 1 for count, tokens in seen)
    assert any(count > 1 for count, _ in seen) and len(seen) > 6
    torch.testing.assert_close(_weights(trainer.model), weights, rtol=1e-3, atol=1e-5)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(losses, abs=1e-5)


def test_the_second_pass_sees_the_dropout_of_the_first(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    policy = _policy(tiny_model, dropout=0.5)
    move_adapter(policy, std=0.1)
    args = _arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = PreferenceTrainer(
        policy, objective="worst_pairs", args=args, train_data=rows, reference_is="base"
    )
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    plain = trainer._stats

    def spying(model: Any, part: Any, gradient_only: bool = False) -> Any:
        stats = plain(model, part, gradient_only)
        if model.training:
            seen[gradient_only].append(stats.policy_chosen_logps.detach().clone())
        return stats

    trainer._stats = spying  # type: ignore[method-assign]
    trainer.args.max_steps = 2
    trainer.train()
    assert len(seen[True]) == 4
    # the probe of the memory came before
    for first, second in zip(seen[False][1:], seen[True], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[True][0], seen[True][2])


def test_kept_reference_log_probs_change_nothing_and_the_reference_then_never_runs(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = objectives.get("dpo").bind(beta=0.5)
    expected = _trained(tiny_model, rows, tmp_path, bound, 6)
    kept = with_reference_logps(_policy(tiny_model), rows, batch_size=3)
    trainer = PreferenceTrainer(
        _policy(tiny_model), objective=bound, args=_arguments(tmp_path), train_data=kept
    )
    trainer.self_check()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr("lora_dpo.forward.reference", never)
    monkeypatch.setattr("lora_dpo.forward._fused_values", never)
    trainer.self_check = list  # type: ignore[method-assign]
    trainer.train()
    torch.testing.assert_close(_weights(trainer.model), expected[0], rtol=1e-3, atol=1e-5)


def test_reference_log_probs_of_other_rows_are_refused(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    kept = with_reference_logps(_policy(tiny_model), rows)
    shifted = kept.rows["reference_chosen_logps"][::-1]
    wrong = kept.rows.remove_columns("reference_chosen_logps").add_column(
        "reference_chosen_logps", [value - 50 for value in shifted]
    )
    trainer = PreferenceTrainer(
        _policy(tiny_model),
        args=_arguments(tmp_path),
        train_data=dataclasses.replace(kept, rows=wrong),
    )
    with pytest.raises(TrainingError, match="kept with the rows differ by"):
        trainer.train()
