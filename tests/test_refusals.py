"""What would be silently wrong is refused by name: adapters, data, folders, settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    TrainingArguments,
)

from lora_dpo.arguments import argument_problems
from lora_dpo.config import Config, LoraConfig
from lora_dpo.errors import ConfigError, DataError, ModelError, OutputError, TrainingError
from lora_dpo.exporting import export_merged
from lora_dpo.finished import evaluate
from lora_dpo.handing import export
from lora_dpo.heads import check_head
from lora_dpo.policy import load_policy, prepare_policy, save_adapter
from lora_dpo.run import train
from lora_dpo.run_folder import Run
from lora_dpo.stepping import one_batch_a_step
from tests.helpers import move_adapter, random_rows
from tests.test_run import _values

ROWS = random_rows(4)


@pytest.fixture
def values(tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = _values(tiny_model, data, tmp_path / "run")
    found["train"] |= {"num_train_epochs": 1, "save_steps": 1}
    return found


def _grown(tiny_model: Path, layers: int) -> LlamaForCausalLM:
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.num_hidden_layers = layers
    return LlamaForCausalLM(config)


def test_an_adapter_of_a_deeper_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = load_policy(_grown(tiny_model, 3))
    move_adapter(other)
    save_adapter(other, tmp_path / "adapter")
    with pytest.raises(ModelError, match="this adapter is of another model"):
        load_policy(tiny_model, adapter=tmp_path / "adapter")


def test_a_damaged_adapter_is_told_and_not_traced(tiny_model: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    save_adapter(policy, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_policy(tiny_model, adapter=tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable as JSON"):
        load_policy(tiny_model, adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": ["q_proj", "v_prj"]}, "target_modules: 'v_prj'"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save: 'classifier'"),
        ({"exclude": ["typo"]}, "exclude_modules: 'typo'"),
        ({"targets": ["embed_tokens"]}, "LoRA on Embedding has no proven merge"),
    ],
)
def test_a_layer_name_that_fits_nothing_is_not_ignored(
    tiny_model: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError, match=told):
        load_policy(tiny_model, lora=LoraConfig(**settings))


def test_base_weights_that_would_train_along_are_refused(tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="of the base require gradient"):
        prepare_policy(policy)


def test_a_model_whose_tokens_look_ahead_is_refused() -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = BertLMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ModelError, match="no causal model"):
        check_head(model)


@pytest.mark.parametrize("pad", [0, 1])
def test_a_model_whose_positions_begin_elsewhere_than_at_0_is_refused(pad: int) -> None:
    """RoBERTa counts from behind the number of its pad token, and takes those it is given as they are."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=64, is_decoder=True, pad_token_id=pad)
    model = RobertaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ModelError, match="others beside a longer row than alone"):
        check_head(model)


def test_what_peft_refuses_of_a_mamba_model_can_be_left_out_by_name() -> None:
    config = FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = FalconMambaForCausalLM(config)
    with pytest.raises(ModelError, match=r"out_proj.*lora\.exclude leaves modules out"):
        load_policy(model, lora=LoraConfig(rank=2), quantisation="none")
    lora = LoraConfig(rank=2, exclude=["out_proj"])
    check_head(load_policy(FalconMambaForCausalLM(config), lora=lora, quantisation="none"))


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_gpt2_whose_layers_are_transposed_is_trained_and_merged(
    tmp_path: Path, quantisation: str
) -> None:
    from tests.conftest import byte_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "gpt2")
    policy = load_policy(tmp_path / "gpt2", quantisation=quantisation)
    move_adapter(policy)
    proof = export_merged(lambda: policy, byte_tokenizer(), tmp_path / "merged", sequences=ROWS)
    assert proof.kl < 1e-8


def test_an_8_bit_policy_is_merged_and_its_distance_reported(
    tiny_model: Path, tmp_path: Path
) -> None:
    from tests.conftest import byte_tokenizer

    policy = load_policy(tiny_model, quantisation="int8")
    move_adapter(policy)
    proof = export_merged(lambda: policy, byte_tokenizer(), tmp_path / "merged", sequences=ROWS)
    assert proof.gate is None and proof.kl < 0.1
    with pytest.raises(ModelError, match="DoRA does not work on int8"):
        load_policy(tiny_model, quantisation="int8", lora=LoraConfig(dora=True))


def test_a_bfloat16_policy_passes_its_proof_though_its_arithmetic_is_rough(
    quickstart_model: Path, tmp_path: Path
) -> None:
    from tests.conftest import byte_tokenizer

    policy = load_policy(quickstart_model, compute_dtype="bfloat16")
    move_adapter(policy, std=0.02)
    before = {n: p.clone() for n, p in policy.named_parameters()}
    proof = export_merged(lambda: policy, byte_tokenizer(), tmp_path / "merged", sequences=ROWS)
    assert proof.kl < 1e-4
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])


