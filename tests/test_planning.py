"""The planner: its bytes against the allocator's, its choices, and what it says before weights load."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)
from typer.testing import CliRunner

import lora_dpo
from lora_dpo.cli import app
from lora_dpo.config import Config, LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.engine import choose_engine, lay_out, recompute_layers
from lora_dpo.errors import ConfigError, TrainingError
from lora_dpo.forward import both_logps
from lora_dpo.planning import (
    Batches,
    Lengths,
    Setting,
    asking,
    card_of,
    compact_rows,
    largest_micro_batch,
    largest_places,
    measure,
)
from lora_dpo.planning.measuring import run
from lora_dpo.planning.plans import make_plan
from lora_dpo.planning.remedies import _Asked, _shorter_rows
from lora_dpo.policy import load_policy, peft_config
from lora_dpo.trainer import PreferenceTrainer
from tests.allocating import peak_allocated
from tests.conftest import WIDE

LORA = LoraConfig(rank=8)


def _row(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
    return {
        "prompt_ids": list(range(3, 3 + prompt)),
        "chosen_ids": list(range(50, 50 + chosen)),
        "rejected_ids": list(range(90, 90 + rejected)),
    }


ROWS = [_row(150, 90, 120), _row(60, 130, 70), _row(40, 30, 20)]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [
        {
            "prompt": f"{i} " + "why? " * (5 + i % 7) * 2,
            "chosen": " because." * (3 + i % 5) * 2,
            "rejected": " no!" * (9 - i % 6) * 2,
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _config(model: Path, data: Path, folder: Path, **train: Any) -> Config:
    return Config.parse(
        {
            "model": {"base": str(model)},
            "lora": {"rank": 8},
            "data": {"train": str(data), "eval_fraction": 0, "cache_dir": str(folder / "tokens")},
            "train": {"gradient_accumulation_steps": 2, "max_steps": 2, **train},
            "output": {"dir": str(folder / "run"), "diagnose": False},
        }
    )


@pytest.mark.parametrize(
    ("engine", "checkpointing", "objective"),
    [
        ("fast", True, "dpo"),
        ("fast", False, "dpo"),
        pytest.param("fast", True, "simpo", marks=pytest.mark.slow),
        pytest.param("plain", True, "dpo", marks=pytest.mark.slow),
        ("plain", False, "simpo"),
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_what_a_step_allocates(
    wide_model: Path,
    preferences: Path,
    tmp_path: Path,
    engine: str,
    checkpointing: bool,
    objective: str,
) -> None:
    settings = {"engine": engine, "gradient_checkpointing": checkpointing, "use_cpu": True}
    config = _config(wide_model, preferences, tmp_path, **settings)
    config = config.replace("objective", objective)
    plan = lora_dpo.plan(config)
    assert plan.fits is None and plan.recomputed == (5 if checkpointing else 0)

    tokenizer = AutoTokenizer.from_pretrained(wide_model)
    rows = tokenise(load_preferences(preferences), tokenizer, max_length=1024)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
        **{_checkpointing_name(): checkpointing},
    )  # fmt: skip
    trainer = PreferenceTrainer(
        load_policy(wide_model, lora=LORA),
        objective=objective, args=arguments, train_data=rows, engine=engine,  # type: ignore[arg-type]
    )  # fmt: skip
    if engine == "plain" and checkpointing:
        trainer.model.get_base_model().gradient_checkpointing = True
        trainer.model.get_base_model()._set_gradient_checkpointing(
            True, lambda f, *a, **k: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
        )
        trainer.model.enable_input_require_grads()
    trainer.create_optimizer()
    longest = largest_micro_batch(list(rows.rows), Batches(2))
    others = [row for row in rows.rows if row not in longest][:2]

    from lora_dpo.stepping import Rows

    step = {"rows": Rows([*longest, *others])}
    trainer.training_step(trainer.model, step)
    trainer.optimizer.step()  # its state is there from now on
    trainer.optimizer.zero_grad(set_to_none=True)
    static = plan.bytes.static - plan.bytes.gradients
    measured = static + peak_allocated(lambda: trainer.training_step(trainer.model, step))
    assert plan.peak == pytest.approx(measured, rel=0.1)
    real = sum(t.untyped_storage().nbytes() for t in _tensors(trainer))
    assert static == pytest.approx(real, rel=0.01)


def _checkpointing_name() -> str:
    from lora_dpo.arguments import checkpointing_fields

    return next(iter(checkpointing_fields({})))


def _tensors(trainer: Any) -> list[torch.Tensor]:
    state = [v for s in trainer.optimizer.state.values() for v in s.values()]
    found = [*trainer.model.parameters(), *trainer.model.buffers(), *state]
    for module in trainer.model.modules():
        quant = getattr(getattr(module, "weight", None), "quant_state", None)
        if quant is not None and type(module).__name__ == "Linear4bit":
            parts = [quant.absmax, quant.code, quant.offset, quant.state2.absmax, quant.state2.code]
            found += [part for part in parts if isinstance(part, torch.Tensor)]
    tensors = [t for t in found if isinstance(t, torch.Tensor)]
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())


@pytest.mark.parametrize("flat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_depths_give_the_bytes_of_any_depth_and_any_share_of_recomputed_layers(
    wide_model: Path, flat: bool
) -> None:
    architecture = LlamaConfig(**WIDE)
    setting = Setting(architecture, peft_config(LORA), dtype=torch.float32, flat=flat, chunk=64)
    found = measure(setting, ROWS, accumulates=False)
    whole = {again: run(setting, ROWS, 5, recomputes=again) for again in (True, False)}
    for again, layers in ((True, 5), (False, 0)):
        assert found.activations(layers) == pytest.approx(whole[again].peak, rel=0.02)
    assert found.static - found.optimiser == whole[True].static
    policy = load_policy(wide_model, lora=LORA).train()
    choose_engine(policy, ROWS[:2], 300, "fast" if flat else "auto", chunk=64)
    if not flat:
        policy.get_base_model().config._attn_implementation = "sdpa"
    batch = lay_out(ROWS, flat=flat)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        ours, theirs = both_logps(policy, batch, chunk=64)
        (ours - theirs).sum().backward()

    for recomputed in (5, 3, 1, 0):
        recompute_layers(policy, recomputed)
        step()
        policy.zero_grad(set_to_none=True)
        assert found.activations(recomputed) == pytest.approx(peak_allocated(step), rel=0.1)


@pytest.mark.parametrize("attends", [[0, 3], [0, 2]])  # in no order, and every second one
def test_layers_of_several_kinds_are_all_planned_and_not_as_those_that_come_first(
    attends: list[int],
) -> None:
    """Convolutions beside attention (LFM2), which carry a state: rows are padded, whichever is first."""
    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}
    architecture = Lfm2Config(**sizes, **heads, full_attn_idxs=attends)
    setting = Setting(architecture, peft_config(LORA), dtype=torch.float32, chunk=64)
    setting, why = asking._as_the_engine_would(setting, "auto", 640)
    assert not setting.flat and setting.fast and "attention alone (conv)" in why
    found = measure(setting, ROWS, accumulates=False)
    torch.manual_seed(0)
    policy = load_policy(Lfm2ForCausalLM(architecture), lora=LORA, quantisation="none").train()
    line = choose_engine(policy, ROWS[:2], 640, "auto", chunk=64)
    assert "attention alone (conv)" in line and not line.warns
    batch = lay_out(ROWS, flat=False)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        ours, theirs = both_logps(policy, batch, chunk=64)
        (ours - theirs).sum().backward()

    for recomputed in (4, 0):
        recompute_layers(policy, recomputed)
        step()
        policy.zero_grad(set_to_none=True)
        assert found.activations(recomputed) == pytest.approx(peak_allocated(step), rel=0.1)


@pytest.mark.parametrize(
    "rows",
    [pytest.param(ROWS, marks=pytest.mark.slow), [_row(500, 140, 140)] * 2],
    ids=["padded", "equal"],
)
def test_the_plan_of_the_librarys_own_layers_knows_whether_rows_need_a_mask(
    wide_model: Path, rows: list[dict[str, Any]]
) -> None:
    """The library builds no mask over rows of equal length; 640 x 640 x 4 bytes a sequence are seen."""
    setting = Setting(
        LlamaConfig(**WIDE),
        peft_config(LORA),
        dtype=torch.float32,
        flat=False,
        fast=False,
        chunk=64,
    )
    found = measure(setting, rows, accumulates=False)
    policy = load_policy(wide_model, lora=LORA).train()
    choose_engine(policy, rows[:2], 640, "plain", chunk=64)
    batch = lay_out(rows, flat=False)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        ours, theirs = both_logps(policy, batch, chunk=64)
        (ours - theirs).sum().backward()

    step()
    policy.zero_grad(set_to_none=True)
    assert found.activations(0) == pytest.approx(peak_allocated(step), rel=0.1)


def test_as_few_layers_are_recomputed_as_fit_and_more_room_never_means_more_bytes_than_room() -> (
    None
):
    setting = Setting(LlamaConfig(**WIDE), peft_config(LORA), dtype=torch.float32, chunk=64)
    found = measure(setting, ROWS)
    for room in (found.peak(5), found.peak(3) + 1, found.peak(0)):
        plan = make_plan(setting, ROWS, Batches(3, 2), room=room)
        assert plan.fits and plan.peak <= room
        assert all(found.peak(fewer) > room for fewer in range(plan.recomputed))
        assert not plan.remedies
        assert sum(plan.parts().values()) == plan.peak
    tight = make_plan(setting, ROWS, Batches(3, 2), room=min(map(found.peak, range(6))) - 1)
    assert not tight.setting.keeps_weights  # tried before it is said not to fit


@pytest.mark.slow
def test_each_remedy_spares_what_it_says() -> None:
    setting = Setting(LlamaConfig(**WIDE), peft_config(LoraConfig()), dtype=torch.float32, chunk=64)
    plan = make_plan(setting, ROWS, Batches(3, 2), room=1)
    assert plan.fits is False
    remedies = {remedy.change.split(":")[0]: remedy for remedy in plan.remedies}
    keep = replace(plan.setting)

    def peak(other: Setting, rows: Any = ROWS, micro: int = 3) -> int:
        return measure(other, largest_micro_batch(rows, Batches(micro))).peak()

    expected = {
        "train.per_device_train_batch_size": peak(keep, micro=1),
        "model.embeddings_on_cpu": peak(replace(keep, embeddings_on_cpu=True)),
        "train.optim": peak(replace(keep, optimiser=2.0)),
        "data.max_length": peak(keep, sorted(ROWS, key=lambda r: len(r["prompt_ids"]))[:2]),
    }
    for name, smaller in expected.items():
        assert remedies[name].spared == pytest.approx(plan.peak - smaller, abs=4), name
    assert remedies["lora.rank"].spared > 0
    assert (
        not any(remedy.fits for remedy in plan.remedies) and "do not make it fit" in plan.together
    )
    names = [remedy.change.split(":")[0] for remedy in plan.remedies]
    assert names.index("train.optim") > names.index("train.per_device_train_batch_size")
    assert names[-2:] == ["data.max_length", "lora.rank"] and plan.remedies[-2].dropped == 1


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_librarys_layers_are_planned_all_or_nothing_as_the_arguments_say(
    wide_model: Path, preferences: Path, tmp_path: Path, checkpointing: bool
) -> None:
    settings = {"engine": "plain", "gradient_checkpointing": checkpointing}
    config = _config(wide_model, preferences, tmp_path, memory_budget_gib=10, **settings)
    plan = lora_dpo.plan(config)
    assert plan.fits and plan.recomputed == (5 if checkpointing else 0)
    assert "engine: the library's layers, padded rows" in str(plan)
    assert plan.to_dict()["parameters"]["trained"] == plan.bytes.trained


def test_rows_beyond_a_limit_are_those_that_are_counted_as_dropped() -> None:
    """The longest by what max_length bounds is not the longest by what it takes laid flat."""
    setting = Setting(LlamaConfig(**WIDE), peft_config(LORA), dtype=torch.float32, chunk=64)
    rows = [
        _row(280, 10, 5),
        _row(40, 190, 190),
        _row(30, 20, 10),
    ]  # 290, 230, 50; laid 293, 417, 58
    found = dict(_of_length(rows))
    assert found == {"data.max_length: 230": 1}
    asked = _Asked(setting, rows, Batches(1), True, True)
    (change,) = _shorter_rows(rows)
    assert change.make(asked).rows == rows[1:]


def _of_length(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(change.words, change.dropped) for change in _shorter_rows(rows)]


def test_a_plan_needs_no_weights(wide_model: Path, preferences: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(wide_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with_weights = lora_dpo.plan(_config(wide_model, preferences, tmp_path), gpu="12GiB")
    without = lora_dpo.plan(_config(bare, preferences, tmp_path), gpu="12GiB")
    assert without.to_dict() == with_weights.to_dict()
    assert without.setting.dtype == torch.bfloat16  # of the card, not of this machine


def test_an_8b_model_at_512_and_two_answers_of_512_takes_what_was_computed_from_its_shape() -> None:
    # 7.2 GB: the performance report's own formula for a shared prompt, all recomputed, fp32 Adam;
    # 5.87: without embeddings on the card and with an 8-bit optimiser, no weight kept
    llama = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    setting = Setting(llama, peft_config(LoraConfig()))
    found = measure(setting, [_row(512, 512, 512)])
    assert found.linears == pytest.approx(6979.3e6, rel=1e-4)
    assert found.trained == pytest.approx(41.9e6, rel=1e-2)
    assert found.quantised == pytest.approx(3.60e9, rel=0.01)
    assert (
        found.recomputed == 1535 * 4096 * 2 - 4096 * 2
    )  # one state a token; the last predicts none
    assert found.peak() == pytest.approx(7.2e9, rel=0.1)


def test_lengths_count_what_is_shared_and_what_is_padded() -> None:
    rows = [_row(10, 4, 6), _row(2, 3, 3)]
    lengths = Lengths.of(rows, 2)
    assert (lengths.rows, lengths.longest, lengths.sequences) == (2, 16, 14 + 16 + 5 + 5)
    assert lengths.laid == (10 + 3 + 5) + (2 + 2 + 2)  # an answer's last token predicts nothing
    assert lengths.padded == 4 * 16 and lengths.predicted == 4 + 6 + 3 + 3


@pytest.mark.parametrize(
    ("text", "gib"), [("rtx4090", 24), ("12GiB", 12), ("RTX 3060", 12), ("24", 24), ("8.5g", 8.5)]
)
def test_a_card_is_a_name_or_an_amount(text: str, gib: float) -> None:
    assert card_of(text).gib == gib


@pytest.mark.parametrize("text", ["rtx4091", "", "0GiB", "-3", "12TB"])
def test_what_is_no_card_is_refused_with_the_nearest(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an amount of memory"):
        card_of(text)


def test_the_command_prints_the_plan_and_remedies_where_it_does_not_fit(
    wide_model: Path, preferences: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(_config(wide_model, preferences, tmp_path).to_yaml(), encoding="utf-8")
    call = CliRunner()
    done = call.invoke(app, ["plan", str(path), "--gpu", "rtx3060"])
    assert done.exit_code == 0, done.output
    assert "fits into RTX 3060" in done.output and "a step takes at least" in done.output
    done = call.invoke(app, ["plan", str(path), "--gpu", "0.81GiB", "--json"])
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["fits"] is False and len(found["remedies"]) >= 3
    done = call.invoke(app, ["plan", str(path), "--gpu", "rtx999"])
    assert done.exit_code == 1 and "expected an amount of memory" in done.output


# ---- memory in a run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(wide_model: Path, preferences: Path) -> Tokenised:
    return tokenise(
        load_preferences(preferences), AutoTokenizer.from_pretrained(wide_model), max_length=1024
    )


def _trainer(
    model: Path, rows: Tokenised, folder: Path, *, recompute: bool = True, **options: Any
) -> PreferenceTrainer:
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_strategy="no", report_to=[], use_cpu=True,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
        logging_steps=1, **{_checkpointing_name(): recompute},
    )  # fmt: skip
    return PreferenceTrainer(load_policy(model, lora=LORA), args=args, train_data=rows, **options)


def test_a_budget_keeps_layers_and_is_kept(
    wide_model: Path, tokens: Tokenised, tmp_path: Path
) -> None:
    free = _trainer(wide_model, tokens, tmp_path)
    assert free.memory.plan is None  # nothing limits a CPU
    plan = _trainer(wide_model, tokens, tmp_path, memory_budget_gib=10).memory.plan
    assert plan is not None and plan.recomputed == 0
    room = (plan.bytes.peak(5) + plan.bytes.peak(0)) / 2
    trainer = _trainer(wide_model, tokens, tmp_path, memory_budget_gib=room / 2**30)
    assert trainer.memory.plan is not None and 0 < trainer.memory.plan.recomputed < 5
    lines = "\n".join(trainer.self_check())
    assert "fits into train.memory_budget_gib" in lines and "layers recomputed" in lines


class _Shortage:
    """Out of memory, planted in the base: in calls of more than so many tokens, or in one call."""

    def __init__(self, policy: Any, limit: int) -> None:
        self.limit, self.failed, self.largest = limit, 0, 0
        policy.get_base_model().model.layers[3].register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        tokens = args[0].shape[0] * args[0].shape[1]
        if tokens > self.limit and torch.is_grad_enabled():
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.largest = max(self.largest, tokens)


@pytest.mark.slow  # a real step is in test_shortage
@pytest.mark.parametrize("token_budget", [None, 1500])
def test_a_step_that_runs_out_of_memory_is_done_again_in_less_and_no_number_changes(
    wide_model: Path,
    tokens: Tokenised,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    token_budget: int | None,
) -> None:
    def losses(trainer: PreferenceTrainer) -> list[float]:
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(_trainer(wide_model, tokens, tmp_path))
    short = _trainer(wide_model, tokens, tmp_path, max_tokens_per_batch=token_budget)
    shortage = _Shortage(short.model, limit=450)
    with caplog.at_level(logging.WARNING, logger="lora_dpo"):
        found = losses(short)
    assert found == pytest.approx(expected, rel=1e-4)
    assert shortage.failed and shortage.largest <= 450
    assert "out of memory in the longest micro-batch" in caplog.text


def test_a_shortage_that_nothing_mends_is_an_error_with_remedies_and_numbers(
    wide_model: Path, tokens: Tokenised, tmp_path: Path
) -> None:
    trainer = _trainer(wide_model, tokens, tmp_path, recompute=False)
    _Shortage(trainer.model, limit=10)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    text = str(error.value)
    assert "out of memory in the longest micro-batch" in text and text.count("GiB less") == 3
    assert trainer.memory.batches.micro_batch == 1
    assert "gradient_checkpointing" not in text  # all layers are recomputed by then
    assert "make it fit" in text or "fits by itself" in text


def test_another_error_is_not_taken_for_a_shortage(
    wide_model: Path, tokens: Tokenised, tmp_path: Path
) -> None:
    trainer = _trainer(wide_model, tokens, tmp_path)

    def broken(*_: Any) -> None:
        raise RuntimeError("a kernel failed")

    trainer.model.get_base_model().model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        trainer.train()


def test_embeddings_on_the_cpu_change_no_number_and_tied_ones_are_refused(
    wide_model: Path, tokens: Tokenised, tmp_path: Path
) -> None:
    from lora_dpo.engine import lay_out
    from lora_dpo.errors import ModelError
    from lora_dpo.forward import completion_logps

    batch = lay_out(list(tokens.rows.select(range(2))), flat=False)
    expected = completion_logps(load_policy(wide_model, lora=LORA), batch)
    moved = load_policy(wide_model, lora=LORA, embeddings_on_cpu=True)
    assert torch.equal(completion_logps(moved, batch), expected)
    assert "forward" in vars(moved.get_base_model().get_input_embeddings())
    tied = tmp_path / "tied"
    LlamaForCausalLM(LlamaConfig(**{**WIDE, "tie_word_embeddings": True})).save_pretrained(tied)
    with pytest.raises(ModelError, match="embeddings are its head too"):
        load_policy(tied, lora=LORA, embeddings_on_cpu=True)
    with pytest.raises(ModelError, match="unquantised"):
        load_policy(wide_model, quantisation="none", lora=LORA, embeddings_on_cpu=True)


def test_the_largest_micro_batch_has_different_prompts_and_no_more_rows_than_a_step() -> None:
    same = [_row(100, 30, 30 + i) for i in range(4)]
    others = [{**_row(95, 20, 20), "prompt_ids": list(range(i, i + 95))} for i in range(200, 203)]
    found = largest_micro_batch([*same, *others], Batches(4))
    prompts = {tuple(row["prompt_ids"]) for row in found}
    assert len(prompts) == 4
    for flat in (True, False):
        few = largest_micro_batch([*same, *others], Batches(1, 2, max_tokens=10**6), flat=flat)
        assert len(few) == 2


@pytest.mark.slow
def test_a_plan_from_a_saved_adapter_and_of_8_bits_and_what_is_not_planned(
    wide_model: Path, preferences: Path, tmp_path: Path
) -> None:
    from lora_dpo.errors import ModelError

    plain = _config(wide_model, preferences, tmp_path)
    load_policy(wide_model, lora=LORA).save_pretrained(tmp_path / "sft")
    values = plain.to_dict()
    values["model"]["adapter"] = str(tmp_path / "sft")
    del values["lora"]
    started = lora_dpo.plan(values)
    fresh = lora_dpo.plan(plain)
    assert started.bytes.adapters == 2 * fresh.bytes.adapters  # the frozen one beside it
    eight = lora_dpo.plan(plain.replace("model.quantisation", "int8"))
    assert eight.bytes.quantised > 1.8 * fresh.bytes.quantised
    assert eight.bytes.kept > fresh.bytes.kept  # the fast layers leave 8 bits to the library
    one = plain.replace("lora.targets", ".*layers\\.1\\..*q_proj")
    with pytest.raises(ModelError, match="some of the layers alone"):
        lora_dpo.plan(one)


@pytest.mark.parametrize("update", ["hard", "soft"])
def test_a_reference_that_moves_is_planned_with_its_own_adapter(
    wide_model: Path, preferences: Path, tmp_path: Path, update: str
) -> None:
    from lora_dpo.policy import let_reference_move

    config = _config(wide_model, preferences, tmp_path, reference_update=update)
    policy = load_policy(wide_model, lora=LORA)
    let_reference_move(policy, update)  # type: ignore[arg-type]
    real = sum(p.nbytes for name, p in policy.named_parameters() if "lora_" in name)
    assert lora_dpo.plan(config).bytes.adapters == real


def test_embeddings_that_are_trained_whole_count_once_as_frozen_and_once_as_trained(
    wide_model: Path, preferences: Path, tmp_path: Path
) -> None:
    config = _config(wide_model, preferences, tmp_path, engine="plain")
    plain = lora_dpo.plan(config)
    whole = lora_dpo.plan(config.replace("lora.modules_to_save", ["embed_tokens"]))
    assert whole.parts()["embeddings"] == plain.parts()["embeddings"]
    assert whole.parts()["other weights"] == plain.parts()["other weights"]
    wider = whole.bytes.adapters - plain.bytes.adapters
    assert wider == plain.parts()["embeddings"]  # float32 beside float32


def test_rows_in_four_bytes_a_token_are_the_rows(
    tiny_model: Path, pairs: list[dict[str, str]]
) -> None:
    """Of a selection in another order too; plans and the places of the largest ones are the same."""
    whole = tokenise(
        load_preferences(pairs), AutoTokenizer.from_pretrained(tiny_model), max_length=64
    )
    some = whole.rows.select([7, 2, 5, 3])
    for data in (whole.rows, some):
        compact, plain = compact_rows(data), list(data)
        assert [{k: list(v) for k, v in row.items()} for row in compact] == [
            {k: v for k, v in row.items() if k.endswith("_ids")} for row in plain
        ]
        assert Lengths.of(compact, 2) == Lengths.of(plain, 2)
        for batches in (Batches(2), Batches(1, 4, max_tokens=90)):
            assert largest_places(compact, batches) == largest_places(plain, batches)
            found = largest_micro_batch(compact, batches)
            assert [row["chosen_ids"] for row in found] == [
                plain[i]["chosen_ids"] for i in largest_places(plain, batches)
            ]
