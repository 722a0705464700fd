"""Memory that runs out: in a real step, in evaluation and in the reference's pass; and what a plan counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, TrainerCallback, TrainingArguments

from lora_dpo import objectives
from lora_dpo.arguments import checkpointing_fields
from lora_dpo.config import LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import TrainingError
from lora_dpo.evaluation import collect_stats
from lora_dpo.layers import work_of
from lora_dpo.planning import Batches, Lengths, Plan, Setting, Shape, Tokens, card_of, operations
from lora_dpo.planning.measuring import Bytes
from lora_dpo.planning.operations import has_several, micro_batches, plain_bytes
from lora_dpo.planning.plans import seconds_floor
from lora_dpo.policy import load_policy, peft_config
from lora_dpo.reference_cache import with_reference_logps
from lora_dpo.reference_store import stored_reference_logps
from lora_dpo.shortage import Shortage
from lora_dpo.trainer import PreferenceTrainer
from lora_dpo.watching.attaching import plan_and_measurement

LORA = LoraConfig(rank=4)
LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
# of the config: 32 layers of 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336), and rank 16 on each of them
SHAPE = Shape.of(LLAMA, linears=6979321856, last=32 * 4096 * 14336, lora=41943040)


def _row(prompt: int, chosen: int, rejected: int, start: int = 3) -> dict[str, Any]:
    return {
        "prompt_ids": list(range(start, start + prompt)),
        "chosen_ids": list(range(5000, 5000 + chosen)),
        "rejected_ids": list(range(9000, 9000 + rejected)),
    }


# ---- the floor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "short", "long"),
    [
        ({"again": 1.0, "skips_last": False}, 92.2, 257.7),
        ({"again": 1.0}, 86.4, 242.3),
        ({"again": 0.5}, 78.2, 219.3),
        ({}, 70.1, 196.3),
        ({"reference": 0.0}, 47.1, 133.2),
    ],
)
def test_the_operations_of_a_pair_are_those_of_the_performance_study(
    how: dict[str, Any], short: float, long: float
) -> None:
    """The study counts an input gradient that the first layer's attention needs not: 0.3 % more."""
    for lengths, expected in (((512, 512, 512), short), ((2048, 1024, 1024), long)):
        found = operations(SHAPE, Tokens.laid([_row(*lengths)]), **how) / 1e12
        assert 0.994 * expected < found < 1.001 * expected


def test_weights_are_made_plain_twice_a_micro_batch_and_more_often_where_none_is_kept() -> None:
    def passes(**how: Any) -> float:
        settings = {"reference": True, "again": 1.0, "fast": True, "keeps_weights": True, **how}
        moved = plain_bytes(
            replace(SHAPE, first=0), size=2, double=True, skips_last=True, **settings
        )
        return moved / (2.515625 * SHAPE.linears)

    last = SHAPE.last / SHAPE.linears
    assert passes() == passes(again=0.0) == pytest.approx(2)
    assert passes(keeps_weights=False, again=0.0) == pytest.approx(3)
    assert passes(keeps_weights=False, again=0.0, reference=False) == pytest.approx(2)
    assert passes(keeps_weights=False) == pytest.approx(4 - last)
    assert passes(fast=False) == pytest.approx(4)


def test_rows_of_one_prompt_may_share_it_so_a_floor_counts_it_as_seldom_as_can_be() -> None:
    same = [
        _row(100, 10, 20),
        {**_row(100, 30, 40), "chosen_ids": [1] * 30, "rejected_ids": [2] * 40},
    ]
    assert Tokens.laid(same).count == 100 + 9 + 19 + 100 + 29 + 39
    assert Tokens.laid(same, together=2).count == 100 + 9 + 19 + 29 + 39
    assert Tokens.laid([same[0]] * 2, together=2).count == 100 + 9 + 19  # the same answers too
    pair = Tokens.laid(same[:1])
    assert pair.seen == (109**2 + 119**2 - 100**2) / 2 and pair.predicted == 30
    assert Tokens.padded(same[:1]).count == 2 * 120


def test_a_token_budget_decides_how_many_micro_batches_a_step_has() -> None:
    rows = [_row(50, 26, 26, start=i) for i in range(8)]  # 100 tokens each, laid flat
    assert micro_batches(rows, Batches(2, 4), flat=True) == 4
    assert micro_batches(rows, Batches(8, 1, max_tokens=200), flat=True) == 4
    assert micro_batches(rows, Batches(8, 1, max_tokens=50), flat=True) == 8  # a row is not split
    assert not has_several(rows, Batches(8, 1), flat=True)
    assert has_several(rows, Batches(8, 1, max_tokens=799), flat=True)
    assert not has_several(rows, Batches(8, 1, max_tokens=800), flat=True)


def _bytes(**parts: int) -> Bytes:
    names = Bytes.__dataclass_fields__
    return Bytes(**{**dict.fromkeys(names, 0), "layers": 4, "gradients": 1, **parts})


def test_weights_that_are_not_packed_are_not_made_plain_and_offloading_keeps_two_inputs() -> None:
    counted = {"linears": SHAPE.linears, "last": SHAPE.last, "lora": SHAPE.lora}
    rows = [_row(512, 512, 512)]
    for kind, ours in (("nf4", 0.458), ("none", 69.93 / 165.2)):
        setting = Setting(LLAMA, peft_config(LoraConfig()), quantisation=kind)
        plan = Plan(
            _bytes(**counted), setting, Batches(1), Lengths.of(rows, 1), None, "", 0,
            card=card_of("rtx4090"), step=Tokens.laid(rows),
        )  # fmt: skip
        assert seconds_floor(plan) == pytest.approx(ours, rel=2e-3)
    found = _bytes(waiting=5, waiting_kept=7, recomputed=10, kept=100, head=3).offloaded()
    assert found.activations(2) == 7 + 2 * 10 + 2 * 100 + 3
    assert found.activations(4) == 5 + 2 * 10 + 3


