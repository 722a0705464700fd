"""TR-DPO on one base: what each rule makes of the reference, and that runs with it can be resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, TrainingArguments

from lora_dpo import evaluate, objectives, train
from lora_dpo.config import Config, LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import ConfigError, ModelError
from lora_dpo.forward import completion_logps
from lora_dpo.moving_reference import ReferenceMoves
from lora_dpo.policy import let_reference_move, load_policy, move_reference, reference
from lora_dpo.reference_cache import with_reference_logps
from lora_dpo.trainer import PreferenceTrainer
from tests.helpers import move_adapter, pad, random_rows
from tests.objectives.vectors import VECTORS

RULES = ("hard", "soft", "factors")
BATCH = pad(random_rows(4, vocabulary=300))


def products(policy: PeftModel, name: str) -> list[Tensor]:
    """Return ``scaling * B @ A`` of every layer, in float64: the change that an adapter makes."""
    found = []
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            down, up = (getattr(module, f"lora_{k}")[name].weight.detach().double() for k in "AB")
            found.append(module.scaling[name] * up @ down)
    return found


def logps(policy: PeftModel, *, of_reference: bool) -> Tensor:
    policy.eval()
    with torch.no_grad():
        if not of_reference:
            return completion_logps(policy, BATCH)
        with reference(policy):
            return completion_logps(policy, BATCH)


def move_both(policy: PeftModel, seed: int) -> None:
    """Another policy altogether: both factors anew, so that no product shares a row space."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if ".default" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def new(tiny_model: Path, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    return load_policy(tiny_model, lora=LoraConfig(rank=4, **lora))


@pytest.mark.parametrize("rule", RULES)
def test_a_reference_that_can_move_is_at_first_the_base(tiny_model: Path, rule: Any) -> None:
    policy = new(tiny_model, rslora=True)
    base = logps(policy, of_reference=True)
    let_reference_move(policy, rule)
    assert torch.equal(logps(policy, of_reference=True), base)
    move_adapter(policy)
    assert torch.equal(logps(policy, of_reference=True), base)
    frozen = [p.requires_grad for n, p in policy.named_parameters() if ".reference" in n]
    assert frozen and not any(frozen)


@pytest.mark.parametrize("dora", [False, True])
def test_a_hard_move_makes_the_reference_the_policy_of_that_step(
    tiny_model: Path, dora: bool
) -> None:
    policy = new(tiny_model, dora=dora, modules_to_save=["norm"])
    let_reference_move(policy, "hard")
    move_adapter(policy)
    assert move_reference(policy, "hard", 0.6) == 0.0
    then = logps(policy, of_reference=False)
    assert torch.equal(logps(policy, of_reference=True), then)
    move_adapter(policy, seed=2)
    assert torch.equal(logps(policy, of_reference=True), then)
    assert not torch.equal(logps(policy, of_reference=False), then)


def test_soft_moves_average_the_products_and_state_what_they_leave_out(tiny_model: Path) -> None:
    policy, weight = new(tiny_model, rslora=True), 0.6
    let_reference_move(policy, "soft")
    for number in range(4):
        move_both(policy, seed=number)  # unrelated policies: the worst case
        before, mine = products(policy, "reference"), products(policy, "default")
        stated = move_reference(policy, "soft", weight)
        errors = [
            float((found - exact).norm() / exact.norm())
            for found, old, ours in zip(products(policy, "reference"), before, mine, strict=True)
            for exact in [weight * ours + (1 - weight) * old]
        ]
        assert max(errors) == pytest.approx(stated, abs=2e-6)
        # rank 4 and rank 4 fit into rank 8
        assert (stated < 1e-6) is (number < 2)


def test_the_truncation_keeps_the_largest_singular_values(tiny_model: Path) -> None:
    policy = new(tiny_model)
    let_reference_move(policy, "soft")
    for number in range(3):
        move_both(policy, seed=number)
        before, mine = products(policy, "reference"), products(policy, "default")
        move_reference(policy, "soft", 0.5)
    for found, old, ours in zip(products(policy, "reference"), before, mine, strict=True):
        sizes = torch.linalg.svdvals(0.5 * ours + 0.5 * old)  # Eckart-Young: the best of rank 8
        torch.testing.assert_close(torch.linalg.svdvals(found)[:8], sizes[:8], rtol=1e-5, atol=1e-7)


def test_averaging_factors_differs_from_averaging_products_by_the_stated_term(
    tiny_model: Path,
) -> None:
    policy, weight = new(tiny_model), 0.3
    let_reference_move(policy, "factors")
    move_adapter(policy)
    layers = [m for m in policy.modules() if isinstance(m, LoraLayer)]
    with torch.no_grad():
        for layer in layers:
            layer.lora_A["reference"].weight += 0.1
            layer.lora_B["reference"].weight += 0.1
    crossed = [
        layer.scaling["default"]
        * (layer.lora_B["default"].weight - layer.lora_B["reference"].weight).double()
        @ (layer.lora_A["default"].weight - layer.lora_A["reference"].weight).double()
        for layer in layers
    ]
    exact = [
        weight * ours + (1 - weight) * old
        for ours, old in zip(
            products(policy, "default"), products(policy, "reference"), strict=True
        )
    ]
    move_reference(policy, "factors", weight)
    for found, soft, cross in zip(products(policy, "reference"), exact, crossed, strict=True):
        torch.testing.assert_close(
            soft - found, weight * (1 - weight) * cross, rtol=1e-4, atol=1e-6
        )