def test_original_weights_are_taken_for_layers_without_adapter_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from tests.conftest import byte_tokenizer

    policy = load_policy(tiny_model, lora=LoraConfig(targets=["q_proj"]))
    export_merged(
        lambda: policy, byte_tokenizer(), tmp_path / "merged", sequences=ROWS, base="original"
    )
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    for name, value in plain.items():  # lora_B is 0: all of it is the checkpoint
        torch.testing.assert_close(stored[name], value, rtol=0, atol=1e-7)


def test_changed_data_stops_a_resume_an_evaluation_and_not_an_export(
    values: dict[str, Any], tmp_path: Path
) -> None:
    run = train({**values, "train": values["train"] | {"max_steps": 2}})
    path = tmp_path / "rows.jsonl"
    swapped = []
    for line in path.read_text().splitlines():
        pair = json.loads(line)
        swapped.append({**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in swapped))
    (run.folder / "run.json").unlink()  # as after a kill: one that has ended is not gone on with
    with pytest.raises(TrainingError, match=r"saved by another run \(rows: "):
        train({**values, "train": values["train"] | {"max_steps": 2}}, resume=True)
    with pytest.raises(DataError, match="the data has changed since the run"):
        evaluate(run)
    assert export(run, tmp_path / "merged", merge=True).proof is not None


def test_an_export_never_costs_a_run_or_a_folder_of_something_else(
    values: dict[str, Any], tmp_path: Path
) -> None:
    run = train({**values, "train": values["train"] | {"max_steps": 1}})
    for target in (run.folder, run.folder / "inside", tmp_path):
        with pytest.raises(OutputError, match="is, holds or lies inside the run"):
            export(run, target, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat").touch()
    with pytest.raises(OutputError, match="holds something else than an export"):
        export(run, tmp_path / "photos", overwrite=True)
    export(run, tmp_path / "out")
    export(run, tmp_path / "out", overwrite=True)
    assert Run.open(run.folder).results["steps"] == 1


def test_a_start_that_failed_before_its_first_step_can_be_repeated(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="nothing"):
        train({**values, "lora": {"targets": ["nothing"]}})
    assert train({**values, "train": values["train"] | {"max_steps": 1}}).results["steps"] == 1


def test_a_run_without_held_out_rows_trains_and_merges(
    values: dict[str, Any], tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    shutil.copy(tmp_path / "rows.jsonl", one)
    one.write_text(one.read_text().splitlines()[0] + "\n")
    run = train(
        {**values, "data": {"train": str(one), "max_length": 128}}
    )  # a single prompt holds nothing out
    assert run.results["rows"]["held_out"] == 0
    proof = export(run, tmp_path / "merged", merge=True).proof
    assert proof is not None and proof.kl < 1e-6


def test_noise_in_the_policy_alone_is_refused_from_python_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = load_policy(tiny_model)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, neftune_noise_alpha=5.0)
    with pytest.raises(ConfigError, match="noise in the policy alone"):
        one_batch_a_step(arguments, policy)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": float("nan")},
        {"seed": -1},
        {"seed": 2**40},
        {"max_steps": 0},
        {"warmup_steps": float("inf")},
        {"dataloader_num_workers": -1},
        {"metric_for_best_model": "nonsense"},
        {"eval_steps": float("inf")},
        {5: 3},
    ],
    ids=str,
)
def test_values_that_the_library_would_trip_over_later_are_told_at_once(values: Any) -> None:
    assert len(argument_problems(values, set())) == 1


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub", "hub_model_id", "hub_revision"])
def test_what_belongs_to_a_push_is_refused_and_a_secret_is_not_said(name: str) -> None:
    (problem,) = argument_problems({name: "hf_secret"}, set())
    assert problem.startswith(f"train.{name}: not a setting here;") and "hf_secret" not in problem


def test_yaml_spellings_of_no_and_of_nothing_are_understood(values: dict[str, Any]) -> None:
    values["train"] |= {"eval_strategy": False, "save_strategy": False}
    values["lora"] = None
    config = Config.parse(values)
    assert config.lora == LoraConfig()
    assert argument_problems({"save_strategy": False}, set()) == []


def test_lora_settings_beside_a_starting_adapter_are_not_ignored(values: dict[str, Any]) -> None:
    values["model"]["adapter"] = "somewhere"
    with pytest.raises(ConfigError, match="brings its own rank"):
        Config.parse(values)
    assert Config.parse({**values, "lora": {}}).model.adapter == "somewhere"


def test_rows_longer_than_the_models_positions_are_refused(values: dict[str, Any]) -> None:
    values["data"]["max_length"] = 4096
    with pytest.raises(ConfigError, match="the model has 128 positions"):
        train(values)


def test_a_chat_template_for_plain_texts_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    values["data"]["chat_template"] = str(template)
    with pytest.raises(
        DataError, match="the rows are plain texts, to which no template is applied"
    ):
        train(values)
    assert not (tmp_path / "run").exists()
