"""Options of other tools: every field of TRL's configs is answered, and every answer is a key of ours."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_dpo import objectives
from lora_dpo.arguments import REFUSED, argument_fields
from lora_dpo.config import Config
from lora_dpo.config.foreign import (
    answer_to_loss,
    answer_to_option,
    foreign_losses,
    foreign_options,
)
from lora_dpo.errors import ConfigError


def _trl_classes() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's of its own parts
        import trl
        from trl.experimental.cpo import CPOConfig
        from trl.experimental.orpo import ORPOConfig
    names = ("DPOConfig", "KTOConfig", "SFTConfig", "ModelConfig", "ScriptArguments")
    return [*(getattr(trl, name) for name in names), CPOConfig, ORPOConfig]


def test_every_field_of_trls_configs_keeps_its_name_or_is_answered() -> None:
    answered = {found.option for found in foreign_options("TRL")} | set(REFUSED)
    seen = 0
    for kind in _trl_classes():
        for field in dataclasses.fields(kind):
            seen += 1
            known = field.name in answered or field.name in argument_fields()
            assert known, f"{kind.__name__}.{field.name} has no answer"
    assert seen > 500  # a field that is not looked at would not be missed


def test_every_loss_of_trl_is_in_the_table_under_its_name_or_the_one_that_is_told() -> None:
    with_choices = [
        choice
        for kind in _trl_classes()
        for field in dataclasses.fields(kind)
        if field.name == "loss_type"
        for choice in field.metadata.get("choices", [])
    ]
    documented = [
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
        "sigmoid_norm",
    ]  # TRL 1.16's DPOConfig lists them in its docstring alone
    assert set(documented) <= set(_trl_classes()[0].__doc__.replace("'", "`").split("`"))
    assert with_choices
    for name in {*documented, *with_choices}:
        assert name in objectives.OBJECTIVES or answer_to_loss(name), name


def test_every_answer_names_a_key_that_a_config_has() -> None:
    hyperparameters = {k for row in objectives.OBJECTIVES.values() for k in row.hyperparameters}
    for found in foreign_options():
        assert found.ours or found.note, found
        section, _, key = found.ours.partition(".")
        if not key:
            assert section in ("", "objective"), found
            continue
        legal = set(Config.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]
        legal |= argument_fields() if section == "train" else set()
        legal |= hyperparameters | {"nll_weight"} if section == "objective" else set()
        assert key in legal, found
    for loss in foreign_losses():
        assert loss.ours in {*objectives.OBJECTIVES, "mixture"} or loss.note, loss


def test_a_flat_config_of_trl_is_one_error_with_an_answer_for_every_key(tmp_path: Path) -> None:
    flat = {
        "model_name_or_path": "some/model",
        "dataset_name": "some/data",
        "loss_type": ["sigmoid", "sft"],
        "per_device_train_batch_size": 4,
        "output_dir": "out",
        "max_prompt_length": 512,
        "lora_r": 16,
        "padding_free": True,
        "rank": 8,
    }
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(flat))
    with pytest.raises(ConfigError) as caught:
        Config.load(tmp_path / "trl.yaml")
    told = {problem.partition(":")[0]: problem for problem in caught.value.problems}
    assert set(flat) <= set(told)
    for key, part in {
        "model_name_or_path": "here it is model.base",
        "dataset_name": "here it is data.train",
        "loss_type": "here it is objective.name. sigmoid is TRL and LLaMA-Factory's; here it is dpo",
        "per_device_train_batch_size": "here it is train.per_device_train_batch_size",
        "output_dir": "set output.dir",
        "max_prompt_length": "data.overflow says",
        "lora_r": "here it is lora.rank",
        "padding_free": "no setting here: train.engine",
        "rank": "here it is lora.rank",
    }.items():
        assert part in told[key], told[key]


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (
            "objective",
            "sigmoid",
            "objective.name: sigmoid is TRL and LLaMA-Factory's; here it is dpo",
        ),
        ("objective.simpo_gamma", 1, "here it is objective.gamma (of simpo and cpo_simpo)"),
        ("objective.alpha", 1, "'dpo' has no such hyperparameter"),  # ours, of other objectives
        ("train.lora_r", 4, "train.lora_r: TRL and axolotl's; here it is lora.rank"),
        ("lora.r", 4, "lora.r: Unsloth's; here it is lora.rank"),
        ("model.load_in_4bit", True, "here it is model.quantisation"),
        ("data.cutoff_len", 9, "data.cutoff_len: LLaMA-Factory's; here it is data.max_length"),
        ("train.learning_rte", 1, "Did you mean 'learning_rate'?"),
    ],
)
def test_another_tools_word_is_answered_wherever_it_stands(
    place: str, value: Any, told: str
) -> None:
    good: dict[str, Any] = {"model": {"base": "m"}, "data": {"train": "a"}, "output": {"dir": "o"}}
    section, _, key = place.partition(".")
    good[section] = {**good.get(section, {}), key: value} if key else value
    with pytest.raises(ConfigError) as caught:
        Config.parse(good)
    assert told in str(caught.value)


def test_a_key_of_ours_in_its_own_place_is_not_another_tools() -> None:
    assert answer_to_option("model.trust_remote_code") is None
    assert answer_to_option("objective.beta") is None
    assert answer_to_option("no_such_option") is None
    assert [f.option for f in foreign_options("axolotl") if f.ours == "lora.rank"] == ["lora_r"]