def test_weights_of_the_move_equal_the_public_implementation(tiny_model: Path) -> None:
    # TRL's SyncRefModelCallback was executed on these tensors; the weight is the policy's
    known = VECTORS["aux"]["tr_dpo_sync"]
    policy = new(tiny_model)
    let_reference_move(policy, "factors")
    layer: Any = next(m for m in policy.modules() if isinstance(m, LoraLayer))

    def corner(name: str) -> Tensor:
        weight: Tensor = layer.lora_A[name].weight.data
        return weight[:2, :2]

    corner("default").copy_(torch.tensor(known["policy"][0]))
    corner("reference").copy_(torch.tensor(known["ref_before"][0]))
    move_reference(policy, "factors", known["alpha"])
    torch.testing.assert_close(corner("reference"), torch.tensor(known["ref_after"][0]))


# ---- in training -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenise(load_preferences(pairs), tokenizer, max_length=128)


def arguments(folder: Path, **further: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **further})


def trainer(
    tiny_model: Path, rows: Tokenised, args: TrainingArguments, moves: ReferenceMoves
) -> PreferenceTrainer:
    return PreferenceTrainer(new(tiny_model), args=args, train_data=rows, reference_moves=moves)


def test_after_a_hard_move_the_loss_starts_again_at_its_start_value(
    tiny_model: Path, rows: Tokenised, tmp_path: Path
) -> None:
    run = trainer(tiny_model, rows, arguments(tmp_path), ReferenceMoves("hard", steps=2))
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses) == 6
    for step, loss in enumerate(losses):
        assert (abs(loss - math.log(2)) < 1e-6) is (step % 2 == 0)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_ends_in_the_same_bytes(
    tiny_model: Path, rows: Tokenised, tmp_path: Path, rule: Any
) -> None:
    moves = ReferenceMoves(rule, steps=2, weight=0.6)
    whole = arguments(tmp_path / "whole", save_strategy="steps", save_steps=3)
    trainer(tiny_model, rows, whole, moves).train()
    again = arguments(tmp_path / "whole", save_strategy="steps", save_steps=3)
    for file in ("adapter_model.safetensors", "moving_reference.safetensors"):
        kept = load_file(tmp_path / "whole" / "checkpoint-6" / file)
        (tmp_path / file).write_bytes((tmp_path / "whole" / "checkpoint-6" / file).read_bytes())
        assert kept
    import shutil

    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    resumed = trainer(tiny_model, rows, again, moves)
    resumed.train(resume_from_checkpoint=True)
    for file in ("adapter_model.safetensors", "moving_reference.safetensors"):
        now, before = (
            load_file(folder / file) for folder in (tmp_path / "whole" / "checkpoint-6", tmp_path)
        )
        assert now.keys() == before.keys()
        assert all(torch.equal(now[key], before[key]) for key in now)


def test_a_run_with_a_moving_reference_is_evaluated_as_it_ended(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = Config.parse(
        {
            "objective": "dpo",
            "model": {"base": str(tiny_model)},
            "lora": {"rank": 4},
            "data": {"train": str(data), "eval_fraction": 0.3, "max_length": 128},
            "train": {
                "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
                "reference_update": "soft", "reference_update_steps": 2, "save_steps": 3,
                "use_cpu": True, "report_to": [],
            },
            "output": {"dir": str(tmp_path / "run")},
        }
    )  # fmt: skip
    run = train(config)
    assert "follows the policy (soft, weight 0.6, every 2 steps)" in run.results["reference"]
    found = evaluate(run)
    for name, (mean, _, _) in run.results["held_out"]["mean_low_high"].items():
        assert found[name].mean == pytest.approx(mean, rel=1e-4, abs=1e-5)
    earlier = evaluate(run, checkpoint="3")
    assert earlier["logratios/chosen"].mean != found["logratios/chosen"].mean


# ---- refusals --------------------------------------------------------------------------------


def test_what_has_no_meaning_is_refused(tiny_model: Path, rows: Tokenised, tmp_path: Path) -> None:
    args, moves = arguments(tmp_path), ReferenceMoves("hard", steps=2)
    with pytest.raises(ConfigError, match="simpo reads no reference"):
        PreferenceTrainer(
            new(tiny_model), objective=objectives.get("simpo").bind(), args=args,
            train_data=rows, reference_moves=moves,
        )  # fmt: skip
    known = with_reference_logps(new(tiny_model), rows)
    with pytest.raises(ConfigError, match="a reference that does not move"):
        trainer(tiny_model, known, args, moves)
    for rule in ("soft", "factors"):
        with pytest.raises(ModelError, match="DoRA"):
            let_reference_move(new(tiny_model, dora=True), rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_update": "ema"}, "train.reference_update: got 'ema'"),
        ({"reference_update_steps": 5}, "train.reference_update is none"),
        ({"reference_update": "hard", "reference_update_weight": 0.5}, "no weight"),
        ({"reference_update": "soft", "reference_update_weight": 1.5}, "weight: got 1.5"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: Any, message: str) -> None:
    values = {"model": {"base": "b"}, "data": {"train": "d"}, "output": {"dir": "o"}}
    with pytest.raises(ConfigError, match=message):
        Config.parse({**values, "train": settings})


def test_the_schedule_checks_its_own_values() -> None:
    for bad in ({"update": "x"}, {"update": "soft", "steps": 0}, {"update": "soft", "weight": 0.0}):
        with pytest.raises(ConfigError, match=r"train\.reference_update"):
            ReferenceMoves(**bad)  # type: ignore[arg-type]
