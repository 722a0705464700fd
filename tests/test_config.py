"""Configs: every problem at once, nothing ignored, and what is written reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_dpo.arguments import DEFAULTS, REFUSED, argument_problems, build_arguments
from lora_dpo.config import Config, TrainConfig
from lora_dpo.errors import ConfigError

GOOD: dict[str, Any] = {
    "model": {"base": "some/model"},
    "data": {"train": "a.jsonl"},
    "output": {"dir": "out"},
}


def _with(**sections: Any) -> dict[str, Any]:
    return {**GOOD, **sections}


def test_all_problems_are_told_at_once_each_with_its_place_and_a_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse(
            {
                "objective": {"name": "dpo", "bta": 0.1, "label_smoothing": 0.7},
                "model": {"base": "x", "quantization": "nf4"},
                "lora": {"rank": 0, "init": "pissa"},
                "data": {"train": [{"path": "a", "wieght": 2}]},
                "train": {"learning_rte": 1, "optim": "adamm", "fp16": True, "max_steps": "many"},
            }
        )
    problems = "\n".join(caught.value.problems)
    for part in (
        "objective.bta: 'dpo' has no such hyperparameter; it takes beta, label_smoothing, nll_weight. Did you",
        "objective.label_smoothing: got 0.7; 'dpo' expects a number in [0, 0.5)",
        "model.quantization: unknown key",
        "Did you mean 'quantisation'?",
        "lora.rank: got 0",
        "rewrites the base weights",
        "data.train.0.wieght: unknown key; expected one of path, weight, split. Did you mean 'weight'?",
        "train.learning_rte: unknown key",
        "Did you mean 'learning_rate'?",
        "train.optim: got 'adamm'",
        "train.fp16: not a setting here; set model.compute_dtype: float16",
        "train.max_steps: got 'many'",
        "output.dir: missing; it is required",
    ):
        assert part in problems


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = Config.parse(_with(objective={"name": "dpo", "beta": 0.3}, train={"seed": 4}))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "c.yaml") == config
    assert Config.parse(config.to_dict()) == config


def test_overrides_set_any_key_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    found = Config.load(
        path, ["objective.beta=0.05", "train.learning_rate=1e-4", "lora.targets=[q_proj]"]
    )
    assert found.objective.further == {"beta": 0.05}
    assert found.lora.targets == ["q_proj"]
    arguments = build_arguments(found.train.further, output_dir="o", evaluates=False)
    assert arguments.learning_rate == 1e-4  # YAML reads 1e-4 as text
    with pytest.raises(ConfigError) as caught:
        Config.load(path, ["nonsense", "model.base.x=1", "objective.x=[", "lora.rnk=2"])
    text = str(caught.value)
    assert "--set nonsense: expected key=value" in text
    assert "--set model.base.x=1: 'base' holds 'some/model'" in text
    with pytest.raises(ConfigError, match=r"lora\.rnk: unknown key.*Did you mean 'rank'"):
        Config.load(path, ["lora.rnk=2"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "a mapping of sections is expected"),
        ("", "a mapping of sections is expected"),
        ("model: {base: a}\nmodel: {base: b}", "the key 'model' is given twice"),
        ("model: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_broken_yaml_and_repeated_keys_are_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        Config.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.load(tmp_path / "missing.yaml")


def test_every_refused_argument_is_refused_and_every_default_is_legal() -> None:
    for key in REFUSED:
        assert "not a setting here" in argument_problems({key: 1}, set())[0]
    assert argument_problems(DEFAULTS, set()) == []


def test_defaults_suit_lora_and_arguments_that_contradict_are_told() -> None:
    arguments = build_arguments({}, output_dir="o", evaluates=True)
    assert arguments.learning_rate == 5e-5
    assert arguments.eval_strategy == "steps"
    assert arguments.metric_for_best_model == "eval_loss" and not arguments.greater_is_better
    with pytest.raises(ConfigError, match="no held-out rows"):
        build_arguments({"eval_strategy": "epoch"}, output_dir="o", evaluates=False)
    with pytest.raises(ConfigError, match="train:"):
        build_arguments(
            {"load_best_model_at_end": True, "save_strategy": "no"}, output_dir="o", evaluates=True
        )


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_goes_by_both_of_its_names(name: str) -> None:
    assert argument_problems({name: True}, set(TrainConfig.model_fields)) == []
    for value in (True, False):
        arguments = build_arguments({name: value}, output_dir="o", evaluates=False)
        installed = getattr(arguments, "activation_checkpointing", None)
        assert (arguments.gradient_checkpointing if installed is None else installed) is value


def test_paths_become_absolute_so_that_the_saved_config_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    resolved = Config.parse(GOOD).resolved()
    assert resolved.data.train[0].path == str(tmp_path / "a.jsonl")
    assert resolved.model.base == "some/model"  # no such folder: a hub id
    assert resolved.output.dir == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("objective", "train", "key"),
    [
        ("simpo", {"reference_update": "soft"}, "train.reference_update"),
        (
            "simpo",
            {"metric_for_best_model": "eval_logratios/chosen"},
            "train.metric_for_best_model",
        ),
        (
            "sft_demonstrations",
            {"metric_for_best_model": "rewards/accuracies"},
            "train.metric_for_best_model",
        ),
    ],
)
def test_settings_of_what_an_objective_does_not_have_are_refused(
    objective: str, train: dict[str, str], key: str
) -> None:
    values = {
        "objective": objective,
        "model": {"base": "b"},
        "data": {"train": "d.jsonl"},
        "train": train,
        "output": {"dir": "o"},
    }
    with pytest.raises(ConfigError, match=key):
        Config.parse(values)
    Config.parse({**values, "objective": "dpo"})
