"""Every row of the table trains the bundled model by one changed word, and what it trains improves."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, TrainingArguments

from lora_dpo.config import Config, LoraConfig
from lora_dpo.data import Tokenised, load_preferences, tokenise
from lora_dpo.errors import ConfigError, DataError
from lora_dpo.evaluation import evaluate_policy
from lora_dpo.objectives import OBJECTIVES, get
from lora_dpo.policy import load_policy
from lora_dpo.run import train
from lora_dpo.run_folder import bound_objective
from lora_dpo.stepping import balanced, fitted
from lora_dpo.trainer import PreferenceTrainer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ROWS = 8
UNPAIRED = [name for name, row in OBJECTIVES.items() if row.data == "unpaired"]


@pytest.fixture(scope="module")
def rows(quickstart_model: Path) -> dict[str, Tokenised]:
    """The same bundled pairs, as pairs and as labelled rows."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    lines = (ROOT / "lora_dpo/quickstart/data/train.jsonl").read_text().splitlines()[:ROWS]
    return {
        kind: tokenise(
            load_preferences([json.loads(line) for line in lines], kind=kind),  # type: ignore[arg-type]
            tokenizer,
            max_length=256,
        )
        for kind in ("paired", "unpaired", "demonstrations")
    }


@pytest.fixture(scope="module")
def policy(quickstart_model: Path) -> PeftModel:
    torch.manual_seed(0)
    return load_policy(str(quickstart_model), lora=LoraConfig(rank=8))


@pytest.fixture(scope="module")
def start(policy: PeftModel) -> dict[str, Any]:
    return copy.deepcopy({n: p.data for n, p in policy.named_parameters() if p.requires_grad})


@pytest.fixture
def fresh(policy: PeftModel, start: dict[str, Any]) -> Iterator[PeftModel]:
    parameters = dict(policy.named_parameters())
    for name, value in start.items():
        parameters[name].data.copy_(value)
    yield policy


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_word_alone_changes_the_objective_and_its_loss_falls(
    name: str, fresh: PeftModel, rows: dict[str, Tokenised], tmp_path: Path
) -> None:
    bound = bound_objective(Config.load(QUICKSTART, [f"objective={name}"]))
    data = rows[bound.data]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    known, _ = fitted(bound, data, None)
    prepared = balanced(bound, known)
    before = evaluate_policy(fresh, known, prepared, batch_size=ROWS)
    trainer = PreferenceTrainer(policy=fresh, objective=bound, args=args, train_data=data)
    trainer.train()
    after = evaluate_policy(fresh, known, prepared, batch_size=ROWS)
    assert trainer.state.global_step == 3
    if bound.initial_states():  # its target moves along: the loss may stay while the policy learns
        assert after["rewards/margins"].mean > before["rewards/margins"].mean
    else:
        assert after["loss"].mean < before["loss"].mean


def test_a_mixture_and_an_sft_term_train_too(
    fresh: PeftModel, rows: dict[str, Tokenised], tmp_path: Path
) -> None:
    terms = "[{name: dpo, weight: 0.8, beta: 0.5}, {name: bco_pair, weight: 0.2}, {name: sft, weight: 1}]"
    config = Config.load(QUICKSTART, [f"objective={{name: mixture, terms: {terms}}}"])
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=ROWS,
        learning_rate=2e-3, save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    for bound in (bound_objective(config), get("dpo").bind(nll_weight=1.0)):
        before = evaluate_policy(fresh, rows["paired"], bound, batch_size=ROWS)
        PreferenceTrainer(
            policy=fresh, objective=bound, args=args, train_data=rows["paired"]
        ).train()
        after = evaluate_policy(fresh, rows["paired"], bound, batch_size=ROWS)
        assert after["loss"].mean < before["loss"].mean
        assert after["logps/chosen"].mean > before["logps/chosen"].mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("objective={name: dpo, desirable_weight: 2}", r"'dpo' has no such hyperparameter.*kto"),
        ("objective={name: kto, label_smoothing: 0.1}", r"'kto' has no such hyperparameter"),
        ("objective={name: kto, nll_weight: 1}", r"'kto' has no such hyperparameter"),
        ("objective=dopo", r"'dopo' is not in the table.*Did you mean"),
        ("objective={name: simpo, gamma: -1}", r"objective.gamma: got -1; 'simpo' expects"),
        (
            "objective={name: mixture, terms: [{name: dpo, weight: 1}, {name: kto, weight: 1}]}",
            r"all terms need the same kind of data",
        ),
    ],
)
def test_a_wrong_combination_is_one_clear_error(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(QUICKSTART, [change])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "dpo",
            {"prompt": "p", "completion": " c", "label": True},
            "a paired objective such as dpo",
        ),
        ("odpo", {"prompt": "p", "chosen": " c", "rejected": " r"}, "1: no scores"),
        ("kto", {"prompt": "p", "chosen": " c", "rejected": " r"}, "all rows have one prompt"),
    ],
)
def test_data_that_the_objective_cannot_use_are_refused_before_weights_load(
    name: str, row: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("lora_dpo.run.load_policy", never)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    changes = [f"objective={name}", f"data.train={data}", "data.eval=null", "data.eval_fraction=0"]
    config = Config.load(QUICKSTART, [*changes, f"output.dir={tmp_path / 'run'}"])
    with pytest.raises(DataError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()