# ---- memory that runs out ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tiny_model: Path, pairs: list[dict[str, str]]) -> Tokenised:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenise(load_preferences(pairs), tokenizer, max_length=512)


class _Once:
    """Out of memory in one call of the last layer's forward pass with gradients, or above a size."""

    def __init__(self, policy: Any, *, at: int = -1, above: int = 10**9, tried: str = "") -> None:
        self.calls, self.at, self.above, self.failed = 0, at, above, 0
        self.text = f"CUDA out of memory. Tried to allocate {tried or '2.00 GiB'}."
        causal = policy.get_base_model()
        causal.model.layers[-1].mlp.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        self.calls += 1
        if self.calls == self.at or args[0].shape[0] * args[0].shape[1] > self.above:
            self.failed += 1
            raise torch.OutOfMemoryError(self.text)


class _InItsSecondMicroBatch(TrainerCallback):
    """Lets the policy's pass of the second micro-batch of the third step fail."""

    def __init__(self, shortage: _Once) -> None:
        self.shortage = shortage

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.shortage.at = self.shortage.calls + 3  # after policy and reference of the first


def _trainer(model: Path, rows: Tokenised, folder: Path, **options: Any) -> PreferenceTrainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=3, save_strategy="no", report_to=[], use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        logging_steps=1, **{next(iter(checkpointing_fields({}))): True},
    )  # fmt: skip
    torch.manual_seed(0)
    policy = load_policy(model, lora=LORA)
    return PreferenceTrainer(policy, args=args, train_data=rows, **options)


def _ended(trainer: PreferenceTrainer) -> tuple[list[float], torch.Tensor]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return losses, torch.cat(weights)


def test_a_real_step_that_fails_halfway_is_done_again_and_the_run_ends_as_any_other(
    tiny_model: Path, tokens: Tokenised, tmp_path: Path
) -> None:
    losses, weights = _ended(_trainer(tiny_model, tokens, tmp_path, memory_budget_gib=10))
    short = _trainer(tiny_model, tokens, tmp_path, memory_budget_gib=10)
    plan = short.memory.plan
    assert plan is not None and plan.recomputed == 0
    work = work_of(short.model.get_base_model())
    assert work is not None
    shortage = _Once(short.model, tried="1 bytes")
    short.add_callback(_InItsSecondMicroBatch(shortage))
    path = tmp_path / "plan.json"
    with plan_and_measurement(short, path):
        found, ended = _ended(short)
    assert shortage.failed == 1
    assert found == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(ended, weights, rtol=1e-4, atol=1e-6)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert 0 < kept["recomputed_layers"] == work.recomputed
    assert kept["peak_bytes"] < plan.peak and "step 3" in kept["changes"][0]


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_fewer_rows_and_the_same_numbers(
    tiny_model: Path, tokens: Tokenised
) -> None:
    objective = objectives.get("sampo").bind()  # draws tokens
    policy = load_policy(tiny_model, lora=LORA)
    few = replace(tokens, rows=tokens.rows.select(range(6)))
    expected = collect_stats(policy, few, objective, batch_size=4)
    longest = max(map(_laid, few.rows))
    shortage = _Once(policy, above=2 * longest)
    found = collect_stats(policy, few, objective, batch_size=4)
    assert shortage.failed
    for name, values in expected.present().items():
        assert torch.allclose(values, found.present()[name], atol=1e-4), name


def _laid(row: Any) -> int:
    return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))


def test_the_references_pass_is_narrowed_too_and_its_values_are_found_again(
    tiny_model: Path, tokens: Tokenised, tmp_path: Path
) -> None:
    policy = load_policy(tiny_model, lora=LORA)
    few = replace(tokens, rows=tokens.rows.select(range(6)))
    expected = with_reference_logps(policy, few, batch_size=4).rows
    shortage = _Once(policy, above=2 * max(map(_laid, few.rows)))
    found = stored_reference_logps(policy, few, tmp_path, batch_size=4).rows
    failed = shortage.failed
    assert failed
    again = stored_reference_logps(policy, few, tmp_path, batch_size=6).rows  # whatever the width
    assert shortage.failed == failed
    for name in ("reference_chosen_logps", "reference_rejected_logps"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
        assert again[name] == found[name]


def test_one_row_that_does_not_fit_is_an_error_that_says_which_and_what_takes_less(
    tiny_model: Path, tokens: Tokenised
) -> None:
    policy = load_policy(tiny_model, lora=LORA)
    _Once(policy, above=1)
    with pytest.raises(TrainingError) as error:
        with_reference_logps(policy, tokens, batch_size=4)
    text = str(error.value)
    for words in ("One row alone", "embeddings_on_cpu", "chunk_tokens", "data.max_length"):
        assert words in text


def test_what_was_missing_is_what_was_asked_for_or_what_the_plan_says_was_still_to_come() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")
    found = Shortage.of(error, torch.device("cpu"))
    assert found.tried == 3 * 2**29 and found.missing(10**12) == found.tried
    on_card = replace(found, tried=2, held=10)
    assert on_card.missing(11) == 2  # the plan was too low
    assert on_card.missing(20) == 10  # the room was smaller
    bare = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."
    )
    assert Shortage.of(bare, torch.device("cpu")).tried == 512
